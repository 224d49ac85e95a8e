"""Values and gradients are those of the definitions, which share no code with the losses."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fastcl
from fastcl.compat import info_nce, lightly, open_clip, solo, supcontrast, truth
from fastcl.compat.ranking import ranking_loss

F64 = torch.float64


def rows(*shape):
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def agree(ours, theirs, inputs, tolerance=1e-10):
    results = []
    for function in (ours, theirs):
        value = function(*inputs)
        results.append((value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True)))
    for a, b, x in zip(*results, (None, *inputs), strict=True):
        b = torch.zeros_like(x) if b is None else b
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def unit(x):
    return F.normalize(x, dim=-1)


# 37 rows fill no tile; 1 has no negatives; -1 turns every order round
@pytest.mark.parametrize("n", [1, 2, 37])
@pytest.mark.parametrize("temperature", [0.5, 0.05, -1.0])
def test_lightly(n, temperature):
    z = rows(n, 19), rows(n, 19)
    agree(lightly.NTXentLoss(temperature), lambda a, b: truth.nt_xent(a, b, temperature), z)
    agree(lightly.DCLLoss(temperature), lambda a, b: truth.dcl(a, b, temperature), z)
    agree(lightly.DCLWLoss(temperature, 0.3), lambda a, b: truth.dcl(a, b, temperature, 0.3), z)


def test_lightly_weights_are_differentiated():
    z = rows(5, 4), rows(5, 4)

    def ours(a, b):
        return lightly.DCLLoss(0.2, weight_fn=lambda a, b: (a - b).square().sum(1))(a, b)

    def theirs(a, b):
        losses = truth.dcl(a, b, 0.2)
        a, b = unit(a), unit(b)
        positive = (a * b).sum(1) / 0.2
        return losses + (positive * (1 - (a - b).square().sum(1))).mean()

    agree(ours, theirs, z)


@pytest.mark.parametrize("weight", [2.0, torch.tensor(2.0), torch.tensor([2.0])])
def test_lightly_takes_one_weight_for_all(weight):
    z = rows(5, 4), rows(5, 4)
    agree(
        lightly.DCLLoss(0.2, weight_fn=lambda a, b: weight),
        lightly.DCLLoss(0.2, weight_fn=lambda a, b: torch.full((5,), 2.0)),
        z,
    )


@pytest.mark.parametrize("size", [(7, 19), 7])
@pytest.mark.filterwarnings("ignore:Memory bank size")
def test_lightly_bank(size):
    loss = lightly.NTXentLoss(0.2, memory_bank_size=size).double()
    for step in range(4):  # 3 rows at a time pass the end of 7, where the peer drops the rest
        z = rows(3, 19), rows(3, 19)
        if step:
            bank = loss.memory_bank.bank.clone()
            value = loss(*z)
            expected = truth.moco(*z, bank, 0.2)
            torch.testing.assert_close(value, expected)
            for a, b in zip(
                torch.autograd.grad(value, z), torch.autograd.grad(expected, z), strict=True
            ):
                torch.testing.assert_close(a, b)
            begin = (0, 3, 6, 0)[step]
            kept = unit(z[1].detach())[: 7 - begin]
            torch.testing.assert_close(loss.memory_bank.bank[begin : begin + 3], kept)
        else:
            loss(*z)
    frozen = loss.memory_bank.bank.clone()
    with torch.no_grad():
        loss(*z)
    assert torch.equal(loss.memory_bank.bank, frozen)
    assert not loss.state_dict()


@pytest.mark.parametrize("negatives", [None, (11, 6), (9, 4, 6)])
@pytest.mark.parametrize("temperature", [0.1, 0.013])
def test_info_nce(negatives, temperature):
    inputs = [rows(9, 6), rows(9, 6)] + ([rows(*negatives)] if negatives else [])
    mode = "paired" if negatives and len(negatives) == 3 else "unpaired"
    loss = info_nce.InfoNCE(temperature, negative_mode=mode)
    other = None if negatives else (None,)
    agree(loss, lambda *x: truth.info_nce(*x, *(other or ()), temperature), inputs)
    none = info_nce.info_nce(*inputs, temperature=temperature, reduction="none", negative_mode=mode)
    torch.testing.assert_close(none.mean(), loss(*inputs))


def test_open_clip():
    scale, bias = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (14.0, -6.0))
    z = rows(37, 19), rows(37, 19)

    def clip(a, b, scale, bias):
        return open_clip.ClipLoss()(unit(a), unit(b), scale, bias, output_dict=True)

    agree(
        lambda *x: clip(*x)["contrastive_loss"],
        lambda a, b, scale, bias: truth.clip(unit(a), unit(b), scale),
        (*z, scale, bias),
    )
    for negative_only in (False, True):
        loss = open_clip.SigLipLoss(chunk_size=8)._loss if negative_only else open_clip.SigLipLoss()
        options = {"negative_only": True} if negative_only else {}
        agree(
            lambda a, b, *x, loss=loss, o=options: loss(unit(a), unit(b), *x, **o),
            lambda a, b, *x, n=negative_only: truth.siglip(unit(a), unit(b), *x, n),
            (*z, scale, bias),
        )


def test_open_clip_logits_are_those_of_the_loss():
    loss, z = open_clip.ClipLoss(), [unit(rows(6, 4)) for _ in range(2)]
    per_image, per_text = loss.get_logits(*z, 10.0, 0.5)
    target = loss.get_ground_truth("cpu", 6)
    both = F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)
    torch.testing.assert_close(both / 2, loss(*z, 10.0))
    for negative_only in (False, True):
        loss = open_clip.SigLipLoss()
        signs = loss.get_ground_truth("cpu", F64, 6, negative_only)
        expected = -F.logsigmoid(signs * loss.get_logits(*z, 10.0, 0.5)).sum() / 6
        torch.testing.assert_close(expected, loss._loss(*z, 10.0, 0.5, negative_only))


EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@pytest.mark.parametrize("hard", [0, 1, 2])
@pytest.mark.parametrize(
    ("directions", "partition_mode"),
    [
        (EVERY[:1], "joint"),
        (EVERY[:3:2], "joint"),
        (EVERY[:3:2], "per_direction"),
        (EVERY[:2], "joint"),
        (EVERY[::3], "joint"),
        (EVERY, "joint"),
    ],
)
@pytest.mark.parametrize(
    "hardness", [None, "in_batch_negatives", "hard_negatives", "all_negatives"]
)
def test_ranking(hard, directions, partition_mode, hardness):
    options = {"directions": directions, "partition_mode": partition_mode}
    if hardness:
        options |= {"hardness_mode": hardness, "hardness_strength": 4.0}
    embeddings = [rows(7, 5) for _ in range(2 + hard)]
    agree(lambda *x: ranking_loss(x, 20.0, **options), lambda *x: truth.ranking(*x, **options),
          embeddings)  # fmt: skip
    plain = {**options, "normalize": False, "scale": 0.7}
    agree(lambda *x: ranking_loss(x, **plain), lambda *x: truth.ranking(*x, **plain), embeddings)


def test_raised_scores_have_second_derivatives():
    """The rise is constant, so it is in no mixed derivative of queries and documents either."""
    options = {"hardness_mode": "all_negatives", "hardness_strength": 4.0}
    embeddings, direction = [rows(5, 4) for _ in range(3)], torch.randn(5, 4, dtype=F64)

    def slope(loss):
        def along(*x):
            (gradient,) = torch.autograd.grad(loss(*x), x[:1], create_graph=True)
            return (gradient * direction).sum()

        return along

    agree(
        slope(lambda *x: ranking_loss(x, 5.0, **options)),
        slope(lambda *x: truth.ranking(*x, scale=5.0, **options)),
        embeddings,
    )


@pytest.mark.parametrize("mode", ["all", "one"])
def test_supcontrast_labels_are_any_numbers(mode):
    x, loss = rows(6, 2, 4), supcontrast.SupConLoss(0.3, mode)
    labels, same = torch.tensor([0.5, -0.0, 0.5, 3.0, 0.0, -3.0]), torch.tensor([1, 0, 1, 2, 0, 3])
    agree(lambda x: loss(x, labels), lambda x: loss(x, same), (x,))
    alone = rows(6, 1, 4)  # no view has a partner
    agree(loss, lambda x: 0.0 * x.sum(), (alone,))


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("what", ["views", "labels", "mask", "weights", "nothing"])
def test_supcontrast(mode, what):
    x = rows(9, 3, 2, 4)
    options = {
        "views": {},
        "labels": {"labels": torch.tensor([0, 1, 0, 2, 3, 3, 3, 1, 9])},
        "mask": {"mask": (torch.rand(9, 9) < 0.3).int()},  # asymmetric, with empty rows
        "weights": {"mask": torch.rand(9, 9, dtype=F64)},
        "nothing": {"mask": torch.zeros(9, 9)},
    }[what]
    agree(
        lambda x: supcontrast.SupConLoss(0.3, mode, 0.1)(unit(x.flatten(2)), **options),
        lambda x: truth.sup_con_views(
            unit(x.flatten(2)), temperature=0.3, base_temperature=0.1, contrast_mode=mode, **options
        ),
        (x,),
    )


@pytest.mark.parametrize("indexes", [torch.arange(7).repeat(2), torch.arange(14) % 5])
def test_solo(indexes):
    agree(
        lambda z: solo.simclr_loss_func(z, indexes, 0.2),
        lambda z: truth.sup_con_inside(z, indexes, 0.2),
        (rows(14, 6),),
    )
    z = rows(7, 6), rows(7, 6)
    agree(
        lambda a, b: solo.mocov3_loss_func(a, b, 0.3),
        lambda a, b: 0.6 * truth.info_nce(a, b, None, 0.3),
        z,
    )
    agree(solo.nnclr_loss_func, truth.info_nce, z)
    queue = unit(rows(5, 6)).detach()
    agree(
        lambda a, b: solo.mocov2plus_loss_func(unit(a), unit(b), queue.T, 0.2),
        lambda a, b: truth.moco(a, b, queue, 0.2),
        z,
    )


BY_LABEL = {
    "NTXentLoss": {"temperature": 0.2},
    "SupConLoss": {"temperature": 0.2},
    "ContrastiveLoss": {"pos_margin": 0.9, "neg_margin": 1.2},
    "TripletMarginLoss": {"margin": 1.2},  # so wide that a row would violate with itself
}
LABELS = {
    "mixed": torch.tensor([0, 1, 0, 2, 3, 3, 3, 1, 9, 0, 4]),  # 1, 2 and 3 positives, and none
    "pairs": torch.arange(11) // 2,
    "alike": torch.zeros(11, dtype=torch.int64),
    "unlike": torch.arange(11),
}


@pytest.mark.parametrize("block", [2**20, 30])  # whole, and two rows at a time
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", BY_LABEL)
def test_by_label(pml, monkeypatch, name, labels, block):
    monkeypatch.setattr(fastcl.losses.distances, "_BLOCK", {"cpu": block})
    if block == 30 and name in ("NTXentLoss", "SupConLoss"):
        pytest.skip("takes no blocks")
    options, labels = BY_LABEL[name], LABELS[labels]
    loss, expected = getattr(pml, name)(**options), functools.partial(truth.by_label, name)
    x, ref = rows(11, 6), rows(7, 6)
    agree(lambda x: loss(x, labels), lambda x: expected(x, labels, **options), (x,), 1e-8)
    agree(
        lambda x, r: loss(x, labels, ref_emb=r, ref_labels=labels[-7:]),
        lambda x, r: expected(x, labels, r, labels[-7:], **options),
        (x, ref),
        1e-8,
    )
    views = torch.arange(11).repeat(2)
    agree(
        pml.SelfSupervisedLoss(loss),
        lambda a, b: expected(torch.cat([a, b]), views, **options),
        (x, rows(11, 6)),
        1e-8,
    )


def test_a_single_pair_of_either_kind_is_no_loss(pml):
    x, ref, labels = rows(1, 4), rows(2, 4), torch.tensor([5])
    for name in BY_LABEL:
        value = getattr(pml, name)()(x, labels, ref_emb=ref, ref_labels=torch.tensor([5, 6]))
        if name != "TripletMarginLoss":
            assert float(value.detach()) == 0.0


def test_nt_xent_does_not_saturate(pml):
    """A positive far worse than a negative, at temperature 0.005: about 200, with a slope."""
    x = torch.tensor([[1.0, 0.0], [-0.5, 0.866], [0.6, 0.8], [0.6, -0.8]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2])
    loss = pml.NTXentLoss(temperature=0.005)(x, labels)
    expected = truth.by_label("NTXentLoss", x, labels, temperature=0.005)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert float(loss.detach()) > 150
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(gradient.norm()) > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", BY_LABEL)
def test_dtype_is_the_embeddings(pml, name, dtype):
    x = rows(11, 6).detach().to(dtype).requires_grad_()
    loss = getattr(pml, name)()(x, LABELS["mixed"])
    assert loss.dtype == dtype
    expected = truth.by_label(name, x, LABELS["mixed"], **_defaults(name))
    torch.testing.assert_close(
        loss.double(), expected, rtol=4 * torch.finfo(dtype).eps + 1e-5, atol=1e-5
    )


def _defaults(name):
    return {"NTXentLoss": {"temperature": 0.07}}.get(name, {})


def numbers_kept(run):
    """Numbers in tensors that autograd keeps for the backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    loss.backward()
    return sum(kept.values())


def test_no_matrix_is_kept(pml, monkeypatch):
    fastcl.set_workspace(0)
    monkeypatch.setattr(fastcl.losses.distances, "_BLOCK", {"cpu": 8 * 1024})
    n = 1024
    a, b = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
    labels, mask = torch.arange(n) // 4, torch.zeros(n, n)
    views = torch.stack([unit(a), unit(b)], 1).detach().requires_grad_()
    runs = {
        "nt_xent": lambda: lightly.NTXentLoss()(a, b),
        "dcl": lambda: lightly.DCLWLoss()(a, b),
        "info_nce": lambda: info_nce.InfoNCE()(a, b),
        "clip": lambda: open_clip.ClipLoss()(unit(a), unit(b), 10.0),
        "siglip": lambda: open_clip.SigLipLoss()(unit(a), unit(b), 10.0, -10.0),
        "ranking": lambda: ranking_loss([a, b, a + b], directions=EVERY),
        "views": lambda: supcontrast.SupConLoss(contrast_mode="one")(views, labels),
        **{
            name: lambda name=name: getattr(pml, name)(**BY_LABEL[name])(a, labels)
            for name in BY_LABEL
        },
    }
    for name, run in runs.items():
        assert numbers_kept(run) < n * n / 4, name
    assert numbers_kept(lambda: supcontrast.SupConLoss()(views, mask=mask)) < 1.25 * n * n


@pytest.mark.parametrize("name", BY_LABEL)
def test_a_batch_that_is_in_its_memory(pml, name):
    """Rows 5, 6, 7 and 0 of the memory are the batch itself: a row is no positive of its own."""
    options, x = BY_LABEL[name], rows(4, 6)
    memory, labels = torch.randn(8, 6, dtype=F64), torch.tensor([1, 0, 1, 2, 2, 0, 1, 1])
    slots = torch.tensor([5, 6, 7, 0])
    memory[slots] = x.detach()
    loss = getattr(pml, name)(**options)
    itself = torch.zeros(4, 8, dtype=torch.bool)
    itself[torch.arange(4), slots] = True

    def ours(x):
        pairs = loss._candidates(x, labels[slots], memory, labels, skip=(5, 5 - 8))
        return loss._of(pairs, F64)

    agree(
        ours,
        lambda x: truth.by_label(
            name, x, labels[slots], memory, labels, itself=itself, **options
        ),
        (x,),
        1e-8,
    )  # fmt: skip

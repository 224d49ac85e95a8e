"""The losses beyond two views: one table, each row against its plain float64 definition.

Values, gradients, reductions, weights, precisions, strides, copies and compilation are asked of
every row; what is particular to one loss stands in the file of its family.
"""

import copy
import importlib.util
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl import functional as f

_spec = importlib.util.spec_from_file_location("oracle", Path(__file__).parent / "oracle.py")
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

F64 = torch.float64
N, D = 22, 6
# four classes of several, one sample without a positive
LABELS = torch.tensor([0, 1, 2, 3] * 5 + [0, 9])
EVEN = LABELS % 2 == 0
ORDER = torch.randperm(N, generator=torch.Generator().manual_seed(5))


# exact in 16 bits, so that what is fixed is the same in every precision
REFERENCE = torch.randn(N, 4, generator=torch.Generator().manual_seed(6)).bfloat16().double()
PATCHES = torch.randn(3, N, D, generator=torch.Generator().manual_seed(7)).bfloat16().double()
SOURCE = torch.tensor([0, 0, 1, 2, 2, 2, 5, 6, 7])  # none, one and several for an anchor
TARGETS = torch.rand(N, 5, generator=torch.Generator().manual_seed(8)) < 0.4


def captions(positive, negative, **options):
    reference = REFERENCE.to(positive.dtype)
    return f.caption_contrastive(
        positive, reference[:, 0], negative, reference[:, 1:], log_noise_ratio=0.4, **options
    )


def patches(query, **options):
    keys = PATCHES if query.dim() == 3 else PATCHES[0]
    return f.patch_nce(query, keys.to(query.dtype), **options)


def conditional(features, proxies, **options):
    return f.conditional_contrastive(features, LABELS, proxies, **options)


def vib(mean, log_std, **options):
    return f.vib_compression(mean, (log_std / 16).exp(), **options)


def mib(mean1, log_std1, mean2, log_std2, **options):
    return f.mib_compression(mean1, (log_std1 / 16).exp(), mean2, (log_std2 / 16).exp(), **options)


class Function(torch.nn.Module):
    """A function as a module: where the loss's own has weights or takes what is fixed here."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *inputs, **more):
        return self.function(*inputs, **self.options, **more)

    def extra_repr(self):
        return f"reduction={self.options.get('reduction', 'mean')!r}"


@dataclass
class Row:
    """A module, the shapes of its float inputs, what else it takes, and its definition.

    The definition returns losses per sample, or their sums and how many tuples each sums.
    """

    module: Callable
    shapes: list
    definition: Callable
    extra: tuple = ()
    weighted: bool = True

    def inputs(self, dtype=F64, noise=0.7):
        """Rows near those of the first input, so that something is left to learn."""
        generator = torch.Generator().manual_seed(1)
        base = torch.randn(N, D, generator=generator, dtype=F64)
        found = []
        for i, shape in enumerate(self.shapes):
            new = torch.randn(shape, generator=generator, dtype=F64)
            if shape[0] == N and shape[-1] == D:
                middle = [1] * (len(shape) - 2)
                new = base.view(N, *middle, D) + noise * i * new
            found.append(new.to(dtype).requires_grad_())
        return found


ROWS = {
    "contrastive": Row(
        lambda **o: fastcl.PairwiseContrastiveLoss(2.0, **o), [(N, D)] * 2,
        lambda a, b: oracle.pairwise_contrastive(a, b, EVEN, 2.0), (EVEN,),
    ),
    "contrastive squared": Row(
        lambda **o: fastcl.PairwiseContrastiveLoss(2.0, form="squared", **o), [(N, D)] * 2,
        lambda a, b: oracle.pairwise_contrastive(a, b, EVEN, 2.0, "squared"), (EVEN,),
    ),
    "triplet": Row(fastcl.TripletLoss, [(N, D)] * 3, oracle.triplet),
    "triplet euclidean": Row(
        lambda **o: fastcl.TripletLoss(1.0, distance="euclidean", normalize=False, **o),
        [(N, D)] * 3, lambda a, p, n: oracle.triplet(a, p, n, 1.0, "euclidean", False),
    ),
    "triplet scores": Row(
        lambda **o: fastcl.TripletScoreLoss(0.5, **o), [(N,), (N, 3)],
        lambda p, n: (0.5 - oracle.up(p)[:, None] + oracle.up(n)).clamp(min=0).sum(1),
    ),
    "lifted": Row(
        fastcl.LiftedStructureLoss, [(N, D)], lambda x: oracle.lifted_structure(x, LABELS),
        (LABELS,),
    ),
    "multi-similarity": Row(
        fastcl.MultiSimilarityLoss, [(N, D)], lambda x: oracle.multi_similarity(x, LABELS),
        (LABELS,),
    ),
    "multi-similarity all": Row(
        lambda **o: fastcl.MultiSimilarityLoss(epsilon=None, **o), [(N, D)],
        lambda x: oracle.multi_similarity(x, LABELS, epsilon=None), (LABELS,),
    ),
    "NCE": Row(
        fastcl.NCELoss, [(N,), (N, 3)], lambda p, n: oracle.nce(p, n, -1.3), (-1.3,),
    ),
    "captions": Row(
        lambda **o: Function(captions, **o), [(N,), (N, 3)],
        lambda p, n: oracle.captions(p, REFERENCE[:, 0], n, REFERENCE[:, 1:], 0.4),
    ),
    **{
        f"CMC {form} {count}": Row(
            lambda form=form, **o: fastcl.InBatchCMCLoss(0.5, form=form, **o), [(N, D)] * count,
            lambda *views, form=form: oracle.cmc(views, 0.5, form),
        )
        for form, count in (("softmax", 2), ("softmax", 3), ("nce", 3))
    },
    "SimCSE": Row(
        lambda **o: fastcl.SimCSELoss(0.2, **o), [(N, D)] * 2,
        lambda q, k: oracle.sim_cse(q, k, None, 0.2),
    ),
    "SimCSE hard": Row(
        lambda **o: fastcl.SimCSELoss(0.2, hard_negative_weight=1.5, **o), [(N, D)] * 3,
        lambda q, k, h: oracle.sim_cse(q, k, h, 0.2, 1.5),
    ),
    "PatchNCE of an image": Row(
        lambda **o: Function(patches, temperature=0.2, **o), [(N, D)],
        lambda q: oracle.info_nce(q, PATCHES[0], temperature=0.2),
    ),
    "PatchNCE": Row(
        lambda **o: Function(patches, temperature=0.2, **o), [(3, N, D)],
        lambda q: torch.cat(
            [oracle.info_nce(a, b, temperature=0.2) for a, b in zip(q, PATCHES, strict=True)]
        ),
    ),
    "PatchNCE of a batch": Row(
        lambda **o: Function(patches, temperature=0.2, negatives="batch", **o), [(3, N, D)],
        lambda q: oracle.info_nce(q.flatten(0, 1), PATCHES.flatten(0, 1), temperature=0.2),
    ),
    "2C": Row(
        lambda **o: Function(conditional, **o), [(N, D), (10, D)],
        lambda x, p: oracle.conditional(x, LABELS, p),
    ),
    "VIB": Row(
        lambda **o: Function(vib, **o), [(N, D)] * 2,
        lambda m, s: oracle.kl(m, (oracle.up(s) / 16).exp(), 0.0, 1.0),
    ),
    "MIB": Row(
        lambda **o: Function(mib, **o), [(N, D)] * 4,
        lambda m, s, n, t: 0.5 * (
            oracle.kl(m, (oracle.up(s) / 16).exp(), oracle.up(n), (oracle.up(t) / 16).exp())
            + oracle.kl(n, (oracle.up(t) / 16).exp(), oracle.up(m), (oracle.up(s) / 16).exp())
        ),
    ),
    **{
        f"domains {form}": Row(
            lambda form=form, **o: fastcl.DomainSupConLoss(form=form, **o), [(N, D), (9, D)],
            lambda x, s, form=form: oracle.domain_sup_con(x, s, LABELS, SOURCE, 0.1, form),
            (LABELS, SOURCE),
        )
        for form in ("out", "in")
    },
    "ZLPR": Row(
        fastcl.ZLPRLoss, [(N, 5)], lambda s: oracle.zlpr(s, TARGETS), (TARGETS,),
    ),
    **{
        f"CPC {negatives}": Row(
            lambda negatives=negatives, **o: Function(
                f.cpc, temperature=0.5, negatives=negatives, **o
            ),
            [(N, 3, 2, D)] * 2,
            lambda p, z, negatives=negatives: oracle.cpc(p, z, 0.5, negatives),
        )
        for negatives in fastcl.losses.predictive.NEGATIVES
    },
    "CPC of one time": Row(
        lambda **o: Function(f.cpc, normalize=True, **o), [(N, 2, D)] * 2,
        lambda p, z: oracle.cpc(
            *(torch.nn.functional.normalize(oracle.up(x), dim=2)[:, None] for x in (p, z))
        ),
    ),
    "CPC of pairs": Row(
        lambda **o: Function(f.cpc_bce, **o), [(N, 2, D)] * 2,
        lambda p, z: oracle.cpc_bce(p, z, EVEN), (EVEN,),
    ),
    **{
        f"Arora {form} {kind}": Row(
            lambda form=form, kind=kind, **o: fastcl.BlockContrastiveLoss(
                form=form, shared=kind == "shared", **o
            ),
            shapes, lambda a, p, n, form=form, kind=kind: oracle.arora(a, p, n, form, kind),
        )
        for form in ("logistic", "hinge")
        for kind, shapes in {
            "own": [(N, D)] * 3, "blocks": [(N, D), (N, 3, D), (N, 4, 3, D)],
            "shared": [(N, D), (N, 2, D), (9, 2, D)],
        }.items()
    },
    **{
        f"C-SWM {form}": Row(
            lambda form=form, **o: fastcl.CSWMLoss(form=form, margin=20.0, **o), [(N, 3, D)] * 3,
            lambda z, t, n, form=form: oracle.cswm(z, t, n, ORDER, form, 20.0), (ORDER,),
        )
        for form in ("paper", "repository")
    },
    **{
        f"TransE {distance}": Row(
            lambda distance=distance, **o: fastcl.TransELoss(2.0, distance=distance, **o),
            [(N, D)] * 5, lambda *x, distance=distance: oracle.transe(*x, 2.0, distance),
        )
        for distance in ("l1", "euclidean", "squared")
    },
    **{
        f"triplets {mining} {distance}": Row(
            lambda mining=mining, distance=distance, **o: fastcl.MinedTripletLoss(
                mining=mining, distance=distance, **o
            ),
            [(N, D)],
            lambda x, mining=mining, distance=distance: oracle.mined_triplet(
                x, LABELS, 0.2, mining, distance
            ),
            (LABELS,),
        )
        for mining in ("batch_hard", "batch_all", "semi_hard", "semi_hard_all")
        for distance in ("squared", "euclidean")
    },
}  # fmt: skip


def defined(row, inputs, weight=None):
    """Losses per sample, their sum and their mean."""
    found = row.definition(*inputs)
    sums, counts = found if isinstance(found, tuple) else (found, torch.ones_like(found))
    counts = counts.to(sums.dtype)
    weight = torch.ones_like(sums) if weight is None else weight
    sums = sums * weight
    mean = sums.sum() / (counts * weight).sum()
    return {"none": sums / counts.clamp(min=1), "sum": sums.sum(), "mean": mean}


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@pytest.mark.parametrize("name", ROWS)
def test_definition(name, monkeypatch):
    """Value, gradient, reductions and weights; in one block of anchors and in several."""
    row = ROWS[name]
    inputs = row.inputs()
    weights = [None]
    if row.weighted:
        weight = torch.rand(len(defined(row, inputs)["none"]), dtype=F64)
        weight[3] = 0.0
        weights.append(weight)
    for block in (2**19, 5 * N):
        monkeypatch.setattr(fastcl.losses.distances, "_BLOCK", {"cpu": block})
        for weight in weights:
            options = {} if weight is None else {"weight": weight}
            for reduction, theirs in defined(row, inputs, weight).items():
                ours = row.module(reduction=reduction)(*inputs, *row.extra, **options)
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
                pairs = zip(
                    gradients(ours.square().sum(), inputs),
                    gradients(theirs.square().sum(), inputs), strict=True,
                )  # fmt: skip
                for a, b in pairs:
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    if row.weighted:
        nothing = row.module()(*inputs, *row.extra, weight=0 * weight)
        assert float(nothing.detach()) == 0.0


# the constant of CMC's NCE has no gradient
@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("CMC nce")])
def test_gradcheck(name):
    row = ROWS[name]
    inputs = row.inputs()
    assert torch.autograd.gradcheck(lambda *x: row.module()(*x, *row.extra), inputs, fast_mode=True)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise", [0.05, 30.0])
def test_precision(name, dtype, noise):
    """At most twice plain PyTorch's error in the same dtype, plus round-off; strided inputs."""
    row = ROWS[name]
    inputs = [x.detach() for x in row.inputs(dtype, noise)]
    inputs = [x.mT.contiguous().mT if x.dim() > 1 else x for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    loss = row.module()(*inputs, *row.extra)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = defined(row, exact_inputs)["mean"]
    with oracle.in_precision(dtype):
        plain = defined(row, inputs)["mean"]
    round_off = 40 * torch.finfo(torch.float32).eps + 0.1 * torch.finfo(dtype).eps
    assert_no_worse(loss, plain, exact, round_off)
    usual = gradients(plain, inputs)
    for triple in zip(gradients(loss, inputs), usual, gradients(exact, exact_inputs), strict=True):
        assert triple[0].dtype == dtype
        assert torch.isfinite(triple[0]).all()
        assert_no_worse(*triple, 10 * round_off + 2 * torch.finfo(dtype).eps)


def assert_no_worse(ours, plain, exact, round_off):
    exact = exact.detach()
    error, usual = ((x.detach().double() - exact).norm() for x in (ours, plain))
    usual = usual if torch.isfinite(usual) else torch.tensor(0.0)
    tiny = torch.finfo(torch.float32).smallest_normal * math.sqrt(exact.numel())
    assert float(error) <= 2 * float(usual) + round_off * (float(exact.norm()) + tiny)


@pytest.mark.parametrize("name", ROWS)
def test_autocast_and_functional_gradient(name):
    row = ROWS[name]
    inputs = row.inputs(torch.float32)
    module = row.module()
    expected = module(*inputs, *row.extra)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(*inputs, *row.extra)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=0.03)
    first, *others = (x.detach() for x in inputs)
    gradient = torch.func.grad(lambda x: module(x, *others, *row.extra))(first)
    torch.testing.assert_close(gradient, gradients(expected, inputs[:1])[0])


@pytest.mark.parametrize("name", ROWS)
def test_module_travels_and_compiles_to_one_graph(name):
    row = ROWS[name]
    inputs = row.inputs(torch.float32)
    module = row.module()
    expected = module(*inputs, *row.extra)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*inputs, *row.extra), expected)
    assert "reduction='mean'" in repr(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs, *row.extra)
    torch.testing.assert_close(compiled, expected)
    pairs = zip(gradients(compiled, inputs), gradients(expected, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)

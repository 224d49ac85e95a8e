"""Drawn problems: what a loss accepts is finite and equals the oracle, the rest is refused by name.

Examples are the same in every run; ``make test-hostile`` draws many more, and other ones.
"""

import importlib.util
import inspect
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastcl
from fastcl import functional as f

_spec = importlib.util.spec_from_file_location("oracle", Path(__file__).parent / "oracle.py")
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

EXAMPLES = int(os.environ.get("FASTCL_HOSTILE_EXAMPLES") or 0)
drawn = settings(
    max_examples=EXAMPLES or 120,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),  # fixtures per test are meant, large examples too
)

LOSSES = ("nt_xent", "info_nce", "clip", "margin_softmax", "dcl", "debiased", "hard_negative",
          "siglip", "sup_con", "queue")  # fmt: skip
SMOOTHABLE = ("nt_xent", "info_nce", "clip")
F64 = torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def laid_out(x, layout):
    """The same numbers in another memory layout."""
    n, d = x.shape
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided rows":
        return torch.stack([x, torch.full_like(x, math.nan)], 1).flatten(0, 1)[::2]
    if layout == "strided features":
        return torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1)[:, ::2]
    if layout == "odd offset":  # rows that begin at no multiple of 16 bytes
        wide = torch.full((n, d + 3), math.nan, dtype=x.dtype)
        wide[:, 1 : d + 1] = x
        return wide[:, 1 : d + 1]
    return x


LAYOUTS = ("plain", "transposed", "strided rows", "strided features", "odd offset")


def features(n, d, kind, partner, generator):
    """[n, d] float64 of one kind of data, ``partner`` (if any) being the aligned batch."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    x = normal(n, d) if partner is None else partner + 0.3 * normal(n, d)
    if kind == "aligned" and partner is not None:
        x = partner.clone()
    elif kind == "cone":  # all rows nearly the same direction
        x = 10.0 + 0.1 * x
    elif kind == "duplicates":
        x = x[torch.arange(n) // 2]
    elif kind == "opposite" and partner is not None:
        x = -partner
    elif kind == "outlier":  # lengths over five orders of magnitude
        x = x * 10.0 ** torch.linspace(-3, 2, n, dtype=F64)[:, None]
    elif kind == "zero row":
        x = x.clone()
        x[n // 2] = 0.0
    elif kind == "constant":
        x = torch.ones(n, d, dtype=F64)
    return x


KINDS = ("random", "aligned", "cone", "duplicates", "opposite", "outlier", "zero row", "constant")


@st.composite
def problems(draw):
    name = draw(st.sampled_from(LOSSES))
    n = draw(st.sampled_from((1, 2, 3, 5, 8, 17, 33, 64, 65)))
    d = draw(st.sampled_from((1, 2, 3, 7, 8, 16, 31, 64, 129)))
    dtypes = draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from((None, *DTYPES))))
    lowest = 0.05 if name in ("debiased", "hard_negative") else 0.005  # exp overflows the oracle
    options = {"temperature": draw(st.floats(lowest, 2.0))}
    if draw(st.booleans()):
        options["ids"] = draw(st.sampled_from((1, 3, 2**40)))  # how many different ones
    if name in SMOOTHABLE and draw(st.booleans()):
        options["label_smoothing"] = draw(st.floats(0.0, 0.5))
    weighted = draw(st.booleans())
    return {
        "name": name, "n": n, "d": d, "dtypes": dtypes, "options": options, "weighted": weighted,
        "kind": draw(st.sampled_from(KINDS)),
        "layouts": draw(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))),
        "workspace": draw(st.sampled_from((0, 64))),
        "seed": draw(st.integers(0, 2**16)),
    }  # fmt: skip


def evaluate(function, p, leaves, extra):
    """Loss and gradients of a drawn problem for ``fastcl.functional`` or the oracle."""
    name, options = p["name"], dict(p["options"])
    ids, weight, queue = extra["ids"], extra["weight"], extra["queue"]
    ours = function is f
    if name == "sup_con":
        features = torch.stack(list(leaves), 1)
        call, arguments = function.sup_con, (features, extra["labels"])
        options.pop("ids", None)
    elif name == "queue":
        call, arguments = function.info_nce, (*leaves, queue)
        if "ids" in options:
            options |= {"ids": ids, "negative_ids": extra["queue_ids"]}
    else:
        call, arguments = getattr(function, name), tuple(leaves)
        if "ids" in options:
            options["ids"] = ids
    if ours:
        loss = call(*arguments, weight=weight if p["weighted"] else None, **options)
    else:
        losses = call(*arguments, **options)
        share = torch.ones(len(losses), dtype=losses.dtype)
        if p["weighted"]:
            share = weight.to(losses.dtype).repeat(len(losses) // len(weight))
        loss = (losses * share).sum() / share.sum()
    return loss, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def build(p):
    generator = torch.Generator().manual_seed(p["seed"])
    n, d = p["n"], p["d"]
    first = features(n, d, p["kind"], None, generator)
    second = features(n, d, p["kind"], first, generator)
    one, other = p["dtypes"][0], p["dtypes"][1] or p["dtypes"][0]
    if p["name"] == "sup_con":
        other = one
    raw = [
        laid_out(x.to(dtype), layout).detach()
        for x, dtype, layout in zip((first, second), (one, other), p["layouts"], strict=True)
    ]
    leaves = [x.requires_grad_() for x in raw]
    many = p["options"].get("ids", 1)

    def integers(count):
        return torch.randint(0, many, (count,), generator=generator)

    queue = torch.nn.functional.normalize(torch.randn(n + 5, d, generator=generator, dtype=F64))
    extra = {
        "ids": integers(n),
        "queue_ids": integers(n + 5),
        "labels": torch.randint(0, 3, (n,), generator=generator),
        "weight": torch.rand(n, generator=generator, dtype=torch.float32) + 0.1,
        "queue": queue.to(one),
    }
    return leaves, extra


@given(problems())
@drawn
def test_accepted_is_finite_and_true(p):
    # 1e12, the gradient's factor for a row of no length, fits neither fp16 nor a weighted sum of it
    assume(not (torch.float16 in p["dtypes"] and p["kind"] == "zero row"))
    fastcl.set_workspace(p["workspace"])
    leaves, extra = build(p)
    loss, grads = evaluate(f, p, leaves, extra)
    assert torch.isfinite(loss)
    for x, g in zip(leaves, grads, strict=True):
        assert g.shape == x.shape
        assert g.dtype == x.dtype
        assert torch.isfinite(g).all()

    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact_extra = {k: v.double() if v.is_floating_point() else v for k, v in extra.items()}
    exact, exact_grads = evaluate(oracle, p, exact_leaves, exact_extra)
    if not torch.isfinite(exact):  # a row without negatives, which fastcl counts as no loss
        assert p["name"] in ("dcl", "debiased", "hard_negative")
        assert p["n"] == 1 or "ids" in p["options"]
        return
    low = max((x.dtype for x in leaves), key=lambda t: torch.finfo(t).eps)
    with oracle.in_precision(low):
        plain, plain_grads = evaluate(oracle, p, leaves, extra)
    sharpness = 1 + 1 / p["options"]["temperature"]
    rounding = 20 * torch.finfo(torch.float32).eps + 0.1 * torch.finfo(low).eps
    close(loss, plain, exact, rounding * sharpness)
    lengths = [x.detach().double().norm(dim=1, keepdim=True).clamp_min(1e-12) for x in leaves]
    for x, length, g, usual, true in zip(
        leaves, lengths, grads, plain_grads, exact_grads, strict=True
    ):
        # in units of the unit rows' gradient, so that no row drowns another; what a row's score
        # can change by bounds the round-off, whatever cancels in the sum
        least = sharpness * rounding / p["n"] * length.numel() ** 0.5
        # a long row's gradient is small, down to the last bit its dtype has
        subnormal = torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
        least += subnormal * float(length.norm()) * p["d"] ** 0.5
        close(g * length, usual * length, true * length, 4 * torch.finfo(x.dtype).eps, least)


def close(ours, plain, exact, relative, absolute=0.0):
    """At most twice plain PyTorch's error where that is finite, plus round-off."""
    error, usual = (float((x.detach().double() - exact.detach()).norm()) for x in (ours, plain))
    usual = usual if math.isfinite(usual) else 0.0
    size = float(exact.detach().norm())
    assert error <= 2 * usual + relative * size + absolute + 1e-7 * min(1.0, relative), (
        error, usual, size,
    )  # fmt: skip


BREAKS = {
    "shape": ("z2", lambda z: z[:-1]),
    "width": ("z2", lambda z: z[:, :-1]),
    "vector": ("z1", lambda z: z[0]),
    "three dimensions": ("z1", lambda z: z[None]),
    "scalar": ("z2", lambda z: z[0, 0]),
    "empty": ("z1", lambda z: z[:0]),
    "no features": ("z1", lambda z: z[:, :0]),
    "integers": ("z1", lambda z: z.long()),
    "complex": ("z2", lambda z: z.to(torch.complex64)),
    "booleans": ("z2", lambda z: z > 0),
    "array": ("z1", lambda z: z.numpy()),
    "list": ("z2", lambda z: z.tolist()),
    "nothing": ("z1", lambda z: None),
    "device": ("z2", lambda z: z.to("meta")),
    "sparse": ("z1", lambda z: z.to_sparse()),
    "nested": ("z2", lambda z: torch.nested.nested_tensor([z[0], z[1]], layout=torch.jagged)),
    "nan": ("z1", lambda z: z.clone().index_fill_(0, torch.tensor([2]), math.nan)),
    "infinity": ("z2", lambda z: z.clone().index_fill_(0, torch.tensor([0]), -math.inf)),
}
BAD_OPTIONS = {
    "temperature": (0.0, -1.0, math.nan, math.inf, None, "warm", True, torch.ones(2),
                    torch.tensor(-1.0), torch.ones(1).to_sparse(), torch.tensor(1j)),
    "reduction": ("avg", None, 3),
    "ids": (torch.ones(6), torch.zeros(5).long(), torch.zeros(6, 1).long(), [1] * 6, 3,
            torch.zeros(6, dtype=torch.complex64), torch.ones(6).long().to_sparse()),
    "weight": (torch.ones(5), torch.ones(6).to_sparse(), torch.ones(6).long(),
               torch.ones(6, 1), "heavy", 1.0),
    "label_smoothing": (1.0, -0.1, math.nan, None, "some"),
}  # fmt: skip
PAIR_LOSSES = [name for name in LOSSES if name not in ("sup_con", "queue")]


@st.composite
def refusals(draw):
    name = draw(st.sampled_from(PAIR_LOSSES))
    known = [key for key in BAD_OPTIONS if key != "label_smoothing" or name in SMOOTHABLE]
    if draw(st.booleans()):
        return name, draw(st.sampled_from(sorted(BREAKS))), None, None
    key = draw(st.sampled_from(known))
    return name, None, key, draw(st.integers(0, len(BAD_OPTIONS[key]) - 1))


@given(refusals())
@drawn
def test_refused_by_name(case):
    name, broken, key, index = case
    inputs = {"z1": torch.randn(6, 4), "z2": torch.randn(6, 4)}
    options = {}
    first, second = list(inspect.signature(getattr(f, name)).parameters)[:2]
    if broken:
        which, change = BREAKS[broken]
        inputs[which] = change(inputs[which])
        expected = {"z1": (first, second), "z2": (second,)}[which]
    else:
        options[key] = BAD_OPTIONS[key][index]
        expected = (key,)
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(f, name)(*inputs.values(), **options)
    message = str(caught.value)
    assert message.startswith(tuple(f"{argument} " for argument in expected)), message
    assert "\n" not in message
    assert "expected" in message


def made_for_inference(x):
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("normalize", [True, False])
def test_inference_tensors_are_copied(normalize):
    """Keys, ids and a scale made under inference_mode: autograd refuses to save such a tensor."""
    query = torch.randn(6, 4, requires_grad=True)
    keys, ids = torch.randn(6, 4), torch.arange(6) // 2
    scale = torch.tensor(3.0)

    def both(keys, ids, scale):
        losses = [
            f.info_nce(query, keys, None, scale, ids=ids, normalize=normalize),
            f.siglip(query, keys, logit_scale=scale, ids=ids, normalize=normalize),
            f.sup_con(torch.cat([query, keys]), ids.repeat(2), normalize=normalize),
            f.pairwise_contrastive(query, keys, ids % 2),
            f.nce(query[:, 0], keys, scale),
        ]
        loss = torch.stack(losses).sum()
        return loss, *torch.autograd.grad(loss, query)

    given = [made_for_inference(x) for x in (keys, ids, scale)]
    for a, b in zip(both(*given), both(keys, ids, scale), strict=True):
        torch.testing.assert_close(a, b)
    with torch.inference_mode():
        assert f.info_nce(given[0], given[0], normalize=normalize).is_inference()


# kinds that torch itself cannot compare among them
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.uint64]
)
def test_ids_of_any_integer_kind(dtype):
    z = torch.randn(3, 6, 4)
    ids = torch.tensor([0, 1, 1, 0, 1, 0])
    for call in (
        lambda i: f.nt_xent(z[0], z[1], ids=i),
        lambda i: f.sup_con(z[0], i),
        lambda i: f.mined_triplet(z[0], i),
        lambda i: f.pairwise_contrastive(z[0], z[1], i),
        lambda i: f.cswm(z, z, z, i[:3]) if dtype != torch.bool else z.sum(),
    ):
        torch.testing.assert_close(call(ids.to(dtype)), call(ids))


def test_labels_that_differ_in_the_highest_bit():
    """Half of all int64 labels cannot be doubled, which tells two kinds of anchors apart."""
    z, small = torch.randn(2, 8, 4), torch.tensor([0, 1, 1, 2, 0, 2, 3, 3])  # one positive each
    labels = torch.tensor([7, 7 - 2**63, 2**62, -(2**62)])[small]
    for call in (
        lambda labels: f.sup_con(z[0], labels),
        lambda labels: f.sup_con(z[0], labels, form="in"),
        lambda labels: f.domain_sup_con(z[0], z[1], labels, labels.roll(1)),
        lambda labels: f.mined_triplet(z[0], labels),
        lambda labels: f.nt_xent(z[0], z[1], ids=labels),
    ):
        torch.testing.assert_close(call(labels), call(small))


@pytest.mark.parametrize("kind", ["sparse", "complex", "nested"])
def test_other_kinds_of_tensors_are_refused_by_name(kind):
    bad = {
        "sparse": lambda: torch.ones(2).to_sparse(),
        "complex": lambda: torch.tensor([1j, 1j]),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
    }[kind]()
    z = torch.ones(2, 2)
    for name, call in (
        ("log_noise", lambda: f.nce(z[:, 0], z, bad, 0.0)),
        ("negative_scores", lambda: f.nce(z[:, 0], bad, 0.0)),
        ("positive", lambda: f.block_contrastive(z, bad, z)),
        ("indices", lambda: f.memory_bank(z, bad, fastcl.MemoryBank(5, 2))),
        ("loss", lambda: f.mi_lower_bound(bad if bad.is_complex() else None, 5)),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name} .*expected"):
            call()


def test_scores_that_are_not_numbers():
    z = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="log_noise holds NaN or infinity 1 times"):
        f.nce(z[0, 0], z[0, 0], torch.tensor(math.nan))
    with pytest.raises(ValueError, match="logits holds NaN in 1 of its 2 sequences"):
        f.sequence_log_prob(z.index_fill(0, torch.tensor([1]), math.nan), torch.zeros(2, 3).long())

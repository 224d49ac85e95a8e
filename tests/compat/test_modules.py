"""The classes are plain modules: they pickle, copy, move, tell their options, compile to one graph,
take autocast and torch.func."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastcl.compat import info_nce, lightly, open_clip, supcontrast
from fastcl.compat.ranking import ranking_loss

LABELS = torch.tensor([0, 1, 0, 2, 3, 3, 3, 1])

# how each is made, and how it is called with two views
CALLS = {
    "lightly.NTXentLoss": (lambda: lightly.NTXentLoss(0.3), lambda m, a, b: m(a, b)),
    "lightly.NTXentLoss, bank": (
        lambda: lightly.NTXentLoss(memory_bank_size=(7, 6)),
        lambda m, a, b: m(a, b),
    ),
    "lightly.DCLLoss": (lambda: lightly.DCLLoss(0.3), lambda m, a, b: m(a, b)),
    "lightly.DCLWLoss": (lambda: lightly.DCLWLoss(0.3, 0.7), lambda m, a, b: m(a, b)),
    "info_nce.InfoNCE": (lambda: info_nce.InfoNCE(0.3, "sum"), lambda m, a, b: m(a, b)),
    "open_clip.ClipLoss": (
        lambda: open_clip.ClipLoss(True),
        lambda m, a, b: m(a, b, 5.0, -1.0),
    ),
    "open_clip.SigLipLoss": (
        lambda: open_clip.SigLipLoss(dist_impl="gather"),
        lambda m, a, b: m(a, b, 5.0, -1.0),
    ),
    "supcontrast.SupConLoss": (
        lambda: supcontrast.SupConLoss(0.3, "one"),
        lambda m, a, b: m(torch.stack([F.normalize(a), F.normalize(b)], 1), LABELS),
    ),
}
BY_LABEL = ("NTXentLoss", "SupConLoss", "ContrastiveLoss", "TripletMarginLoss")
NAMES = [*CALLS, *(f"pml.{name}" for name in BY_LABEL), "pml.SelfSupervisedLoss"]


@pytest.fixture(params=NAMES)
def loss(request, pml):
    """A module and how to call it."""
    library, name = request.param.split(".", 1)
    if library != "pml":
        make, call = CALLS[request.param]
        return make(), call
    if name == "SelfSupervisedLoss":
        return pml.SelfSupervisedLoss(pml.SupConLoss()), lambda m, a, b: m(a, b)
    return getattr(pml, name)(), lambda m, a, b: m(a, LABELS, ref_emb=b, ref_labels=LABELS + 1)


def views(dtype=torch.float32):
    return [torch.randn(8, 6, dtype=dtype, requires_grad=True) for _ in range(2)]


def gradients(value, inputs):
    return torch.autograd.grad(value, inputs)


def test_travels(loss):
    module, call = loss
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    z = views()
    expected = call(module, *z)
    for other in others:
        assert torch.equal(call(other, *z), expected)
    moved = copy.deepcopy(others[0]).to(torch.float64)
    assert call(moved, *views(torch.float64)).dtype == torch.float64
    assert module.state_dict().keys() == others[0].state_dict().keys()
    assert repr(module)


def test_tells_its_options(loss):
    module, call = loss
    if not hasattr(module, "get_config_dict"):
        pytest.skip("pytorch-metric-learning's classes have none")
    twin = type(module)(**module.get_config_dict())
    assert twin.get_config_dict() == module.get_config_dict()
    if not list(module.buffers()):
        z = views()
        assert torch.equal(call(twin, *z), call(module, *z))


def test_compiles_to_one_graph(loss):
    module, call = loss
    torch._dynamo.reset()
    twin, z = copy.deepcopy(module), views()
    expected = call(twin, *z)
    compiled = torch.compile(lambda a, b: call(module, a, b), fullgraph=True, backend="aot_eager")
    value = compiled(*z)
    torch.testing.assert_close(value, expected)
    for a, b in zip(gradients(value, z), gradients(expected, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast(loss):
    module, call = loss
    twin, z = copy.deepcopy(module), views()
    expected = call(twin, *z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = call(module, *z)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.03, atol=0.03)
    assert all(torch.isfinite(g).all() for g in gradients(value, z))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func(loss):
    module, call = loss
    if any(True for _ in module.buffers()):
        pytest.skip("writes to its bank")
    a, b = (z.detach() for z in views(torch.float64))

    def function(x):
        return call(module, x, b)

    x = a.clone().requires_grad_()
    (expected,) = gradients(function(x), x)
    torch.testing.assert_close(torch.func.grad(function)(a), expected)
    several = torch.stack([a, a + b])
    one_by_one = torch.stack([torch.func.grad(function)(z) for z in several])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(function))(several), one_by_one)


def test_ranking_compiles():
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    z = [*views(), views()[0]]

    def function(*z):
        return ranking_loss(
            z, directions=every, hardness_mode="all_negatives", hardness_strength=2.0
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    value, expected = compiled(*z), function(*z)
    torch.testing.assert_close(value, expected)
    for a, b in zip(gradients(value, z), gradients(expected, z), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

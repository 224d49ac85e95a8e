"""Every loss against its plain float64 definition: values, gradients, options, precisions."""

import copy
import importlib.util
import math
import pickle
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl import functional as f

_spec = importlib.util.spec_from_file_location("oracle", Path(__file__).parent / "oracle.py")
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

F64 = torch.float64
PAIR_LOSSES = (
    "nt_xent", "info_nce", "clip", "margin_softmax", "dcl", "debiased", "hard_negative", "siglip"
)  # fmt: skip
MODULES = {
    "nt_xent": fastcl.NTXentLoss,
    "info_nce": fastcl.InfoNCELoss,
    "clip": fastcl.CLIPLoss,
    "margin_softmax": fastcl.MarginSoftmaxLoss,
    "dcl": fastcl.DCLLoss,
    "debiased": fastcl.DebiasedLoss,
    "hard_negative": fastcl.HardNegativeLoss,
    "siglip": fastcl.SigLIPLoss,
}


def batch(n=37, d=20, dtype=F64, noise=0.7):
    z1 = torch.randn(n, d, dtype=F64)
    z2 = z1 + noise * torch.randn(n, d, dtype=F64)
    return z1.to(dtype).requires_grad_(), (3.0 * z2).to(dtype).requires_grad_()


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


def assert_equal_to(ours, theirs, inputs, rtol):
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=rtol)
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        difference = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)
        assert float(difference) < rtol


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("workspace", [0, 64])
def test_value_and_gradient(name, with_ids, workspace):
    fastcl.set_workspace(workspace)
    z1, z2 = batch()
    options = {"ids": torch.randint(0, 20, (37,))} if with_ids else {}
    ours = getattr(f, name)(z1, z2, **options)
    theirs = getattr(oracle, name)(z1, z2, **options).mean()
    assert_equal_to(ours, theirs, (z1, z2), 1e-11)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_reductions_and_weights(name):
    z1, z2 = batch()
    weight = torch.rand(37, dtype=F64)
    weight[3] = 0.0
    expected = getattr(oracle, name)(z1, z2)
    share = weight.repeat(len(expected) // 37)
    function = getattr(f, name)
    torch.testing.assert_close(function(z1, z2, reduction="none"), expected)
    torch.testing.assert_close(function(z1, z2, reduction="sum"), expected.sum())
    torch.testing.assert_close(function(z1, z2, weight=weight, reduction="none"), expected * share)
    ours = function(z1, z2, weight=weight)
    assert_equal_to(ours, (expected * share).sum() / share.sum(), (z1, z2), 1e-11)
    assert float(function(z1, z2, weight=0 * weight).detach()) == 0.0


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_label_smoothing(name, with_ids):
    z1, z2 = batch()
    options = {"ids": torch.randint(0, 20, (37,))} if with_ids else {}
    ours = getattr(f, name)(z1, z2, label_smoothing=0.1, **options)
    theirs = getattr(oracle, name)(z1, z2, label_smoothing=0.1, **options).mean()
    assert_equal_to(ours, theirs, (z1, z2), 1e-11)


def test_label_smoothing_is_cross_entropys():
    z1, z2 = batch()
    logits = torch.nn.functional.normalize(z1) @ torch.nn.functional.normalize(z2).T / 0.1
    theirs = torch.nn.functional.cross_entropy(logits, torch.arange(37), label_smoothing=0.2)
    assert_equal_to(f.info_nce(z1, z2, label_smoothing=0.2), theirs, (z1, z2), 1e-11)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_info_nce_with_negatives(own, with_ids, frozen):
    z1, z2 = batch()
    negatives = torch.randn(*([37, 5] if own else [60]), 20, dtype=F64, requires_grad=not frozen)
    options = {"label_smoothing": 0.1}
    if with_ids and not own:
        options |= {
            "ids": torch.randint(0, 20, (37,)), "negative_ids": torch.randint(0, 25, (60,))
        }  # fmt: skip
    ours = f.info_nce(z1, z2, negatives, **options)
    theirs = oracle.info_nce(z1, z2, negatives, **options).mean()
    assert_equal_to(ours, theirs, (z1, z2) if frozen else (z1, z2, negatives), 1e-11)


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("views", [0, 1, 2, 3])
def test_sup_con(form, views):
    shape = (30, 8) if views == 0 else (30, views, 8)
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    labels = torch.randint(0, 12, (30,))
    labels[0], labels[1] = 100, -5  # anchors that may have no positive
    ours = f.sup_con(x, labels, form=form)
    assert_equal_to(ours, oracle.sup_con(x, labels, form=form).mean(), (x,), 1e-11)
    none = f.sup_con(x, labels, form=form, reduction="none")
    torch.testing.assert_close(none, oracle.sup_con(x, labels, form=form))


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.005])
@pytest.mark.parametrize("noise", [1e-3, 1.0, 30.0])
def test_finite_and_close_in_every_precision(name, dtype, temperature, noise):
    if name in ("debiased", "hard_negative"):
        temperature = max(temperature, 0.05)  # the plain definition overflows float64 below
    z1, z2 = batch(dtype=dtype, noise=noise)
    loss = getattr(f, name)(z1, z2, temperature=temperature)
    grads = gradients(loss, (z1, z2))
    assert loss.dtype == torch.float32
    assert all(g.dtype == dtype and torch.isfinite(g).all() for g in grads)

    definition = getattr(oracle, name)
    exact_inputs = [z.detach().double().requires_grad_() for z in (z1, z2)]
    exact = definition(*exact_inputs, temperature=temperature).mean()
    with oracle.in_precision(dtype):
        plain = definition(z1, z2, temperature=temperature).mean()
    usual = gradients(plain, (z1, z2))
    # rounded operands leave part of a unit in the last place of a score, which is 1 / temperature
    round_off = 20 * torch.finfo(torch.float32).eps + 0.1 * torch.finfo(dtype).eps
    assert_no_worse(loss, plain, exact, round_off * (1 + 1 / temperature))
    for triple in zip(grads, usual, gradients(exact, exact_inputs), strict=True):
        assert_no_worse(*triple, round_off / temperature + 2 * torch.finfo(dtype).eps)


def assert_no_worse(ours, plain, exact, round_off):
    """Two references: at most twice plain PyTorch's error in the same dtype, plus round-off."""
    error, usual = ((x.detach().double() - exact).norm() for x in (ours, plain))
    usual = usual if torch.isfinite(usual) else torch.tensor(0.0)
    tiny = torch.finfo(ours.dtype).smallest_normal * math.sqrt(exact.numel())
    assert float(error) <= 2 * float(usual) + round_off * (float(exact.detach().norm()) + tiny)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip", "sup_con"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-9), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("workspace", [0, 64])
def test_tiny_losses_stay_accurate(name, dtype, tolerance, workspace):
    """Aligned views at temperature 0.013: the loss is about 1e-15 and must not cancel away."""
    fastcl.set_workspace(workspace)
    z1 = torch.nn.functional.normalize(torch.randn(48, 256, dtype=F64))
    z2 = z1 + 1e-3 * torch.randn(48, 256, dtype=F64)
    z1, z2 = (z.to(dtype).double().requires_grad_() for z in (z1, z2))
    low = [z.detach().to(dtype).requires_grad_() for z in (z1, z2)]
    if name == "sup_con":
        theirs = oracle.nt_xent(z1, z2, 0.013).mean()
        ours = f.sup_con(torch.stack(low, 1), temperature=0.013)
    else:
        theirs = getattr(oracle, name)(z1, z2, temperature=0.013).mean()
        ours = getattr(f, name)(*low, temperature=0.013)
    assert 0 < float(theirs) < 1e-12
    assert float(ours) == pytest.approx(float(theirs), rel=tolerance)
    for a, b in zip(gradients(ours, low), gradients(theirs, (z1, z2)), strict=True):
        assert float((a.double() - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("options", [{}, {"tau_plus": 0.0}], ids=str)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_batch_of_one(name, options):
    if options and name not in ("debiased", "hard_negative"):
        pytest.skip("has no tau_plus")
    z1, z2 = batch(1)
    loss = getattr(f, name)(z1, z2, **options)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(loss, (z1, z2)))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_learnable_temperature_is_exact(name):
    z1, z2 = batch()
    module = MODULES[name](learnable=True).double()
    temperature = module.temperature
    loss = module(z1, z2)
    (ours,) = gradients(loss, (module.logit_scale,))
    step = 1e-6
    function = getattr(f, name)
    options = {"bias": -10.0} if name == "siglip" else {}

    def at(log_scale):
        return float(function(z1, z2, temperature=math.exp(-log_scale), **options))

    middle = -math.log(float(temperature))
    slope = (at(middle + step) - at(middle - step)) / (2 * step)
    assert float(ours) == pytest.approx(slope, rel=1e-6)


def test_learnable_temperature_is_clamped_and_can_come_back():
    loss = fastcl.CLIPLoss(learnable=True, max_scale=100.0)
    with torch.no_grad():
        loss.logit_scale.fill_(9.0)
    assert float(loss.temperature.detach()) == pytest.approx(0.01)
    (gradient,) = gradients(loss(*batch(dtype=torch.float32)), (loss.logit_scale,))
    assert float(gradient) != 0.0


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip", "dcl", "hard_negative"])
def test_metrics(name):
    z1, z2 = batch(noise=3.0)
    loss, metrics = getattr(f, name)(z1, z2, return_metrics=True)
    torch.testing.assert_close(loss, getattr(f, name)(z1, z2))
    temperature = {"clip": 0.07, "hard_negative": 0.5}.get(name, 0.1)
    if name in ("info_nce", "clip"):
        s, positive, keep = oracle.both(z1, z2, temperature)
    else:
        s, positive, keep = oracle.two_views(z1, z2, temperature)
    hardest = s.masked_fill(~keep, float("-inf")).amax(1)
    expected = {
        "accuracy": (positive > hardest).double().mean(),
        "positive_similarity": positive.mean() * temperature,
        "negative_similarity": s[keep].mean() * temperature,
        "effective_negatives": (oracle.masked_lse(s, keep) - hardest).exp().mean(),
    }
    assert 0.05 < float(expected["accuracy"]) < 0.98
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key], value.detach())
    assert not any(v.requires_grad for v in metrics.values())


def test_sup_con_and_siglip_metrics():
    x, labels = torch.randn(40, 6, dtype=F64), torch.randint(0, 5, (40,))
    _, metrics = f.sup_con(x, labels, return_metrics=True)
    z = torch.nn.functional.normalize(x)
    s, other = z @ z.T, ~torch.eye(40, dtype=torch.bool)
    same = (labels[:, None] == labels) & other
    nearest = s.masked_fill(~other, -9.0).argmax(1)
    torch.testing.assert_close(metrics["positive_similarity"], s[same].mean())
    torch.testing.assert_close(metrics["negative_similarity"], s[other & ~same].mean())
    torch.testing.assert_close(metrics["accuracy"], (labels[nearest] == labels).double().mean())
    z1, z2 = batch()
    _, metrics = f.siglip(z1, z2, return_metrics=True)
    s, positive, keep = oracle.both(z1, z2, 1.0)
    torch.testing.assert_close(metrics["positive_similarity"], positive.mean().detach())
    torch.testing.assert_close(metrics["negative_similarity"], s[keep].mean().detach())


@pytest.mark.parametrize("name", MODULES)
def test_module_equals_function_and_travels(name):
    z1, z2 = batch()
    module = MODULES[name](reduction="none", return_metrics=False)
    expected = getattr(f, name)(z1, z2, reduction="none")
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(z1, z2), expected)
    assert "temperature=" in repr(module)


@pytest.mark.parametrize("name", [*PAIR_LOSSES, "sup_con"])
def test_compiles_to_one_graph(name):
    z1, z2 = batch(dtype=torch.float32)
    if name == "sup_con":
        labels = torch.randint(0, 9, (37,))

        def function(a, b):
            return f.sup_con(torch.stack([a, b], 1), labels)
    else:
        function = getattr(f, name)
    compiled = torch.compile(function, fullgraph=True)
    assert_equal_to(compiled(z1, z2), function(z1, z2), (z1, z2), 1e-5)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_one_dynamic_graph_serves_every_batch_size(name):
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(getattr(f, name), fullgraph=True, dynamic=True, backend=count)
    for n in (16, 24, 40, 48, 56, 64, 72, 80, 88, 96):
        z1, z2 = batch(n, 8, torch.float32)
        assert_equal_to(compiled(z1, z2), getattr(f, name)(z1, z2), (z1, z2), 1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_autocast_keeps_the_loss_in_fp32(name):
    z1, z2 = batch(dtype=torch.float32)
    expected = getattr(f, name)(z1, z2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = getattr(f, name)(z1, z2)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=0.02)
    assert all(torch.isfinite(g).all() for g in gradients(loss, (z1, z2)))


def test_third_derivatives():
    z1, z2 = batch(4, 3)

    def first_derivative(a, b):
        value = f.nt_xent(a, b, 0.5).square()
        return torch.autograd.grad(value, (a, b), create_graph=True)

    assert torch.autograd.gradgradcheck(first_derivative, (z1, z2))


def test_second_derivatives():
    z1, z2 = batch(5, 3)
    assert torch.autograd.gradgradcheck(lambda a, b: f.nt_xent(a, b, 0.5), (z1, z2))
    queue = torch.randn(6, 3, dtype=F64)
    assert torch.autograd.gradgradcheck(lambda a, b: f.info_nce(a, b, queue, 0.5), (z1, z2))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_transforms():
    z1, z2 = (z.detach() for z in batch(6, 4))

    def loss(x):
        return f.nt_xent(x, z2, 0.5)

    def squared_gradient(x):
        return torch.func.grad(loss)(x).square().sum()

    x = z1.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(torch.func.grad(loss)(z1), first.detach())
    torch.testing.assert_close(torch.func.grad(squared_gradient)(z1), second)
    several = torch.randn(3, 6, 4, dtype=F64)
    one_by_one = torch.stack([torch.func.grad(loss)(z) for z in several])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(several), one_by_one)


def test_forward_mode_is_refused_not_zero():
    z1, z2 = (z.detach() for z in batch(6, 4))
    with pytest.raises(NotImplementedError, match="fastcl has no forward-mode derivatives"):
        torch.func.jvp(lambda x: f.nt_xent(x, z2), (z1,), (z1,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z1, z2)
        with pytest.raises(NotImplementedError, match="fastcl has no forward-mode derivatives"):
            f.nt_xent(dual, z2)


@pytest.mark.parametrize("name", sorted(n for n in fastcl.__all__ if n.endswith("Loss")))
def test_a_configuration_makes_the_same_loss(name):
    needed = {
        "MemoryBankLoss": (10, 4), "CMCLoss": (10, 4), "CPCLoss": (4, 5), "CPCBCELoss": (4, 5)
    }  # fmt: skip
    loss = getattr(fastcl, name)(*needed.get(name, ()), reduction="sum")
    for copied in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        again = type(copied)(**copied.get_config_dict())
        assert repr(again) == repr(loss)
        assert again.reduction == "sum"
        assert again.get_config_dict() == loss.get_config_dict()


def test_smoothing_over_no_negatives_is_exactly_nothing():
    """Sums of class sums leave round-off where nothing remains to be summed."""
    for seed in range(8):
        torch.manual_seed(seed)
        z1, z2 = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
        ids = torch.zeros(3, dtype=torch.long)
        for loss in (f.nt_xent, f.clip):
            value = loss(z1, z2, 1.0, ids=ids, label_smoothing=0.5)
            assert float(value.detach()) == 0.0
            assert all(not g.any() for g in torch.autograd.grad(value, (z1, z2)))

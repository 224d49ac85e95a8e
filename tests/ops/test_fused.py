"""Whole losses in one operator: derivatives, registration, and when losses take it."""

import pytest
import torch

import fastcl
from fastcl import functional as f
from fastcl.losses import common
from fastcl.ops import pair_softmax, preferred_pair_softmax
from fastcl.ops.fused import FORMS

F64 = torch.float64
LOSSES = {"nt_xent": "views", "info_nce": "rows", "clip": "both"}
FUSING = [
    name
    for name, backend in fastcl.backends().items()
    if not backend.unavailable and backend.fuses(150, 24, torch.float32)
]


def batch(n=19, d=8, dtype=torch.float32):
    a = torch.randn(n, d, dtype=F64)
    b = 3.0 * (a + 0.7 * torch.randn(n, d, dtype=F64))
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mean", [True, False])
def test_both_orders(form, mean):
    a, b = batch(5, 3, F64)
    scale = torch.tensor(2.5, dtype=F64, requires_grad=True)

    def loss(a, b, scale):
        return pair_softmax(a, b, scale, form=form, mean=mean)

    assert torch.autograd.gradcheck(loss, (a, b, scale))
    assert torch.autograd.gradgradcheck(loss, (a, b, scale))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, True]])
def test_opcheck(form, dtype, needs):
    a, b = (x.detach() for x in batch(6, 4, dtype))
    acc = F64 if dtype == F64 else torch.float32
    scale = torch.tensor(2.0, dtype=acc)
    for tensor, needed in zip((a, b, scale), needs, strict=True):
        tensor.requires_grad_(needed)
    static = (form, True, 1e-12)
    arguments = (a, b, scale, *static, needs, dtype)
    torch.library.opcheck(torch.ops.fastcl.pair_softmax.default, arguments)
    _, *saved = (x.detach() for x in torch.ops.fastcl.pair_softmax(*arguments))
    grad = torch.tensor(0.5, dtype=acc, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fastcl.pair_softmax_backward.default,
        (grad, a, b, scale, *static, *saved, needs),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """The forms in which losses took the operator."""
    taken = []

    def record(*arguments, **options):
        loss = preferred_pair_softmax(*arguments, **options)
        if loss is not None:
            taken.append(options["form"])
        return loss

    monkeypatch.setattr(common, "preferred_pair_softmax", record)
    return taken


def derivatives(name, inputs, upstream, **options):
    """A loss, its gradients, and those of their squares."""
    a, b, temperature = inputs
    loss = getattr(f, name)(a, b, temperature=temperature, **options)
    first = torch.autograd.grad(upstream * loss, inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    return [loss.detach(), *(g.detach() for g in (*first, *second))]


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("workspace", [0, 64])
def test_whole_and_composed_losses_agree(backend, name, reduction, workspace, calls):
    """Several blocks, a temperature that learns, an upstream gradient that is not 1."""
    fastcl.set_workspace(workspace)
    inputs = (*batch(150, 24), torch.tensor(0.2, requires_grad=True))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with fastcl.use_backend("chunked"):
        theirs = derivatives(name, exact, -3.0, reduction=reduction)
    assert calls == []
    with fastcl.use_backend(backend):
        ours = derivatives(name, inputs, -3.0, reduction=reduction)
    assert calls == [LOSSES[name]]
    close(ours, theirs, 1e-4)


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("name", LOSSES)
def test_only_the_plain_loss_is_taken_whole(backend, name, calls):
    a, b = batch()
    options = (
        {"ids": torch.arange(19)}, {"weight": torch.ones(19)}, {"label_smoothing": 0.1},
        {"normalize": False}, {"reduction": "none"}, {"return_metrics": True},
    )  # fmt: skip
    with fastcl.use_backend(backend):
        for chosen in options:
            getattr(f, name)(a, b, **chosen)
        torch.func.grad(lambda x: getattr(f, name)(x, b.detach()))(a.detach())
        assert calls == []
        getattr(f, name)(a, b)
    assert calls == [LOSSES[name]]


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("form", FORMS)
def test_what_needs_no_gradient_gets_none(backend, form):
    """One side, the other, or the scale alone; and a graph may be walked twice."""

    def gradients(*needed):
        torch.manual_seed(1)
        inputs = [x.detach() for x in (*batch(), torch.tensor(4.0))]
        wanted = [inputs[i].requires_grad_() for i in needed]
        with fastcl.use_backend(backend):
            loss = pair_softmax(*inputs, form=form)
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        again = torch.autograd.grad(loss, wanted)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        return dict(zip(needed, again, strict=True))

    everything = gradients(0, 1, 2)
    for needed in ((0,), (1,), (2,), (0, 1)):
        for position, gradient in gradients(*needed).items():
            close([gradient], [everything[position]], 1e-6)


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_graph_is_walked_twice(backend, dtype):
    """Gradients are scaled in place where nobody walks again, and never before."""
    a, b = batch(dtype=dtype)
    with fastcl.use_backend(backend):
        loss = 2.5 * pair_softmax(a, b, 4.0, form="both")
    loss.backward(retain_graph=True)
    once = a.grad.clone(), b.grad.clone()
    loss.backward()
    for x, first in zip((a, b), once, strict=True):
        assert x.grad.dtype == dtype
        close([x.grad], [2 * first], 1e-7)
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    (2.5 * pair_softmax(*exact, 4.0, form="both")).backward()
    close(once, [x.grad for x in exact], {4: 1e-5, 2: 1e-2}[dtype.itemsize])


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scaler_finds_what_fp16_could_not_hold(backend, dtype):
    """The gradient of 2^12 pairs' mean is too small for fp16 until it is multiplied."""
    a, b = batch(4096, 4, dtype)
    with fastcl.use_backend(backend):
        (2.0**16 * pair_softmax(a, b, 0.01, form="rows")).backward()
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    (2.0**16 * pair_softmax(*exact, 0.01, form="rows")).backward()
    close([a.grad, b.grad], [x.grad for x in exact], 2e-2)


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("form", FORMS)
def test_compiles_to_one_graph(backend, form):
    a, b = batch()
    scale = torch.tensor(3.0, requires_grad=True)

    def loss(a, b, scale):
        return 2.0 * pair_softmax(a, b, scale, form=form)

    with fastcl.use_backend(backend):
        expected = loss(a, b, scale)
        value = torch.compile(loss, fullgraph=True)(a, b, scale)
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        close(
            torch.autograd.grad(value, (a, b, scale)),
            torch.autograd.grad(expected, (a, b, scale)),
            1e-6,
        )


def test_errors():
    a, b = batch()
    with pytest.raises(ValueError, match="form is 'columns'; expected one of"):
        pair_softmax(a, b, 1.0, form="columns")
    with pytest.raises(ValueError, match=r"b .*; expected shape \(19, 8\), the shape of a"):
        pair_softmax(a, b[:5], 1.0, form="rows")
    with (
        fastcl.use_backend("chunked"),
        pytest.raises(RuntimeError, match="chunked: does not implement pair_softmax"),
    ):
        pair_softmax(a, b, 1.0, form="rows")

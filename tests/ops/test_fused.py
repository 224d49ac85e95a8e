"""Whole losses in one operator: derivatives, registration, and when losses take it."""

from functools import partial, wraps
from types import SimpleNamespace

import pytest
import torch

import fastcl
from fastcl import functional as f
from fastcl.losses import sigmoid, softmax, towers
from fastcl.ops import pair_sigmoid, pair_softmax
from fastcl.ops.fused import FORMS

F64 = torch.float64
OPERATORS = {form: partial(pair_softmax, form=form) for form in FORMS}
OPERATORS |= {"sigmoid": pair_sigmoid, "sigmoid as is": partial(pair_sigmoid, normalize=False)}
TRACED = (*FORMS, "sigmoid")  # the other one is a constant away
LOSSES = {"nt_xent": "views", "info_nce": "rows", "clip": "both", "siglip": "sigmoid"}
FUSING = [
    name
    for name, backend in fastcl.backends().items()
    if not backend.unavailable and backend.fuses(150, 24, torch.float32)
]


@pytest.fixture(autouse=True)
def offered(request):
    """A backend may take one kind of loss whole and leave the other to the primitives."""
    values = getattr(request.node, "callspec", SimpleNamespace(params={})).params
    form = values.get("form") or LOSSES.get(values.get("name"), "views")
    op = "pair_softmax" if form in FORMS else "pair_sigmoid"
    if "backend" in values and op not in fastcl.backends()[values["backend"]].ops:
        pytest.skip(f"{values['backend']} has no {op}")


def batch(n=19, d=8, dtype=torch.float32):
    a = torch.randn(n, d, dtype=F64)
    b = 3.0 * (a + 0.7 * torch.randn(n, d, dtype=F64))
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def inputs_of(form, *size, dtype=torch.float32):
    """What an operator takes: two batches, a scale, and of the sigmoid a bias."""
    scalars = (2.5,) if form in FORMS else (2.5, -1.5)
    acc = F64 if dtype == F64 else torch.float32
    scalars = (torch.tensor(x, dtype=acc, requires_grad=True) for x in scalars)
    return (*batch(*size, dtype=dtype), *scalars)


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < tolerance


@pytest.mark.parametrize("form", OPERATORS)
@pytest.mark.parametrize("mean", [True, False])
def test_both_orders(form, mean):
    inputs = inputs_of(form, 5, 3, dtype=F64)
    loss = partial(OPERATORS[form], mean=mean)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("form", TRACED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
@pytest.mark.parametrize(
    "needs", [[True] * 4, [True, False, False, True], [False, True, True, False]], ids=str
)
def test_opcheck(form, dtype, needs):
    inputs = [x.detach() for x in inputs_of(form, 6, 4, dtype=dtype)]
    needs = needs[: len(inputs)]
    for tensor, needed in zip(inputs, needs, strict=True):
        tensor.requires_grad_(needed)
    name, static = "pair_softmax", (form, True, 1e-12)
    if form == "sigmoid":
        name, static = "pair_sigmoid", static[1:]
    arguments = (*inputs, *static, needs, dtype)
    operator = getattr(torch.ops.fastcl, name).default
    torch.library.opcheck(operator, arguments)
    _, *saved = (x.detach() for x in operator(*arguments))
    grad = torch.tensor(0.5, dtype=inputs[2].dtype, requires_grad=True)
    torch.library.opcheck(
        getattr(torch.ops.fastcl, f"{name}_backward").default,
        (grad, *inputs, *static, *saved, needs),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """The forms in which losses took an operator."""
    taken = []

    def recording(operator):
        @wraps(operator)
        def record(*arguments, **options):
            taken.append(options.get("form", "sigmoid"))
            return operator(*arguments, **options)

        return record

    for room in (softmax, towers):
        monkeypatch.setattr(room, "pair_softmax", recording(pair_softmax))
    monkeypatch.setattr(sigmoid, "pair_sigmoid", recording(pair_sigmoid))
    return taken


def derivatives(name, inputs, upstream, **options):
    """A loss, its gradients, and those of their squares."""
    scalars = dict(zip(("temperature", "bias"), inputs[2:], strict=False))
    loss = getattr(f, name)(*inputs[:2], **scalars, **options)
    first = torch.autograd.grad(upstream * loss, inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    return [loss.detach(), *(g.detach() for g in (*first, *second))]


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("workspace", [0, 64])
def test_whole_and_composed_losses_agree(backend, name, reduction, workspace, calls):
    """Several blocks, scalars that learn, an upstream gradient that is not 1."""
    fastcl.set_workspace(workspace)
    a, b, _, *bias = inputs_of(LOSSES[name], 150, 24)
    inputs = (a, b, torch.tensor(0.2, requires_grad=True), *bias)
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
        {"ids": torch.arange(19)}, {"weight": torch.ones(19)}, {"reduction": "none"},
        {"return_metrics": True},
        *([{"label_smoothing": 0.1}, {"normalize": False}] if name != "siglip" else []),
    )  # fmt: skip
    with fastcl.use_backend(backend):
        for chosen in options:
            getattr(f, name)(a, b, **chosen)
        torch.func.grad(lambda x: getattr(f, name)(x, b.detach()))(a.detach())
        assert calls == []
        getattr(f, name)(a, b)
    assert calls == [LOSSES[name]]


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["sigmoid as is"])
def test_rows_as_they_are(backend, dtype, form, calls):
    """Lengths from 0.1 to 10 in strided rows: whatever divides by them shows."""
    lengths = torch.logspace(-1, 1, 150, dtype=F64)[:, None]
    a, b = (torch.nn.functional.normalize(x.detach()) * lengths for x in batch(150, 24, F64))
    inputs = [x.repeat(1, 2).to(dtype)[:, ::2].requires_grad_() for x in (a, b.flip(0))]
    with fastcl.use_backend("chunked"):
        exact = [x.detach().double().requires_grad_() for x in inputs]
        theirs = derivatives("siglip", exact, 2.0, normalize=False)
    with fastcl.use_backend(backend):
        ours = derivatives("siglip", inputs, 2.0, normalize=False)
    assert calls == ["sigmoid"]
    close(ours, theirs, 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("form", OPERATORS)
def test_what_needs_no_gradient_gets_none(backend, form):
    """One side, the other, or a scalar alone; and a graph may be walked twice."""

    def gradients(*needed):
        torch.manual_seed(1)
        inputs = [x.detach() for x in inputs_of(form)]
        wanted = [inputs[i].requires_grad_() for i in needed]
        with fastcl.use_backend(backend):
            loss = OPERATORS[form](*inputs)
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        again = torch.autograd.grad(loss, wanted)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        return dict(zip(needed, again, strict=True))

    count = len(inputs_of(form))
    everything = gradients(*range(count))
    for needed in (*((i,) for i in range(count)), (0, 1)):
        for position, gradient in gradients(*needed).items():
            close([gradient], [everything[position]], 1e-6)


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("form", ["both", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_graph_is_walked_twice(backend, form, dtype):
    """Gradients are scaled in place where nobody walks again, and never before."""
    inputs = inputs_of(form, dtype=dtype)
    with fastcl.use_backend(backend):
        loss = -2.5 * OPERATORS[form](*inputs)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in inputs]
    loss.backward()
    assert [x.grad.dtype for x in inputs] == [x.dtype for x in inputs]
    close([x.grad for x in inputs], [2 * first for first in once], 1e-7)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    (-2.5 * OPERATORS[form](*exact)).backward()
    close(once, [x.grad for x in exact], 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scaler_finds_what_fp16_could_not_hold(backend, dtype):
    """The gradient of 4096 pairs' mean is too small for fp16 until it is multiplied."""
    inputs = batch(4096, 4, dtype)
    with fastcl.use_backend(backend):
        (2.0**16 * pair_softmax(*inputs, 0.01, form="rows")).backward()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    (2.0**16 * pair_softmax(*exact, 0.01, form="rows")).backward()
    close([x.grad for x in inputs], [x.grad for x in exact], 2e-2)


@pytest.mark.parametrize("backend", FUSING)
@pytest.mark.parametrize("form", TRACED)
def test_compiles_to_one_graph(backend, form):
    inputs = inputs_of(form)

    def loss(*inputs):
        return 2.0 * OPERATORS[form](*inputs)

    with fastcl.use_backend(backend):
        expected = loss(*inputs)
        value = torch.compile(loss, fullgraph=True)(*inputs)
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), 1e-6)


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

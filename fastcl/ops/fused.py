"""A whole loss in one operator: softmax over aligned pairs, from features to a number.

Normalisation, log-sum-exp over the negatives, softplus(log-sum-exp - positive), reduction, and the
gradients of both inputs and of the scale, which the forward forms already: they differ from those
of any other upstream by a factor, so the backward multiplies and sweeps nothing. Small batches are
little else than calls, and this is one call where the primitives take a dozen.

It is optional: a backend that offers it says when it is the better choice
(:attr:`~fastcl.ops.registry.Backend.fuses`), and losses compose the primitives otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import as_scalar, check_same_shape, precision_of
from .library import cast_gradients, define, differentiate, dispatch, traced
from .normalize import EPS
from .registry import Call, accumulator, find, stored_gradient

FORMS = ("views", "rows", "both")


def pair_softmax(
    a: Tensor, b: Tensor, scale: float | Tensor, *, form: str, mean: bool = True
) -> Tensor:
    """Loss of classifying each row's partner among negatives, scores being scaled cosines.

    Args:
        a, b: [N, D], any float dtypes; row i of one belongs to row i of the other.
        scale: inverse temperature, a number or a 0-dim tensor (differentiable).
        form: who is classified among whom. ``"views"``: all 2N rows among each other, but for the
            row itself. ``"rows"``: rows of ``a`` among rows of ``b``. ``"both"``: the average of
            that and of rows of ``b`` among rows of ``a``.
        mean: over 2N rows or N pairs; else the sum.

    Returns:
        The loss [] in fp32 (fp64 where products are). Rows shorter than 1e-12 are divided by that.
        NaN and infinity pass through. Second derivatives take N x N memory.

    Raises:
        TypeError, ValueError: not float matrices of one shape on one device; an unknown form.
        RuntimeError: no usable backend offers it.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; expected one of {FORMS}")
    check_same_shape(a, b, "a", "b")
    return _take(a, b, scale, form, mean, precision_of(a, b, None))


def preferred_pair_softmax(
    a: Tensor, b: Tensor, scale: float | Tensor, *, form: str, mean: bool, names: tuple[str, str]
) -> Tensor | None:
    """:func:`pair_softmax`, or ``None`` where no backend would rather take the loss whole.

    ``names``: of ``a`` and ``b`` in errors.
    """
    check_same_shape(a, b, *names)
    precision = precision_of(a, b, None)
    backend = find(Call("pair_softmax", a.device.type, precision))
    n, d = a.shape
    if backend is None or not backend.fuses(n, d, precision):
        return None
    return _take(a, b, scale, form, mean, precision)


def _take(a, b, scale, form: str, mean: bool, precision: torch.dtype) -> Tensor:
    scale = as_scalar(scale, "scale", a, precision)
    wanted = torch.is_grad_enabled()
    needs = [wanted and t.requires_grad for t in (a, b, scale)]
    return _op(a, b, scale, form, mean, EPS, needs, precision)[0]


def _forward(a, b, scale, form, mean, eps, needs, precision):
    return dispatch(
        "pair_softmax", "pair_softmax", a, precision, a, b, scale, form, mean, eps, needs
    )


def _forward_fake(a, b, scale, form, mean, eps, needs, precision):
    loss = a.new_empty((), dtype=accumulator(precision))
    gradients = (
        x.new_empty(x.shape if needed else (0,), dtype=stored_gradient(x, precision))
        for x, needed in zip((a, b, scale), needs, strict=True)
    )
    return loss, *gradients


def _setup(ctx, inputs, output):
    a, b, scale, *static, _ = inputs
    gradients = output[1:]
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, scale, *gradients)
    ctx.static = static


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    a, b, scale, *gradients = ctx.saved_tensors
    form, mean, eps, needs = ctx.static
    again = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
    if again or traced(grad):
        scaled = _gradient_op(grad, a, b, scale, form, mean, eps, *gradients, needs)
    else:  # nobody sees them again: no second copy
        scaled = [g.mul_(grad) if n else g for g, n in zip(gradients, needs, strict=True)]
    return (*cast_gradients(scaled, (a, b, scale), ctx.needs_input_grad[:3]), *[None] * 5)


def _backward(grad, a, b, scale, form, mean, eps, grad_a, grad_b, grad_scale, needs):
    gradients = (grad_a, grad_b, grad_scale)
    return tuple(g * grad if n else g.clone() for g, n in zip(gradients, needs, strict=True))


def _backward_fake(grad, a, b, scale, form, mean, eps, grad_a, grad_b, grad_scale, needs):
    return tuple(torch.empty_like(g) for g in (grad_a, grad_b, grad_scale))


_op = define(
    "pair_softmax",
    "Tensor a, Tensor b, Tensor scale, str form, bool mean, float eps, bool[] needs, "
    "ScalarType precision",
    "(Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)
_gradient_op = define(
    "pair_softmax_backward",
    "Tensor grad, Tensor a, Tensor b, Tensor scale, str form, bool mean, float eps, Tensor grad_a, "
    "Tensor grad_b, Tensor grad_scale, bool[] needs",
    "(Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    # the saved gradients are functions of the inputs, and the formula treats them so
    **differentiate(reference.pair_softmax_gradients, needs_at=-1),
)

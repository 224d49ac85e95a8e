"""Whole losses in one operator: softmax or sigmoid over aligned pairs, from features to a number.

Normalisation, log-sum-exp over the negatives, softplus(log-sum-exp - positive), reduction, and the
gradients of all inputs, which the forward forms already: they differ from those of any other
upstream by a factor, so the backward multiplies and sweeps nothing. Small batches, on GPUs those of
thousands of rows, are little else than calls, and this is one where the primitives take a dozen.
The sigmoid loss gains at every size: no sum precedes its gradient, so that one sweep forms both,
with three products of N x N x D for the primitives' four.

They are optional: a backend that offers one says when it is the better choice
(:attr:`~fastcl.ops.registry.Backend.fuses`), and losses compose the primitives otherwise.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from . import reference
from .checks import as_scalar, check_same_shape, precision_of
from .library import cast_gradients, define, differentiate, dispatch, traced
from .normalize import EPS
from .registry import Call, accumulator, fuses, stored_gradient

FORMS = ("views", "rows", "both")


def fuses_pairs(op: str, a: Tensor, b: Tensor) -> bool:
    """Whether the backend that serves ``op``, one of the below, now would rather take it whole."""
    call = Call(op, a.device.type, precision_of(a, b, None), a.device.index)
    return fuses(call, *a.shape)


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
        RuntimeError: no usable backend offers it; see :func:`fuses_pairs`.
    """
    check_same_shape(a, b, "a", "b")
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; expected one of {FORMS}")
    precision = precision_of(a, b, None)
    scale = as_scalar(scale, "scale", a, precision)
    return _softmax_op(a, b, scale, form, mean, EPS, _needs(a, b, scale), precision)[0]


def pair_sigmoid(
    a: Tensor, b: Tensor, scale: float | Tensor, bias: float | Tensor, *, mean: bool = True,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Loss of telling which pairs of rows belong together, each pair by itself.

    With s_ij = scale * cosine + bias: the sum over i of softplus(-s_ii) + sum over j != i of
    softplus(s_ij) (Zhai et al. 2023, algorithm 1).

    Args:
        a, b: [N, D], any float dtypes; row i of one belongs to row i of the other.
        scale, bias: numbers or 0-dim tensors (differentiable).
        mean: over N rows (not N^2 pairs); else the sum.
        normalize: else rows are taken as they are, and inner products stand for cosines.

    Returns:
        As :func:`pair_softmax`.

    Raises:
        TypeError, ValueError: not float matrices of one shape on one device; a scale or bias that
            is not one number.
        RuntimeError: no usable backend offers it; see :func:`fuses_pairs`.
    """
    check_same_shape(a, b, "a", "b")
    precision = precision_of(a, b, None)
    scale = as_scalar(scale, "scale", a, precision)
    bias = as_scalar(bias, "bias", a, precision)
    eps = EPS if normalize else math.inf  # below which length rows keep it
    return _sigmoid_op(a, b, scale, bias, mean, eps, _needs(a, b, scale, bias), precision)[0]


def _needs(*inputs: Tensor) -> list[bool]:
    wanted = torch.is_grad_enabled()
    return [wanted and t.requires_grad for t in inputs]


# An operator takes its tensors, what is fixed, which tensors need a gradient, and the precision.


def _forward(op, *arguments):
    *inputs, precision = arguments
    return dispatch(op, op, inputs[0], precision, *inputs)


def _forward_fake(*arguments):
    *inputs, needs, precision = arguments
    loss = inputs[0].new_empty((), dtype=accumulator(precision))
    gradients = (
        x.new_empty(x.shape if needed else (0,), dtype=stored_gradient(x, precision))
        for x, needed in zip(inputs, needs, strict=False)
    )
    return loss, *gradients


def _setup(ctx, inputs, output):
    *inputs, needs, _ = inputs
    count, gradients = len(needs), output[1:]
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:count], *gradients)
    ctx.static = inputs[count:], needs


def _autograd(gradient_op, ctx, grad, *_):
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    static, needs = ctx.static
    count, saved = len(needs), ctx.saved_tensors
    tensors, gradients = saved[:count], saved[count:]
    again = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
    if again or traced(grad):
        scaled = gradient_op(grad, *tensors, *static, *gradients, needs)
    elif grad.device.type == "cpu" and grad.item() == 1.0:  # loss.backward()
        scaled = gradients
    else:  # nobody sees them again: no second copy
        scaled = [g.mul_(grad) if n else g for g, n in zip(gradients, needs, strict=True)]
    cast = cast_gradients(scaled, tensors, ctx.needs_input_grad[:count])
    return (*cast, *[None] * (len(static) + 2))


def _backward(*arguments):
    grad, *_, needs = arguments
    gradients = arguments[-1 - len(needs) : -1]
    return tuple(g * grad if n else g.clone() for g, n in zip(gradients, needs, strict=True))


def _backward_fake(*arguments):
    return tuple(torch.empty_like(g) for g in arguments[-1 - len(arguments[-1]) : -1])


_softmax_gradient_op = define(
    "pair_softmax_backward",
    "Tensor grad, Tensor a, Tensor b, Tensor scale, str form, bool mean, float eps, Tensor grad_a, "
    "Tensor grad_b, Tensor grad_scale, bool[] needs",
    "(Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    # the saved gradients are functions of the inputs, and the formula treats them so
    **differentiate(reference.pair_softmax_gradients, needs_at=-1),
)
_softmax_op = define(
    "pair_softmax",
    "Tensor a, Tensor b, Tensor scale, str form, bool mean, float eps, bool[] needs, "
    "ScalarType precision",
    "(Tensor, Tensor, Tensor, Tensor)",
    partial(_forward, "pair_softmax"),
    _forward_fake,
    setup_context=_setup,
    backward=partial(_autograd, _softmax_gradient_op),
)
_sigmoid_gradient_op = define(
    "pair_sigmoid_backward",
    "Tensor grad, Tensor a, Tensor b, Tensor scale, Tensor bias, bool mean, float eps, "
    "Tensor grad_a, Tensor grad_b, Tensor grad_scale, Tensor grad_bias, bool[] needs",
    "(Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    **differentiate(reference.pair_sigmoid_gradients, needs_at=-1),
)
_sigmoid_op = define(
    "pair_sigmoid",
    "Tensor a, Tensor b, Tensor scale, Tensor bias, bool mean, float eps, bool[] needs, "
    "ScalarType precision",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    partial(_forward, "pair_sigmoid"),
    _forward_fake,
    setup_context=_setup,
    backward=partial(_autograd, _sigmoid_gradient_op),
)

"""Rows of unit length and the cosines of paired rows, in the accumulator's dtype.

The unit rows stay fp32 for 16-bit inputs: a backend rounds them when it forms products, while the
positive's score and the gradient's radial part, where cancellation happens, keep fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import check_eps, check_features, check_same_shape
from .library import define, differentiate, dispatch
from .registry import accumulator

EPS = 1e-12  # as in torch.nn.functional.normalize


def l2_normalize(x: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Rows divided by their Euclidean length, or by ``eps`` where they are shorter.

    Args:
        x: [N, D], any float dtype.
        eps: smallest length.

    Returns:
        Unit rows [N, D] and the factor [N] each was multiplied with (undifferentiated), both
        fp32 (fp64 for fp64 inputs). The gradient comes in ``x``'s dtype.

    Raises:
        TypeError, ValueError: ``x`` is no float matrix; eps not positive.
    """
    check_features(x, "x")
    check_eps(eps)
    return _normalize_op(x, eps, x.dtype)


def l2_normalize_pair(a: Tensor, b: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor, Tensor]:
    """Two aligned batches as unit rows, one below the other, and the cosine of each pair.

    What two views of a batch need before any loss, in one pass over memory.

    Args:
        a, b: [N, D], any float dtypes.
        eps: smallest length.

    Returns:
        Unit rows [2N, D], cosines [N] and factors [2N] (undifferentiated) in fp32 (fp64 when
        both inputs are).

    Raises:
        TypeError, ValueError: not float matrices of one shape on one device; eps not positive.
    """
    check_same_shape(a, b, "a", "b")
    check_eps(eps)
    return _pair_op(a, b, eps, torch.promote_types(a.dtype, b.dtype))


def _normalize(x, eps, precision):
    return dispatch("l2_normalize", "l2_normalize", x, precision, x, eps)


def _normalize_fake(x, eps, precision):
    acc = accumulator(precision)
    return x.new_empty(x.shape, dtype=acc), x.new_empty(x.shape[0], dtype=acc)


def _normalize_setup(ctx, inputs, output):
    x, eps, precision = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, *output)
    ctx.static = (eps, precision)


def _normalize_autograd(ctx, grad, _):
    x, y, factors = ctx.saved_tensors
    return _normalize_gradient(grad, x, y, factors, *ctx.static), None, None


def _normalize_backward(grad, x, y, factors, eps, precision):
    return dispatch("l2_normalize", "l2_normalize_backward", x, precision, grad, x, y, factors, eps)


def _normalize_backward_fake(grad, x, y, factors, eps, precision):
    return x.new_empty(x.shape)


def _gradient(grad, x, y, factors, eps):
    # y and factors are functions of x, and the formula treats them so
    return (reference.normalize_gradient(grad, x, eps),)


def _pair(a, b, eps, precision):
    return dispatch("l2_normalize", "l2_normalize_pair", a, precision, a, b, eps)


def _pair_fake(a, b, eps, precision):
    n, d = a.shape
    shapes = ((2 * n, d), (n,), (2 * n,))
    return tuple(a.new_empty(shape, dtype=accumulator(precision)) for shape in shapes)


def _pair_setup(ctx, inputs, output):
    a, b, eps, precision = inputs
    rows, _, factors = output
    ctx.mark_non_differentiable(factors)
    ctx.save_for_backward(a, b, rows, factors)
    ctx.static = (eps, precision)


def _pair_autograd(ctx, grad_rows, grad_cosines, _):
    a, b, rows, factors = ctx.saved_tensors
    gradients = _pair_gradient(grad_rows, grad_cosines, a, b, rows, factors, *ctx.static)
    return (*gradients, None, None)


def _pair_backward(grad_rows, grad_cosines, a, b, rows, factors, eps, precision):
    return dispatch(
        "l2_normalize", "l2_normalize_pair_backward", a, precision,
        grad_rows, grad_cosines, a, b, rows, factors, eps,
    )  # fmt: skip


def _pair_backward_fake(grad_rows, grad_cosines, a, b, rows, factors, eps, precision):
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _pair_gradients(grad_rows, grad_cosines, a, b, rows, factors, eps):
    return reference.normalize_pair_gradients(grad_rows, grad_cosines, a, b, eps)


_normalize_op = define(
    "l2_normalize",
    "Tensor x, float eps, ScalarType precision",
    "(Tensor, Tensor)",
    _normalize,
    _normalize_fake,
    setup_context=_normalize_setup,
    backward=_normalize_autograd,
)
_normalize_gradient = define(
    "l2_normalize_backward",
    "Tensor grad, Tensor x, Tensor y, Tensor factors, float eps, ScalarType precision",
    "Tensor",
    _normalize_backward,
    _normalize_backward_fake,
    **differentiate(_gradient),
)
_pair_op = define(
    "l2_normalize_pair",
    "Tensor a, Tensor b, float eps, ScalarType precision",
    "(Tensor, Tensor, Tensor)",
    _pair,
    _pair_fake,
    setup_context=_pair_setup,
    backward=_pair_autograd,
)
_pair_gradient = define(
    "l2_normalize_pair_backward",
    "Tensor grad_rows, Tensor grad_cosines, Tensor a, Tensor b, Tensor rows, Tensor factors, "
    "float eps, ScalarType precision",
    "(Tensor, Tensor)",
    _pair_backward,
    _pair_backward_fake,
    **differentiate(_pair_gradients),
)

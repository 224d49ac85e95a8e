"""Rows of unit length, with their gradient, in the accumulator's dtype.

The unit rows stay fp32 for 16-bit inputs: a backend rounds them when it forms products, while the
positive's score and the gradient's radial part, where cancellation happens, keep fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import check_features
from .library import backend, define, differentiate
from .registry import accumulator

_OPS = torch.ops.fastcl


def l2_normalize(x: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Rows divided by their Euclidean length, or by ``eps`` where they are shorter.

    Args:
        x: [N, D], any float dtype.
        eps: smallest length, as in ``torch.nn.functional.normalize``.

    Returns:
        Unit rows [N, D] and the factor [N] each was multiplied with (undifferentiated), both
        fp32 (fp64 for fp64 inputs). The gradient comes in ``x``'s dtype.

    Raises:
        TypeError, ValueError: ``x`` is no float matrix.
    """
    check_features(x, "x")
    return _OPS.l2_normalize(x, eps, x.dtype)


def _normalize(x, eps, precision):
    with backend("l2_normalize", x, precision) as implementation:
        return implementation.l2_normalize(x, eps, precision)


def _normalize_fake(x, eps, precision):
    acc = accumulator(precision)
    return x.new_empty(x.shape, dtype=acc), x.new_empty(x.shape[0], dtype=acc)


def _normalize_setup(ctx, inputs, output):
    x, eps, precision = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, *output)
    ctx.static = (eps, precision)


def _normalize_autograd(ctx, grad, _):
    x, y, inverse = ctx.saved_tensors
    return _OPS.l2_normalize_backward(grad, x, y, inverse, *ctx.static), None, None


def _normalize_backward(grad, x, y, inverse, eps, precision):
    with backend("l2_normalize", x, precision) as implementation:
        return implementation.l2_normalize_backward(grad, x, y, inverse, eps, precision)


def _normalize_backward_fake(grad, x, y, inverse, eps, precision):
    return x.new_empty(x.shape)


def _gradient(grad, x, y, inverse, eps):
    # y and inverse are functions of x, and the formula treats them so
    return (reference.normalize_gradient(grad, x, eps),)


define(
    "l2_normalize",
    "Tensor x, float eps, ScalarType precision",
    "(Tensor, Tensor)",
    _normalize,
    _normalize_fake,
    setup_context=_normalize_setup,
    backward=_normalize_autograd,
)
define(
    "l2_normalize_backward",
    "Tensor grad, Tensor x, Tensor y, Tensor inverse, float eps, ScalarType precision",
    "Tensor",
    _normalize_backward,
    _normalize_backward_fake,
    **differentiate(_gradient),
)

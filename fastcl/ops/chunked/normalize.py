"""L2 normalisation of rows: linear in the input, so plain PyTorch suffices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import accumulator


def l2_normalize(x: Tensor, eps: float, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    acc = accumulator(precision)
    factors = torch.linalg.vector_norm(x, dim=1, dtype=acc).clamp_min_(eps).reciprocal_()
    return (x * factors[:, None]).contiguous(), factors


def _gradient(grad: Tensor, y: Tensor, factors: Tensor, eps: float) -> Tensor:
    # a row shorter than eps was divided by a constant: nothing radial to remove
    radial = torch.linalg.vecdot(grad, y).masked_fill_(factors >= 1.0 / eps, 0.0)
    return torch.addcmul(grad, y, radial[:, None], value=-1).mul_(factors[:, None])


def l2_normalize_backward(
    grad: Tensor, x: Tensor, y: Tensor, factors: Tensor, eps: float, precision: torch.dtype
) -> Tensor:
    return _gradient(grad, y, factors, eps).to(x.dtype).contiguous()


def l2_normalize_pair(a: Tensor, b: Tensor, eps: float, precision: torch.dtype):
    n, d = a.shape
    rows = a.new_empty(2 * n, d, dtype=accumulator(precision))
    factors = rows.new_empty(2 * n)
    for x, part in ((a, slice(0, n)), (b, slice(n, 2 * n))):
        norms = torch.linalg.vector_norm(x, dim=1, dtype=rows.dtype)
        factors[part] = norms.clamp_min_(eps).reciprocal_()
        torch.mul(x, factors[part, None], out=rows[part])
    return rows, torch.linalg.vecdot(rows[:n], rows[n:]), factors


def l2_normalize_pair_backward(
    grad_rows, grad_cosines, a, b, rows, factors, eps: float, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    n = a.shape[0]
    pull = grad_cosines[:, None]
    first = torch.addcmul(grad_rows[:n], rows[n:], pull)
    second = torch.addcmul(grad_rows[n:], rows[:n], pull)
    return (
        _gradient(first, rows[:n], factors[:n], eps).to(a.dtype).contiguous(),
        _gradient(second, rows[n:], factors[n:], eps).to(b.dtype).contiguous(),
    )

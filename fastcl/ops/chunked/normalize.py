"""L2 normalisation of rows: linear in the input, so plain PyTorch suffices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import accumulator


def l2_normalize(x: Tensor, eps: float, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    acc = accumulator(precision)
    inverse = torch.linalg.vector_norm(x, dim=1, dtype=acc).clamp_min_(eps).reciprocal_()
    return (x * inverse[:, None]).contiguous(), inverse


def l2_normalize_backward(
    grad: Tensor, x: Tensor, y: Tensor, inverse: Tensor, eps: float, precision: torch.dtype
) -> Tensor:
    # a row shorter than eps was divided by a constant: nothing radial to remove
    radial = torch.linalg.vecdot(grad, y).masked_fill_(inverse >= 1.0 / eps, 0.0)
    gradient = torch.addcmul(grad, y, radial[:, None], value=-1).mul_(inverse[:, None])
    return gradient.to(x.dtype).contiguous()

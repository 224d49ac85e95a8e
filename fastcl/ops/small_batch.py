"""Whole losses of small batches by one CUDA kernel: at most 2048 pairs of at most 256 features.

Normalisation, loss and all gradients are one cooperative launch, which reads nothing on the host
and can be captured in a CUDA graph. Its schedule depends on sizes and the device alone, so results
repeat bit for bit. Other problems are declined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import stored_gradient

_library = torch.library.Library("fastcl", "FRAGMENT")
_library.define(
    "_cuda_pair_softmax(Tensor a, Tensor b, Tensor scale, int form, bool mean, float eps,"
    " bool[] needs, int precision) -> (Tensor, Tensor, Tensor, Tensor)"
)

_FORMS = {"views": 0, "rows": 1, "both": 2}
_PRECISIONS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MOST, _WIDEST = 2048, 256
# KiB that a block can have, by compute capability (CUDA C++ Programming Guide, technical
# specifications); others have 99.
_SHARED = dict.fromkeys([(8, 0), (8, 7)], 163) | dict.fromkeys([(9, 0), (10, 0), (10, 3)], 227)


def fits(n: int, d: int, precision: torch.dtype, shared: int) -> bool:
    """Whether the kernel takes N pairs of D features where a block can have ``shared`` bytes."""
    padded = -(-d // 32) * 32
    needed = 192 * (padded * precision.itemsize + 16) + 3104  # rows, keys, what is known of them
    return n <= _MOST and d <= _WIDEST and needed <= shared


def fuses(n: int, d: int, precision: torch.dtype) -> bool:
    """Whether the kernel takes N pairs of D features on the present device."""
    capability = torch.cuda.get_device_capability()
    return fits(n, d, precision, 1024 * _SHARED.get(capability, 99))


def pair_softmax(
    a: Tensor, b: Tensor, scale: Tensor, form: str, mean: bool, eps: float, needs: list[bool],
    precision: torch.dtype,
):  # fmt: skip
    if not fuses(a.shape[0], a.shape[1], precision):
        return NotImplemented
    loss, *gradients = torch.ops.fastcl._cuda_pair_softmax(
        a, b, scale, _FORMS[form], mean, eps, needs, _PRECISIONS[precision]
    )
    inputs = zip(gradients, (a, b, scale), strict=True)
    return loss, *(g.to(stored_gradient(x, precision)) for g, x in inputs)

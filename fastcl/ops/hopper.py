"""Log-sum-exp and its gradient by the CUDA kernels for sm_90a: products in bf16 or fp16, D <= 256.

Any other problem is declined, and so are ids, key biases and maxima, for whoever comes next. The
schedule depends on sizes and the device alone, so results repeat bit for bit; nothing here waits
for the device, and every call can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PAIR = "Tensor own, Tensor other, Tensor scale, int[] skip"
_library = torch.library.Library("fastcl", "FRAGMENT")
for _schema in (
    "_cuda_logsumexp(Tensor queries, Tensor? keys, Tensor scale, int[] skip, bool columns)"
    " -> (Tensor, Tensor, Tensor)",
    "_cuda_gains(Tensor? grad_own, Tensor? own_sums, int own_count, Tensor? grad_other,"
    " Tensor? other_sums, int other_count, Tensor scale, Tensor offset)"
    " -> (Tensor, Tensor, Tensor)",
    f"_cuda_product({_PAIR}, Tensor own_gains, Tensor other_gains, Tensor offset, Tensor factor)"
    " -> Tensor",
    f"_cuda_mean({_PAIR}) -> (Tensor, Tensor, Tensor)",
):
    _library.define(_schema)

_OPS = torch.ops.fastcl
_WIDEST, _MOST = 256, 2**24  # csrc/cuda/pairing.h


def _declined(queries: Tensor, keys: Tensor | None, key_bias: Tensor | None, relation: str) -> bool:
    size = max(queries.shape[0], 0 if keys is None else keys.shape[0])
    wide = queries.shape[1] > _WIDEST or size > _MOST
    return wide or key_bias is not None or relation != "any"


def _rows(x: Tensor, precision: torch.dtype) -> Tensor:
    """Rows as the copy engine reads them: a multiple of 16 bytes wide, apart and into memory."""
    x = x.to(precision)
    missing = -x.shape[1] % 8
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    aligned = x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0
    return x if aligned and x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _unpad(x: Tensor, width: int) -> Tensor:
    return x if x.shape[1] == width else x[:, :width].contiguous()


def similarity_logsumexp(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima, save,
    precision,
):  # fmt: skip
    if _declined(queries, keys, key_bias, relation) or maxima or save == "exponentials":
        return NotImplemented
    scale, width = scale.float(), queries.shape[1]
    q = _rows(queries, precision)
    k = None if keys is None else _rows(keys, precision)
    none = scale.new_empty(0)
    if save == "mean_keys" and precision == torch.bfloat16:
        rows, mean, offset = _OPS._cuda_mean(q, k, scale, skip)
        return rows, none, none.clone(), none.clone(), _unpad(mean, width), offset
    rows, column_sums, offset = _OPS._cuda_logsumexp(q, k, scale, skip, columns)
    saved = none
    if save == "mean_keys":  # fp16 cannot hold exponentials that are not normalised yet
        own, other, unit = _OPS._cuda_gains(
            torch.ones_like(rows), rows, len(q), None, None, keys.shape[0], scale, offset
        )
        saved = _unpad(_OPS._cuda_product(q, k, scale, skip, own, other, offset, unit[0]), width)
    return rows, column_sums, none.clone(), none.clone(), saved, offset


def similarity_logsumexp_backward(
    grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip,
    rows, columns, saved, offset, save, needs, precision,
):  # fmt: skip
    if _declined(queries, keys, key_bias, relation):
        return NotImplemented
    need_queries, need_keys, need_scale, _ = needs
    scale, width = scale.float(), queries.shape[1]
    q = _rows(queries, precision)
    k = q if keys is None else _rows(keys, precision)
    own, other, unit = _OPS._cuda_gains(
        grad_rows.contiguous(), rows, len(q),
        None if grad_columns is None else grad_columns.contiguous(),
        None if grad_columns is None else columns, len(k), scale, offset,
    )  # fmt: skip
    if keys is None:  # W is symmetric: one product is the whole gradient
        other = own
    none = scale.new_empty(0)
    grad_queries, grad_keys, grad_scale = none, none.clone(), none.clone()
    if need_queries or need_scale:
        factor = unit[0] if need_scale else unit[1]
        product = _unpad(_OPS._cuda_product(q, k, scale, skip, own, other, offset, factor), width)
        if need_scale:
            inner = torch.linalg.vecdot(queries.float(), product).sum()
            grad_scale = inner * 0.5 if keys is None else inner
            product.mul_(scale)
        if need_queries:
            grad_queries = product
    if need_keys and keys is not None:
        back = [-offset for offset in skip]
        product = _OPS._cuda_product(k, q, scale, back, other, own, offset, unit[1])
        grad_keys = _unpad(product, width)
    return grad_queries, grad_keys, grad_scale, none.clone()

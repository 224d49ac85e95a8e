"""The compiled CPU backend: ``fastcl/_cpu*.so``, loaded when it is there, and its declaration.

Products are formed in fp32, or in bf16 where the processor multiplies bf16 pairs; fp16 inputs are
computed in fp32, fp64 is left to the PyTorch backends. Sums are fp32 within a tile and fp64 across
tiles. Every result is the same bit for bit at any number of threads.

The environment variable ``FASTCL_CPU_ISA`` forces a lower instruction set: ``baseline``, ``avx2``,
``avx512`` or ``avx512_bf16``.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from . import native
from .registry import OPS, Backend, workspace_bytes

_RELATIONS = {"any": 0, "same": 1, "different": 2}
_PHIS = {"softplus": 0, "relu": 1, "relu_squared": 2}
_FORMS = {"views": 0, "rows": 1, "both": 2}
_SAVES = {"nothing": 0, "mean_keys": 1, "exponentials": 2}

_PAIR = "Tensor queries, Tensor? keys, Tensor scale, Tensor? key_bias"
_RULE = "Tensor? query_ids, Tensor? key_ids, int relation, int[] skip"

# Codes stand for strings and dtypes: the stable ABI converts integers for nothing.
_library = torch.library.Library("fastcl", "FRAGMENT")
for _schema in (
    f"_cpu_logsumexp({_PAIR}, {_RULE}, bool columns, bool maxima, int save, bool bf16)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"_cpu_logsumexp_backward(Tensor grad_rows, Tensor? grad_columns, {_PAIR}, {_RULE},"
    " Tensor rows, Tensor columns, Tensor saved, Tensor offset, int save, bool[] needs, bool bf16)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    f"_cpu_sum({_PAIR}, Tensor? row_bias, {_RULE}, int phi, bool bf16) -> Tensor",
    f"_cpu_sum_backward(Tensor grad_rows, {_PAIR}, Tensor? row_bias, {_RULE}, int phi,"
    " bool[] needs, bool bf16) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"_cpu_topk({_PAIR}, {_RULE}, int k, Tensor? below, bool bf16) -> (Tensor, Tensor)",
    "_cpu_l2_normalize(Tensor x, float eps) -> (Tensor, Tensor)",
    "_cpu_l2_normalize_backward(Tensor grad, Tensor y, Tensor inverse, float eps, bool bf16)"
    " -> Tensor",
    "_cpu_l2_normalize_pair(Tensor a, Tensor b, float eps) -> (Tensor, Tensor, Tensor)",
    "_cpu_l2_normalize_pair_backward(Tensor grad_rows, Tensor grad_cosines, Tensor rows,"
    " Tensor inverse, float eps, bool bf16_a, bool bf16_b) -> (Tensor, Tensor)",
    "_cpu_pair_softmax(Tensor a, Tensor b, Tensor scale, int form, bool mean, float eps,"
    " bool[] needs, bool keep, bool bf16) -> (Tensor, Tensor, Tensor, Tensor)",
    "_cpu_pair_sigmoid(Tensor a, Tensor b, Tensor scale, Tensor bias, bool mean, float eps,"
    " bool[] needs, bool bf16) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "_cpu_exp2(Tensor x) -> Tensor",
    "_cpu_info() -> str",
    "_cpu_set_isa(str name) -> ()",
):
    _library.define(_schema)

_OPS = torch.ops.fastcl


def similarity_logsumexp(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima, save,
    precision,
):  # fmt: skip
    return _OPS._cpu_logsumexp(
        _stored(queries), _stored(keys), scale, key_bias, query_ids, key_ids,
        _RELATIONS[relation], skip, columns, maxima, _SAVES[save], precision == torch.bfloat16,
    )  # fmt: skip


def similarity_logsumexp_backward(
    grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip,
    rows, columns, saved, offset, save, needs, precision,
):  # fmt: skip
    return _OPS._cpu_logsumexp_backward(
        grad_rows, grad_columns, _stored(queries), _stored(keys), scale, key_bias, query_ids,
        key_ids, _RELATIONS[relation], skip, rows, columns, saved, offset, _SAVES[save], needs,
        precision == torch.bfloat16,
    )  # fmt: skip


def similarity_sum(
    queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi, precision
):
    return _OPS._cpu_sum(
        _stored(queries), _stored(keys), scale, key_bias, row_bias, query_ids, key_ids,
        _RELATIONS[relation], skip, _PHIS[phi], precision == torch.bfloat16,
    )  # fmt: skip


def similarity_sum_backward(
    grad_rows, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi,
    needs, precision,
):  # fmt: skip
    return _OPS._cpu_sum_backward(
        grad_rows, _stored(queries), _stored(keys), scale, key_bias, row_bias, query_ids, key_ids,
        _RELATIONS[relation], skip, _PHIS[phi], needs, precision == torch.bfloat16,
    )  # fmt: skip


def similarity_topk(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, k, below, precision
):
    return _OPS._cpu_topk(
        _stored(queries), _stored(keys), scale, key_bias, query_ids, key_ids,
        _RELATIONS[relation], skip, k, below, precision == torch.bfloat16,
    )  # fmt: skip


def l2_normalize(x: Tensor, eps: float, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    return _OPS._cpu_l2_normalize(_stored(x), eps)


def l2_normalize_backward(
    grad: Tensor, x: Tensor, y: Tensor, inverse: Tensor, eps: float, precision: torch.dtype
) -> Tensor:
    bf16 = x.dtype == torch.bfloat16
    return _OPS._cpu_l2_normalize_backward(_stored(grad), y, inverse, eps, bf16).to(x.dtype)


def l2_normalize_pair(a: Tensor, b: Tensor, eps: float, precision: torch.dtype):
    return _OPS._cpu_l2_normalize_pair(_stored(a), _stored(b), eps)


def l2_normalize_pair_backward(
    grad_rows, grad_cosines, a, b, rows, factors, eps: float, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    gradients = _OPS._cpu_l2_normalize_pair_backward(
        _stored(grad_rows), _stored(grad_cosines), rows, factors, eps,
        a.dtype == torch.bfloat16, b.dtype == torch.bfloat16,
    )  # fmt: skip
    return gradients[0].to(a.dtype), gradients[1].to(b.dtype)


def pair_softmax(a, b, scale, form, mean, eps, needs, precision):
    rows = 2 * a.shape[0] if form == "views" else a.shape[0]
    fits = 4 * rows * rows <= workspace_bytes()
    keep = fits and keeps_exponentials(rows, rows, a.shape[1], precision)
    return _OPS._cpu_pair_softmax(
        _stored(a), _stored(b), scale, _FORMS[form], mean, eps, needs, keep,
        precision == torch.bfloat16,
    )  # fmt: skip


def pair_sigmoid(a, b, scale, bias, mean, eps, needs, precision):
    return _OPS._cpu_pair_sigmoid(
        _stored(a), _stored(b), scale, bias, mean, eps, needs, precision == torch.bfloat16
    )


def _stored(x: Tensor | None) -> Tensor | None:
    """``x``, with float64 values rounded: they are read in fp32, bf16 or fp16."""
    return x.float() if x is not None and x.dtype == torch.float64 else x


# Keeping exponentials saves a product as wide as the features and costs a trip through memory per
# pair: from 512 to 4096 rows, keeping takes 1.1 to 1.3 times less at 128 features in fp32 and at
# 256 in bf16 (1.0 to 1.2), and up to 1.4 times more at half of that and less (python -m
# benchmarks.keeping).
_KEEP_WIDTH = {torch.float32: 96, torch.float16: 96, torch.bfloat16: 192}


def keeps_exponentials(n: int, m: int, d: int, precision: torch.dtype) -> bool:
    """Whether keeping exponentials, where the workspace allows it, is the faster choice."""
    return d >= _KEEP_WIDTH[precision]


def fuses(n: int, d: int, precision: torch.dtype) -> bool:
    """Whether a whole loss in one call is the better choice: no size has shown it the worse one."""
    return True


_unavailable = native.load("cpu", _OPS._cpu_info)
BACKEND = Backend(
    "cpu",
    sys.modules[__name__],
    ops=(*OPS, "pair_softmax", "pair_sigmoid"),
    devices=("cpu",),
    precisions=(torch.float32, torch.bfloat16, torch.float16),
    unavailable=_unavailable,
    detail="" if _unavailable else _OPS._cpu_info(),
    keeps_exponentials=keeps_exponentials,
    fuses=fuses,
)

"""The Triton backend: the operators as launches of ``fastcl.kernels``.

Products are formed in bf16 or fp16 for 16-bit precision, in TF32 for fp32: three TF32 products
per fp32 product, or one where ``torch.set_float32_matmul_precision`` allows it. Sums are fp32.
Results repeat bit for bit, nothing waits for the device, and every call can be captured in a CUDA
graph.

With ``TRITON_INTERPRET=1`` in the environment before the first import the kernels run on CPU
tensors, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from typing import Any

import torch
from torch import Tensor

from . import chunked
from .registry import OPS, Backend, Call, run, stored_gradient

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _unavailable() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _INTERPRETED and not (torch.backends.cuda.is_built() and torch.version.cuda):
        return "this torch has no CUDA"
    return ""


def _launch() -> Any:
    """Imported when an operator first runs: Triton takes a second, and nothing else needs it."""
    from ..kernels import launch

    return launch


def _on(tensor: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def similarity_logsumexp(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima, save,
    precision,
):  # fmt: skip
    launch = _launch()
    if _dense(queries, keys, precision):
        return chunked.similarity_logsumexp(
            queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima,
            save, precision,
        )  # fmt: skip
    with _on(queries):
        p = launch.Problem.of(
            queries, keys, scale, key_bias, None, query_ids, key_ids, relation, skip, precision
        )
        offset = p.new()
        width = queries.shape[1]
        none = p.new(0)
        if save == "mean_keys" and not columns and launch.mean_in_one_sweep(p):
            rows, row_max, saved = launch.logsumexp_and_mean(p, offset, maxima)
            return rows, none, row_max, none.clone(), launch.unpad(saved, width), offset
        rows, column_sums, row_max, column_max = launch.logsumexp(
            p, offset, keys is None, columns, maxima
        )
        saved = none.clone()
        if save == "mean_keys":
            saved = launch.unpad(launch.mean(p, rows, offset), width)
        elif save == "exponentials":  # recomputed instead; the offset says so
            saved = p.new(len(p.own), len(p.other))
            offset.fill_(float("nan"))
        return rows, column_sums, row_max, column_max, saved, offset


def _dense(queries: Tensor, keys: Tensor | None, precision: torch.dtype) -> bool:
    """Whether so few, so wide rows are better served by one dense product."""
    launch = _launch()
    pairs = queries.shape[0] * (queries.shape[0] if keys is None else keys.shape[0])
    wide = queries.shape[1] > launch.held_width(precision)
    return wide and pairs <= launch.configs.RULES["dense_pairs"]


def similarity_logsumexp_backward(
    grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip,
    rows, columns, saved, offset, save, needs, precision,
):  # fmt: skip
    launch = _launch()
    if _dense(queries, keys, precision):
        return chunked.similarity_logsumexp_backward(
            grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation,
            skip, rows, columns, saved, offset, save, needs, precision,
        )  # fmt: skip
    with _on(queries):
        p = launch.Problem.of(
            queries, keys, scale, key_bias, None, query_ids, key_ids, relation, skip, precision
        )
        symmetric = keys is None
        grads = [grad_rows] if grad_columns is None else [grad_rows, grad_columns]
        sides, unit = launch.gains(p, grads, [rows, columns][: len(grads)], offset)
        by_row = sides[0]
        by_column = by_row if symmetric else sides[1] if len(sides) > 1 else None
        return _gradients(
            p, queries, keys, unit, needs,
            own=launch.exponential_weights(by_row, by_column),
            other=launch.exponential_weights(by_column, by_row), offset=offset,
        )[:4]  # fmt: skip


def _gradients(
    p, queries, keys, unit, needs, *, own, other, offset, row_bias: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys, scale, key bias and row bias, fp32.

    Args:
        unit: [2], what the weights were divided by, and its product with the scale.
        own, other: forms of W with the queries, and with the keys, as own side.
    """
    launch = _launch()
    need_queries, need_keys, need_scale, need_bias = needs[:4]
    symmetric = keys is None
    width = queries.shape[1]
    whole = need_scale or row_bias  # scaled later: the product itself is needed first
    (product, grad_row_bias), (other_product, grad_bias) = launch.multiply_both(
        p, own, other, offset,
        [
            launch.Want(need_queries or whole, row_bias, unit[0] if whole else unit[1]),
            launch.Want(need_keys and not symmetric, need_bias, unit[0] if need_bias else unit[1]),
        ],
        symmetric,
    )  # fmt: skip
    none = p.new(0)
    grad_queries, grad_keys, grad_scale = none, none.clone(), none.clone()
    if need_queries or whole:
        product = launch.unpad(product, width)
        if need_scale:
            inner = torch.linalg.vecdot(queries.float(), product).sum()
            grad_scale = inner * 0.5 if symmetric else inner
        if whole:
            product.mul_(p.scale)
        if need_queries:
            grad_queries = product
    if need_keys and not symmetric:
        grad_keys = launch.unpad(other_product, width)
        if need_bias:
            grad_keys.mul_(p.scale)
    return grad_queries, grad_keys, grad_scale, grad_bias, grad_row_bias


def similarity_sum(
    queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi, precision
):
    launch = _launch()
    with _on(queries):
        p = launch.Problem.of(
            queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, precision
        )
        return launch.multiply(p, [launch.Weights(phi)], p.scale, None, False, True)[1]


def similarity_sum_backward(
    grad_rows, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi,
    needs, precision,
):  # fmt: skip
    launch = _launch()
    with _on(queries):
        p = launch.Problem.of(
            queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, precision
        )
        gain = launch.floats(grad_rows)
        form = f"d_{phi}"
        own = [launch.Weights(form, "own", own_gain=gain, wide=p.half)]
        other = [launch.Weights(form, "other", other_gain=gain, wide=p.half)]
        unit = torch.stack([torch.ones_like(p.scale), p.scale])
        if keys is not None:
            return _gradients(
                p, queries, keys, unit, needs, own=own, other=other, offset=p.scale,
                row_bias=needs[4],
            )  # fmt: skip
        both = [needs[0], needs[0], *needs[2:4]]
        grad_queries, grad_keys, *rest = _gradients(
            p, queries, queries, unit, both, own=own, other=other, offset=p.scale,
            row_bias=needs[4],
        )  # fmt: skip
        return (grad_queries.add_(grad_keys), p.new(0), *rest)


def similarity_topk(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, k, below, precision
):
    launch = _launch()
    if k > launch.configs.RULES["topk_largest"]:
        return chunked.similarity_topk(
            queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, k, below, precision
        )
    with _on(queries):
        p = launch.Problem.of(
            queries, keys, scale, key_bias, None, query_ids, key_ids, relation, skip, precision
        )
        return launch.largest(p, k, launch.floats(below))


def l2_normalize(x: Tensor, eps: float, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    with _on(x):
        return _launch().unit_rows(x, eps)


def l2_normalize_backward(
    grad: Tensor, x: Tensor, y: Tensor, factors: Tensor, eps: float, precision: torch.dtype
) -> Tensor:
    with _on(x):
        return _launch().unit_rows_backward(grad, x, y, factors, eps)


def l2_normalize_pair(a: Tensor, b: Tensor, eps: float, precision: torch.dtype):
    with _on(a):
        return _launch().unit_pairs(a, b, eps)


def l2_normalize_pair_backward(
    grad_rows, grad_cosines, a, b, rows, factors, eps: float, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    with _on(a):
        return _launch().unit_pairs_backward(
            grad_rows, grad_cosines, a, b, rows, factors, eps, [a.dtype, b.dtype]
        )


def pair_softmax(a, b, scale, form, mean, eps, needs, precision):
    """The primitives' launches one after the other, but for one kernel between log-sum-exps and
    gradients: on the host a step is one call, where autograd would be asked eight times."""
    launch, n = _launch(), len(a)
    views, both = form == "views", form == "both"
    scale = scale.float()
    with _on(a):
        rows, cosines, factors = launch.unit_pairs(a, b, eps)
    queries, keys, skip = (rows, None, [0, n, -n]) if views else (rows[:n], rows[n:], [0])
    problem = (queries, keys, scale, None, None, None, "any", skip)
    # whoever serves it: there may be a faster kernel than Triton's
    call = Call("similarity_logsumexp", a.device.type, precision, a.device.index)
    sums, columns, _, _, saved, offset = run(
        call, "similarity_logsumexp", *problem, both, False, "nothing", precision
    )
    grads = [torch.empty_like(x) for x in (sums, columns)]
    sides = list(zip((sums, columns), grads, strict=True))[: 2 if both else 1]
    if views:
        sides = [(sums[half], grads[0][half]) for half in (slice(n), slice(n, None))]
    share = 1.0 / ((n if mean else 1) * (len(sides) if mean or both else 1))
    with _on(a):
        loss, grad_cosines, by_scale = launch.classify(cosines, scale, sides, share)
    none = [loss.new_empty(0) for _ in range(3)]
    if not any(needs):
        return loss, *none
    need_a, need_b, need_scale = needs
    wanted = [need_a or need_b, False] if views else [need_a, need_b]
    *grad_units, grad_scale, _ = run(
        call, "similarity_logsumexp_backward", grads[0], grads[1] if both else None, *problem,
        sums, columns, saved, offset, "nothing", [*wanted, need_scale, False], precision,
    )  # fmt: skip
    if need_a or need_b:
        if not views:
            halves = zip(grad_units, wanted, strict=True)
            grad_units = [
                torch.cat([g if given else torch.zeros_like(queries) for g, given in halves])
            ]
        dtypes = [stored_gradient(x, precision) for x in (a, b)]
        with _on(a):
            gradients = launch.unit_pairs_backward(
                grad_units[0], grad_cosines, a, b, rows, factors, eps, dtypes
            )
        none[:2] = [g if given else x for g, given, x in zip(gradients, needs, none, strict=False)]
    if need_scale:
        none[2] = grad_scale + by_scale
    return loss, *none


def _detail() -> str:
    from importlib.metadata import version

    return f"triton {version('triton')}" + (", interpreted" if _INTERPRETED else "")


def _refuses(call: Call) -> str:
    if call.device != "cuda" or torch.cuda.get_device_capability(call.ordinal) >= (8, 0):
        return ""
    return "needs a GPU of compute capability 8.0 or newer"


_reason = _unavailable()
BACKEND = Backend(
    "triton",
    sys.modules[__name__],
    ops=(*OPS, "pair_softmax"),
    devices=("cuda", "cpu") if _INTERPRETED else ("cuda",),
    precisions=(torch.float32, torch.bfloat16, torch.float16),
    unavailable=_reason,
    detail="" if _reason else _detail(),
    refuses=_refuses,
    keeps_exponentials=lambda *_: False,
    fuses=lambda *_: True,
)

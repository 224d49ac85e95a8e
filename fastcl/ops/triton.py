"""The Triton backend: packs operands, launches the kernels of ``fastcl.kernels``, reduces slots.

Products are formed in bf16 or fp16 for 16-bit precision, in TF32 for fp32: three TF32 products
per fp32 product, or one where ``torch.set_float32_matmul_precision`` allows it. Sums are fp32.
Schedules are fixed, so results repeat bit for bit; nothing here waits for the device, and every
call can be captured in a CUDA graph.

With ``TRITON_INTERPRET=1`` in the environment before the first import the kernels run on CPU
tensors, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import chunked
from .registry import Backend, Call

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_LOG2E = math.log2(math.e)
_ROOM = 14  # binary orders of magnitude that weights are lifted by, so that fp16 can hold them


def _unavailable() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _INTERPRETED and not (torch.backends.cuda.is_built() and torch.version.cuda):
        return "this torch has no CUDA"
    return ""


@functools.cache
def _kernels() -> Any:
    """Triton is imported at the first use: it takes a second, and nothing else needs it."""
    from ..kernels import configs, normalize, product, sweep, topk

    class Kernels:
        pass

    found: Any = Kernels()
    found.configs, found.normalize, found.product = configs, normalize, product
    found.sweep, found.topk = sweep, topk
    return found


@functools.cache
def _device(index: int | None) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and multiprocessors; the interpreter is (0, 2)."""
    if index is None:
        return 0, 2
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _on(tensor: Tensor):
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _packed_width(d: int) -> int:
    """The next power of two up to 256, the next multiple of 64 beyond."""
    return max(16, 1 << (d - 1).bit_length()) if d <= 256 else 64 * _ceil(d, 64)


def _pack(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as the kernels read them; ``x`` itself where it already is so."""
    width = _packed_width(x.shape[1])
    if width == x.shape[1]:
        return x.to(dtype).contiguous()
    packed = x.new_zeros(x.shape[0], width, dtype=dtype)
    packed[:, : x.shape[1]] = x
    return packed


@dataclass
class _Side:
    """Packed rows of one side and what belongs to each of them."""

    rows: Tensor
    bias: Tensor | None
    ids: Tensor | None

    def __len__(self) -> int:
        return self.rows.shape[0]


@dataclass
class _Problem:
    """Two sides and the rule between them; ``flip`` exchanges their roles."""

    own: _Side
    other: _Side
    scale: Tensor
    relation: str
    skip: list[int]  # other index - own index

    @classmethod
    def of(
        cls, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, precision
    ) -> _Problem:
        q = _pack(queries, precision)
        k = q if keys is None else _pack(keys, precision)
        key_ids = query_ids if keys is None else key_ids

        def vector(x):
            return None if x is None else x.contiguous()

        return cls(
            _Side(q, _floats(row_bias), vector(query_ids)),
            _Side(k, _floats(key_bias), vector(key_ids)),
            scale.float(),
            relation,
            list(skip),
        )

    def flip(self) -> _Problem:
        offsets = [-offset for offset in self.skip]
        return _Problem(self.other, self.own, self.scale, self.relation, offsets)

    @property
    def width(self) -> int:
        return self.own.rows.shape[1]

    def new(self, *shape: int) -> Tensor:
        return self.scale.new_empty(shape)

    @property
    def held_width(self) -> int:
        """Rows up to this width are held, and multiplied in the tile; wider ones are streamed."""
        return _held_width(self.own.rows.dtype)

    @property
    def half(self) -> bool:
        return self.own.rows.dtype == torch.float16

    @property
    def precision(self) -> str:
        """How fp32 products are formed; 16-bit ones ignore it."""
        if self.own.rows.dtype != torch.float32:
            return "tf32"
        if _INTERPRETED:
            return "ieee"
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"

    def config(self, kernel: str):
        arch, _ = _device(self.scale.device.index if self.scale.is_cuda else None)
        bits = 8 * self.own.rows.element_size()
        return _kernels().configs.lookup(kernel, arch, bits, self.width, len(self.own))

    def splits(self, config) -> int:
        """How many programs share an own block, so that two waves fill the device."""
        _, processors = _device(self.scale.device.index if self.scale.is_cuda else None)
        blocks = _ceil(len(self.own), config.own)
        tiles = _ceil(len(self.other), config.other)
        return max(1, min(_ceil(2 * processors * config.programs, blocks), _ceil(tiles, 2)))

    def rule(self) -> dict[str, Any]:
        """The rule and the shape of a tile, as every kernel takes them."""
        offsets = self.skip + [0] * (3 - len(self.skip))
        return {
            "size_own": len(self.own), "size_other": len(self.other),
            "skip0": offsets[0], "skip1": offsets[1], "skip2": offsets[2],
            "SKIPS": len(self.skip), "RELATION": self.relation, "D": self.width,
            "PRECISION": self.precision,
            "EMULATE": _INTERPRETED and self.own.rows.dtype == torch.bfloat16,
        }  # fmt: skip

    def tile(self, config) -> dict[str, int]:
        block = self.width if self.width <= self.held_width else config.block_d
        return {"BD": block, "OWN": config.own, "OTHER": config.other, **config.options}


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _side_of_bias(p: _Problem) -> str:
    return "own" if p.own.bias is not None else "other" if p.other.bias is not None else "none"


def similarity_logsumexp(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima, save,
    precision,
):  # fmt: skip
    if _dense(queries, keys, precision):
        return chunked.similarity_logsumexp(
            queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima,
            save, precision,
        )  # fmt: skip
    with _on(queries):
        p = _Problem.of(
            queries, keys, scale, key_bias, None, query_ids, key_ids, relation, skip, precision
        )
        offset = p.new()
        width = queries.shape[1]
        none = p.new(0)
        if save == "mean_keys" and not columns and _mean_in_one_sweep(p):
            rows, row_max, saved = _logsumexp_and_mean(p, offset, maxima)
            return rows, none, row_max, none.clone(), _unpad(saved, width), offset
        rows, column_sums, row_max, column_max = _sweep(p, offset, keys is None, columns, maxima)
        saved = none.clone()
        if save == "mean_keys":
            saved = _unpad(_mean(p, rows, offset), width)
        elif save == "exponentials":  # recomputed instead; the offset says so
            saved = p.new(len(p.own), len(p.other))
            offset.fill_(float("nan"))
        return rows, column_sums, row_max, column_max, saved, offset


def _held_width(precision: torch.dtype) -> int:
    return _kernels().configs.RULES[f"held_width_{8 * precision.itemsize}"]


def _dense(queries: Tensor, keys: Tensor | None, precision: torch.dtype) -> bool:
    """Whether so few, so wide rows are better served by one dense product."""
    pairs = queries.shape[0] * (queries.shape[0] if keys is None else keys.shape[0])
    wide = queries.shape[1] > _held_width(precision)
    return wide and pairs <= _kernels().configs.RULES["dense_pairs"]


def _unpad(x: Tensor, width: int) -> Tensor:
    return x if x.shape[1] == width else x[:, :width].contiguous()


def _mean_in_one_sweep(p: _Problem) -> bool:
    """fp16 cannot hold 2^(score - offset), and wide rows no accumulator: they take two sweeps."""
    return not p.half and p.width <= p.held_width


def _sweep(p: _Problem, offset: Tensor, symmetric: bool, columns: bool, maxima: bool):
    kernels = _kernels()
    n, m = len(p.own), len(p.other)
    both = columns or symmetric
    config = p.config("sweep maxima" if maxima else "sweep")
    slots = max(1, kernels.configs.RULES["slot_bytes"] // (4 * m)) if both else n
    grouped = slots < _ceil(n, config.own)
    if grouped:  # a loop more, and registers for it
        config = p.config("sweep maxima")
    groups, splits = min(slots, _ceil(n, config.own)), p.splits(config)
    own_sum = p.new(splits, n)
    own_max = p.new(splits, n) if maxima else own_sum
    other_sum = p.new(groups, m) if both else own_sum
    other_max = p.new(groups, m) if both and maxima else own_sum
    if grouped:
        other_sum.zero_()
        if maxima:
            other_max.fill_(-1e30)
    bias = _side_of_bias(p)
    kernels.sweep.sweep[(groups, splits)](
        p.own.rows, p.other.rows, p.scale, p.other.bias, p.own.ids, p.other.ids,
        own_sum, other_sum, own_max, other_max, offset,
        REPEATS=config.fold, BIAS=bias, SYMMETRIC=symmetric, BOTH=both, MAXIMA=maxima,
        GROUPED=grouped, **p.rule(), **p.tile(config),
    )  # fmt: skip
    triangle = config.own if symmetric and not grouped else 0
    no_slots = (own_sum, own_max, 0)
    of_own, of_other = (own_sum, own_max, splits), (other_sum, other_max, groups)
    none = p.new(0)
    rows, row_max, _ = _finish(
        p, offset, of_own, of_other if symmetric else no_slots, maxima, triangle=triangle
    )
    if not columns or symmetric:
        return rows, none, row_max, none.clone()
    column_sums, column_max, _ = _finish(p.flip(), offset, no_slots, of_other, maxima)
    return rows, column_sums, row_max, column_max


def _finish(
    p: _Problem, offset: Tensor, own_slots, other_slots, maxima: bool, means=None, triangle: int = 0
):
    """Slots, each (sums, maxima, count), to log-sum-exps, maxima and softmax-weighted means."""
    config = p.config("finish")
    n = len(p.own)
    logsum, largest = p.new(n), p.new(n if maxima else 0)
    mean = p.new(0) if means is None else p.new(n, p.width)
    bias = _side_of_bias(p)
    _kernels().sweep.finish[(_ceil(n, config.own),)](
        p.own.rows, p.other.rows, p.scale, p.own.bias if bias == "own" else p.other.bias,
        p.own.ids, p.other.ids, own_slots[0], other_slots[0], own_slots[1], other_slots[1],
        means, offset, logsum, largest, mean, own_count=own_slots[2], other_count=other_slots[2],
        BIAS=bias, TRIANGLE=triangle, MAXIMA=maxima, MEAN=means is not None,
        **p.rule(), **p.tile(config),
    )  # fmt: skip
    return logsum, largest, mean


def _logsumexp_and_mean(p: _Problem, offset: Tensor, maxima: bool):
    """Log-sum-exp and softmax-weighted mean of the other rows from one sweep."""
    config = p.config("product")
    splits = p.splits(config)
    out, sums = p.new(splits, len(p.own), p.width), p.new(splits, len(p.own))
    tops = p.new(splits, len(p.own)) if maxima else sums
    _launch_product(
        p, config, splits, _Weights("exp"), offset=offset, out=out, row_sums=sums, tops=tops,
        maxima=maxima,
    )  # fmt: skip
    return _finish(p, offset, (sums, tops, splits), (sums, tops, 0), maxima, means=out)


def _mean(p: _Problem, logsum: Tensor, offset: Tensor) -> Tensor:
    """Softmax-weighted mean of the other rows, given the log-sum-exps."""
    empty = torch.isneginf(logsum)
    gain = torch.where(empty, 0.0, 2.0**_ROOM)
    shift = torch.where(empty, 0.0, logsum * _LOG2E)
    factor = torch.full_like(p.scale, 2.0**-_ROOM)
    weights = [_Weights("own", own_gain=gain, own_shift=shift)]
    return _multiply(p, weights, offset, factor)[0]


@dataclass
class _Weights:
    """What W is made of; see :mod:`fastcl.kernels.product`."""

    weight: str
    gain: str = "none"
    own_gain: Tensor | None = None
    other_gain: Tensor | None = None
    own_shift: Tensor | None = None
    other_shift: Tensor | None = None
    wide: bool = False  # W may leave the range of 16 bits and stays fp32

    def arguments(self, p: _Problem) -> dict[str, Any]:
        return {
            "own_bias": p.own.bias, "other_bias": p.other.bias, "own_gain": self.own_gain,
            "other_gain": self.other_gain, "own_shift": self.own_shift,
            "other_shift": self.other_shift, "own_ids": p.own.ids, "other_ids": p.other.ids,
            "OWN_BIAS": p.own.bias is not None, "OTHER_BIAS": p.other.bias is not None,
            "WEIGHT": self.weight, "GAIN": self.gain,
        }  # fmt: skip


def _launch_product(
    p: _Problem, config, splits: int, weights: _Weights, *, offset, factor=None, out=None,
    row_sums=None, tops=None, maxima: bool = False,
):  # fmt: skip
    grid = (_ceil(len(p.own), config.own), splits)
    _kernels().product.product[grid](
        p.own.rows, p.other.rows, p.scale, offset, factor, out=out, row_sums=row_sums, tops=tops,
        PRODUCT=out is not None, ROW_SUM=row_sums is not None, MAXIMA=maxima,
        FACTOR=factor is not None, WIDE=weights.wide,
        **weights.arguments(p), **p.rule(), **p.tile(config),
    )  # fmt: skip


def _add_slots(slots: Tensor, factor: Tensor | None = None) -> Tensor:
    """Slots [count, ...] added in order."""
    out = slots.new_empty(slots.shape[1:])
    _kernels().product.add_slots[(_ceil(out.numel(), 1024),)](
        slots, factor, out, slots.shape[0], out.numel(), FACTOR=factor is not None, BLOCK=1024
    )
    return out


def _multiply(
    p: _Problem, weights: list[_Weights], offset: Tensor, factor: Tensor | None,
    want_product: bool = True, want_sums: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """factor W k [N, D] and factor W 1 [N]; empty tensors for what is not wanted.

    ``weights`` are forms of the same W of which one is valid: launches of the others return.
    """
    if p.width > p.held_width and want_product:
        chunks = _weight_chunks(p, weights, offset)
        product, total = p.new(len(p.own), p.width), p.new(len(p.own) if want_sums else 0)
        for rows, w in chunks:
            product[rows] = _matmul(w, p.other.rows)
            if want_sums:
                total[rows] = w.sum(1, dtype=torch.float32)
        if factor is not None:
            product.mul_(factor)
            total.mul_(factor)
        return product, total
    config = p.config("product")
    splits = p.splits(config)
    n = len(p.own)
    out = p.new(splits, n, p.width) if want_product else None
    sums = p.new(splits, n) if want_sums else None
    for form in weights:
        _launch_product(
            p, config, splits, form, offset=offset, factor=factor if splits == 1 else None,
            out=out, row_sums=sums,
        )  # fmt: skip
    product = total = p.new(0)
    if out is not None:
        product = out[0] if splits == 1 else _add_slots(out, factor)
    if sums is not None:
        total = _add_slots(sums, factor)
    return product, total


def _weight_chunks(p: _Problem, weights: list[_Weights], offset: Tensor):
    """Own rows in chunks, as a slice, and W [rows, M] in the operands' dtype."""
    kernels = _kernels()
    config = p.config("weights")
    n, m = len(p.own), len(p.other)
    dtype = torch.float32 if weights[0].wide else p.own.rows.dtype
    size = torch.empty((), dtype=dtype).element_size() * m
    height = max(config.own, kernels.configs.RULES["chunk_bytes"] // size)
    height = min(n, config.own * (height // config.own))
    chunk = torch.empty(height, m, dtype=dtype, device=p.scale.device)
    for begin in range(0, n, height):
        rows = min(height, n - begin)
        for form in weights:
            kernels.product.write_weights[(_ceil(rows, config.own), _ceil(m, config.other))](
                p.own.rows, p.other.rows, p.scale, offset, out=chunk, begin=begin, rows=rows,
                **form.arguments(p), **p.rule(), **p.tile(config),
            )  # fmt: skip
        yield slice(begin, begin + rows), chunk[:rows]


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32; 16-bit operands keep fp32 sums."""
    if a.dtype != b.dtype:
        b = b.to(a.dtype)
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


@dataclass
class _Gains:
    """Per-row factors of the weights of one side, see ``kernels.product.gains``."""

    gain: Tensor
    shift: Tensor
    ratio: Tensor


def _gains(p: _Problem, grads: list[Tensor], logsums: list[Tensor], offset: Tensor):
    """Factors of rows (and columns), and the unit [2] the weights were divided by."""
    product = _kernels().product
    grads = [grad.contiguous() for grad in grads]
    last = len(grads) - 1
    programs = 16
    tops = p.new(2 * programs)
    product.largest_gradient[(programs,)](
        grads[0], logsums[0], grads[last], logsums[last], tops,
        grads[0].numel(), grads[last].numel() if last else 0, BLOCK=1024,
    )  # fmt: skip
    unit = p.new(2)
    sides = []
    for grad, logsum in zip(grads, logsums, strict=True):
        side = _Gains(*(torch.empty_like(logsum) for _ in range(3)))
        product.gains[(_ceil(grad.numel(), 1024),)](
            grad, logsum, tops, p.scale, offset, side.gain, side.shift, side.ratio, unit,
            grad.numel(), SLOTS=2 * programs, ROOM=_ROOM, BLOCK=1024,
        )  # fmt: skip
        sides.append(side)
    return sides, unit


def _exponential_weights(own: _Gains | None, other: _Gains | None) -> list[_Weights]:
    if own is not None and other is not None:
        return [
            _Weights("both_fixed", own_gain=own.ratio, other_gain=other.ratio),
            _Weights(
                "both_online", own_gain=own.gain, other_gain=other.gain, own_shift=own.shift,
                other_shift=other.shift,
            ),
        ]  # fmt: skip
    if own is not None:
        return [_Weights("own", own_gain=own.gain, own_shift=own.shift)]
    assert other is not None
    return [_Weights("other", other_gain=other.gain, other_shift=other.shift)]


def similarity_logsumexp_backward(
    grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip,
    rows, columns, saved, offset, save, needs, precision,
):  # fmt: skip
    if _dense(queries, keys, precision):
        return chunked.similarity_logsumexp_backward(
            grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation,
            skip, rows, columns, saved, offset, save, needs, precision,
        )  # fmt: skip
    with _on(queries):
        p = _Problem.of(
            queries, keys, scale, key_bias, None, query_ids, key_ids, relation, skip, precision
        )
        symmetric = keys is None
        grads = [grad_rows] if grad_columns is None else [grad_rows, grad_columns]
        sides, unit = _gains(p, grads, [rows, columns][: len(grads)], offset)
        by_row = sides[0]
        by_column = by_row if symmetric else sides[1] if len(sides) > 1 else None
        return _gradients(
            p, queries, keys, unit, needs,
            own=_exponential_weights(by_row, by_column),
            other=_exponential_weights(by_column, by_row), offset=offset,
        )[:4]  # fmt: skip


def _gradients(
    p: _Problem, queries, keys, unit, needs, *, own, other, offset, row_bias: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys, scale, key bias and row bias, fp32.

    Args:
        unit: [2], what the weights were divided by, and its product with the scale.
        own, other: forms of W with the queries, and with the keys, as own side.
    """
    need_queries, need_keys, need_scale, need_bias = needs[:4]
    symmetric = keys is None
    width = queries.shape[1]
    none = p.new(0)
    grad_queries, grad_scale, grad_row_bias = none, none.clone(), none.clone()
    if need_queries or need_scale or row_bias:
        factor = unit[0] if need_scale or row_bias else unit[1]
        product, grad_row_bias = _multiply(p, own, offset, factor, True, row_bias)
        product = _unpad(product, width)
        if need_scale:
            inner = torch.linalg.vecdot(queries.float(), product).sum()
            grad_scale = inner * 0.5 if symmetric and not row_bias else inner
        if need_scale or row_bias:
            product.mul_(p.scale)
        if need_queries:
            grad_queries = product
    grad_keys, grad_bias = none.clone(), none.clone()
    if (need_keys and not symmetric) or need_bias:
        factor = unit[0] if need_bias else unit[1]
        product, grad_bias = _multiply(p.flip(), other, offset, factor, need_keys, need_bias)
        if need_keys:
            grad_keys = _unpad(product, width)
            if need_bias:
                grad_keys.mul_(p.scale)
    return grad_queries, grad_keys, grad_scale, grad_bias, grad_row_bias


def similarity_sum(
    queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi, precision
):
    with _on(queries):
        p = _Problem.of(
            queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, precision
        )
        return _multiply(p, [_Weights(phi)], p.scale, None, False, True)[1]


def similarity_sum_backward(
    grad_rows, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi,
    needs, precision,
):  # fmt: skip
    with _on(queries):
        p = _Problem.of(
            queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, precision
        )
        gain = _floats(grad_rows)
        form = f"d_{phi}"
        own = [_Weights(form, "own", own_gain=gain, wide=p.half)]
        other = [_Weights(form, "other", other_gain=gain, wide=p.half)]
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
    kernels = _kernels()
    if k > kernels.configs.RULES["topk_largest"]:
        return chunked.similarity_topk(
            queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, k, below, precision
        )
    with _on(queries):
        p = _Problem.of(
            queries, keys, scale, key_bias, None, query_ids, key_ids, relation, skip, precision
        )
        config = p.config("topk")
        length = 1 << (k - 1).bit_length()
        n, splits = len(p.own), p.splits(config)
        packed = torch.empty(n, splits * length, dtype=torch.int64, device=queries.device)
        kernels.topk.topk[(_ceil(n, config.own), splits)](
            p.own.rows, p.other.rows, p.scale, p.other.bias, _floats(below), p.own.ids, p.other.ids,
            packed, K=length, BIAS=p.other.bias is not None, BELOW=below is not None,
            **p.rule(), **p.tile(config),
        )  # fmt: skip
        packed = packed.topk(min(k, packed.shape[1]), dim=1).values  # distinct, so no ties
        ordered = (packed >> 32).to(torch.int32)
        bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
        values = bits.view(torch.float32)
        indices = 0x7FFFFFFF - (packed & 0x7FFFFFFF)
        return torch.where(torch.isneginf(values), -1, indices), values


def _row_blocks(n: int, d: int) -> dict[str, int]:
    block = min(1024, 1 << max(4, (d - 1).bit_length()))
    rows = max(1, 2048 // block)
    return {"BLOCK": block, "ROWS": rows, "num_warps": 4}


def _rows(x: Tensor) -> Tensor:
    """``x`` with adjacent entries of a row; rows may be apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def l2_normalize(x: Tensor, eps: float, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    with _on(x):
        n, d = x.shape
        x = _rows(x)
        y, factors = x.new_empty(n, d, dtype=torch.float32), x.new_empty(n, dtype=torch.float32)
        blocks = _row_blocks(n, d)
        _kernels().normalize.forward[(_ceil(n, blocks["ROWS"]),)](
            x, y, factors, n, x.stride(0), eps, d, **blocks
        )
        return y, factors


def l2_normalize_backward(
    grad: Tensor, x: Tensor, y: Tensor, factors: Tensor, eps: float, precision: torch.dtype
) -> Tensor:
    with _on(x):
        n, d = x.shape
        grad, out = _rows(grad), x.new_empty(n, d)
        blocks = _row_blocks(n, d)
        _kernels().normalize.backward[(_ceil(n, blocks["ROWS"]),)](
            grad, y, factors, out, n, grad.stride(0), eps, d, **blocks
        )
        return out


def l2_normalize_pair(a: Tensor, b: Tensor, eps: float, precision: torch.dtype):
    with _on(a):
        n, d = a.shape
        a, b = _rows(a), _rows(b)
        rows = a.new_empty(2 * n, d, dtype=torch.float32)
        cosines, factors = rows.new_empty(n), rows.new_empty(2 * n)
        blocks = _row_blocks(n, d)
        _kernels().normalize.pair_forward[(_ceil(n, blocks["ROWS"]),)](
            a, b, rows, cosines, factors, n, a.stride(0), b.stride(0), eps, d, **blocks
        )
        return rows, cosines, factors


def l2_normalize_pair_backward(
    grad_rows, grad_cosines, a, b, rows, factors, eps: float, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    with _on(a):
        n, d = a.shape
        out_a, out_b = a.new_empty(n, d), b.new_empty(n, d)
        blocks = _row_blocks(n, d)
        _kernels().normalize.pair_backward[(_ceil(n, blocks["ROWS"]),)](
            grad_rows.contiguous(), grad_cosines.contiguous(), rows, factors, out_a, out_b, n,
            eps, d, **blocks,
        )  # fmt: skip
        return out_a, out_b


def _detail() -> str:
    from importlib.metadata import version

    return f"triton {version('triton')}" + (", interpreted" if _INTERPRETED else "")


def _refuses(call: Call) -> str:
    if call.device != "cuda" or torch.cuda.get_device_capability() >= (8, 0):
        return ""
    return "needs a GPU of compute capability 8.0 or newer"


_reason = _unavailable()
BACKEND = Backend(
    "triton",
    sys.modules[__name__],
    devices=("cuda", "cpu") if _INTERPRETED else ("cuda",),
    precisions=(torch.float32, torch.bfloat16, torch.float16),
    unavailable=_reason,
    detail="" if _reason else _detail(),
    refuses=_refuses,
    keeps_exponentials=lambda *_: False,
)

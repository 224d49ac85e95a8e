"""Launches of the kernels: slots for partial results, splits to fill the device, chunks of wide W.

Schedules are fixed, so results repeat bit for bit; nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import classify as classification
from . import configs, normalize, product, sweep, topk
from .problem import Problem, ceil
from .problem import floats as floats
from .problem import held_width as held_width
from .problem import unpad as unpad

_LOG2E = math.log2(math.e)
_EXPONENTIAL = (
    "exp",
    "own",
    "other",
    "both_fixed",
    "both_online",
)  # weights of scores in log2 units
# Binary orders of magnitude that the largest gradient is lifted by, so that fp16 holds weights down
# to small ones: a weight is at most two gradients, each below 2^(_ROOM + 1), and fp16 ends at 2^16.
_ROOM = 13


def mean_in_one_sweep(p: Problem) -> bool:
    """fp16 cannot hold 2^(score - offset), and wide rows no accumulator: they take two sweeps."""
    return not p.half and p.width <= p.held_width


def logsumexp(p: Problem, offset: Tensor, symmetric: bool, columns: bool, maxima: bool):
    """Log-sum-exps of rows and of columns, and the maxima of both; empty where not wanted."""
    n, m = len(p.own), len(p.other)
    both = columns or symmetric
    config = p.config("sweep maxima" if maxima else "sweep")
    slots = max(1, configs.RULES["slot_bytes"] // (4 * m)) if both else n
    blocks = ceil(n, config.own)
    groups, grouped = min(slots, blocks), slots < blocks
    splits = p.splits(config, groups)
    own_sum = p.new(splits, n)
    own_max = p.new(splits, n) if maxima else own_sum
    other_sum = p.new(groups, m) if both else own_sum
    other_max = p.new(groups, m) if both and maxima else own_sum
    if grouped:
        other_sum.zero_()
        if maxima:
            other_max.fill_(-1e30)
    bias = _side_of_bias(p)
    for begin in range(0, blocks, groups):
        sweep.sweep[(min(groups, blocks - begin), splits)](
            p.own.rows, p.other.rows, p.scale, p.other.bias, p.own.ids, p.other.ids,
            own_sum, other_sum, own_max, other_max, offset, begin=begin,
            REPEATS=config.fold, BIAS=bias, SYMMETRIC=symmetric, BOTH=both, MAXIMA=maxima,
            GROUPED=grouped, **p.rule(), **p.tile(config),
        )  # fmt: skip
    square = max(config.own, config.other) if symmetric and not grouped else 0
    no_slots = (own_sum, own_max, 0)
    of_own, of_other = (own_sum, own_max, splits), (other_sum, other_max, groups)
    none = p.new(0)
    rows, row_max, _ = _finish(
        p, offset, of_own, of_other if symmetric else no_slots, maxima, square, square // config.own
    )
    if not columns or symmetric:
        return rows, none, row_max, none.clone()
    column_sums, column_max, _ = _finish(p.flip(), offset, no_slots, of_other, maxima)
    return rows, column_sums, row_max, column_max


def _finish(
    p: Problem, offset: Tensor, own_slots, other_slots, maxima: bool, square: int = 0,
    slots: int = 0, means=None,
):  # fmt: skip
    """Slots, each (sums, maxima, count), to log-sum-exps, maxima and softmax-weighted means."""
    config = p.config("finish")
    n = len(p.own)
    logsum, largest = p.new(n), p.new(n if maxima else 0)
    mean = p.new(0) if means is None else p.new(n, p.width)
    bias = _side_of_bias(p)
    sweep.finish[(ceil(n, config.own),)](
        p.own.rows, p.other.rows, p.scale, p.own.bias if bias == "own" else p.other.bias,
        p.own.ids, p.other.ids, own_slots[0], other_slots[0], own_slots[1], other_slots[1],
        means, offset, logsum, largest, mean, own_count=own_slots[2], other_count=other_slots[2],
        BIAS=bias, SQUARE=square, SLOTS=slots, MAXIMA=maxima, MEAN=means is not None,
        **p.rule(), **p.tile(config),
    )  # fmt: skip
    return logsum, largest, mean


def _side_of_bias(p: Problem) -> str:
    return "own" if p.own.bias is not None else "other" if p.other.bias is not None else "none"


def logsumexp_and_mean(p: Problem, offset: Tensor, maxima: bool):
    """Log-sum-exp and softmax-weighted mean of the other rows from one sweep."""
    config = p.config("product")
    splits = p.splits(config, ceil(len(p.own), config.own))
    out, sums = p.new(splits, len(p.own), p.width), p.new(splits, len(p.own))
    tops = p.new(splits, len(p.own)) if maxima else sums
    _launch_product(
        p, config, splits, Weights("exp"), offset=offset, out=out, row_sums=sums, tops=tops,
        maxima=maxima,
    )  # fmt: skip
    out = out[0] if splits == 1 else _add_slots(out)
    return _finish(p, offset, (sums, tops, splits), (sums, tops, 0), maxima, means=out)


def mean(p: Problem, logsum: Tensor, offset: Tensor) -> Tensor:
    """Softmax-weighted mean of the other rows, given the log-sum-exps."""
    empty = torch.isneginf(logsum)
    gain = torch.full_like(logsum, 2.0**_ROOM).masked_fill_(empty, 0.0)
    shift = (logsum * _LOG2E).masked_fill_(empty, 0.0)
    factor = torch.full_like(p.scale, 2.0**-_ROOM)
    weights = [Weights("own", own_gain=gain, own_shift=shift)]
    return multiply(p, weights, offset, factor)[0]


@dataclass
class Weights:
    """What W is made of; see :mod:`fastcl.kernels.product`."""

    weight: str
    gain: str = "none"
    own_gain: Tensor | None = None
    other_gain: Tensor | None = None
    own_shift: Tensor | None = None
    other_shift: Tensor | None = None
    wide: bool = False  # W may leave the range of 16 bits and stays fp32

    def arguments(self, p: Problem) -> dict[str, Any]:
        return {
            "own_bias": p.own.bias, "other_bias": p.other.bias, "own_gain": self.own_gain,
            "other_gain": self.other_gain, "own_shift": self.own_shift,
            "other_shift": self.other_shift, "own_ids": p.own.ids, "other_ids": p.other.ids,
            "OWN_BIAS": p.own.bias is not None, "OTHER_BIAS": p.other.bias is not None,
            "WEIGHT": self.weight, "GAIN": self.gain,
            "UNIT": _LOG2E if self.weight in _EXPONENTIAL else 1.0,
        }  # fmt: skip


def _launch_product(
    p: Problem, config, splits: int, weights: Weights, *, offset, factor=None, out=None,
    row_sums=None, tops=None, maxima: bool = False,
):  # fmt: skip
    grid = (ceil(len(p.own), config.own), splits)
    product.product[grid](
        p.own.rows, p.other.rows, p.scale, offset, factor, out=out, row_sums=row_sums, tops=tops,
        PRODUCT=out is not None, ROW_SUM=row_sums is not None, MAXIMA=maxima,
        FACTOR=factor is not None, WIDE=weights.wide,
        **weights.arguments(p), **p.rule(), **p.tile(config),
    )  # fmt: skip


def _add_slots(slots: Tensor, factor: Tensor | None = None) -> Tensor:
    """Slots [count, ...] added in order."""
    out = slots.new_empty(slots.shape[1:])
    product.add_slots[(ceil(out.numel(), 512),)](
        slots, factor, out, slots.shape[0], out.numel(), FACTOR=factor is not None, BLOCK=512,
        **configs.FUSION,
    )  # fmt: skip
    return out


@dataclass
class Want:
    """Of one side's W k and W 1, what is wanted, and what it is multiplied by."""

    product: bool
    sums: bool
    factor: Tensor | None

    def __bool__(self) -> bool:
        return self.product or self.sums


def multiply_both(
    p: Problem, own: list[Weights], other: list[Weights], offset: Tensor, wants: list[Want],
    symmetric: bool,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Of own rows and of other rows, what is wanted of :func:`multiply`.

    ``own`` and ``other`` are forms of the same W with either side as rows. Where rows are too wide
    to be multiplied in the tile, it is written once for both. ``symmetric``: so is W, and its
    triangle is enough for the own rows; other rows want nothing.
    """
    if p.streamed and any(want.product for want in wants):
        return _multiply_wide(p, own, offset, wants, symmetric)
    nothing = p.new(0), p.new(0)
    return [
        multiply(side, forms, offset, want.factor, want.product, want.sums) if want else nothing
        for side, forms, want in zip((p, p.flip()), (own, other), wants, strict=True)
    ]


def multiply(
    p: Problem, weights: list[Weights], offset: Tensor, factor: Tensor | None,
    want_product: bool = True, want_sums: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """factor W k [N, D] and factor W 1 [N]; empty tensors for what is not wanted.

    ``weights`` are forms of the same W of which one is valid: launches of the others return.
    """
    if p.streamed and want_product:
        wants = [Want(True, want_sums, factor), Want(False, False, None)]
        return _multiply_wide(p, weights, offset, wants, False)[0]
    config = p.config("product")
    splits = p.splits(config, ceil(len(p.own), config.own))
    n = len(p.own)
    out = p.new(splits, n, p.width) if want_product else None
    sums = p.new(splits, n) if want_sums else None
    for form in weights:
        _launch_product(
            p, config, splits, form, offset=offset, factor=factor if splits == 1 else None,
            out=out, row_sums=sums,
        )  # fmt: skip
    weighted = total = p.new(0)
    if out is not None:
        weighted = out[0] if splits == 1 else _add_slots(out, factor)
    if sums is not None:
        total = _add_slots(sums, factor)
    return weighted, total


def _multiply_wide(
    p: Problem, weights: list[Weights], offset: Tensor, wants: list[Want], symmetric: bool
) -> list[tuple[Tensor, Tensor]]:
    own, other = wants
    results = [
        (p.new(size if want.product else 0, p.width), p.new(size if want.sums else 0))
        for size, want in zip((len(p.own), len(p.other)), wants, strict=True)
    ]
    (product, sums), (other_product, other_sums) = results
    for rows, w in _weight_chunks(p, weights, offset, symmetric):
        add = rows.start > 0  # the first chunk reaches all other rows
        if symmetric:
            matmul(w, p.own.rows[rows.start :], product[rows], add)
            if rows.stop < len(p.own):
                right = w[:, rows.stop - rows.start :]
                matmul(right.t(), p.own.rows[rows], product[rows.stop :], add)
            continue
        if own.product:
            matmul(w, p.other.rows, product[rows], False)
        if own.sums:
            torch.sum(w, 1, dtype=torch.float32, out=sums[rows])
        if other.product:
            matmul(w.t(), p.own.rows[rows], other_product, add)
        if other.sums:
            part = w.sum(0, dtype=torch.float32)
            other_sums.copy_(other_sums + part if add else part)
    for result, want in zip(results, wants, strict=True):
        if want.factor is not None:
            for x in result:
                x.mul_(want.factor)
    return results


def _weight_chunks(p: Problem, weights: list[Weights], offset: Tensor, symmetric: bool):
    """Own rows in chunks, as a slice, and W [rows, M] in the operands' dtype; of a symmetric
    problem its columns from the chunk's first row on."""
    config = p.config("weights")
    *_, form = weights
    fixed = weights[0] if len(weights) > 1 else None  # else another launch would return, but slowly
    n, m = len(p.own), len(p.other)
    dtype = torch.float32 if weights[0].wide else p.own.rows.dtype
    pitch = _pitch(m)
    most = config.own * ceil(n, config.own) * pitch
    size = min(most, max(config.own * pitch, configs.RULES["chunk_bytes"] // dtype.itemsize))
    buffer = torch.empty(size, dtype=dtype, device=p.scale.device)
    begin = 0
    while begin < n:
        left = begin if symmetric else 0
        pitch = _pitch(m - left)
        rows = min(n - begin, config.own * (size // (config.own * pitch)))
        chunk = buffer[: rows * pitch].view(rows, pitch)
        blocks = ceil(rows, config.own) * ceil(m - left, config.other)
        product.write_weights[(blocks,)](
            p.own.rows, p.other.rows, p.scale, offset, out=chunk, begin=begin, rows=rows,
            left=left, pitch=pitch, own_ratio=fixed and fixed.own_gain,
            other_ratio=fixed and fixed.other_gain, **form.arguments(p), **p.rule(),
            **p.tile(config),
        )  # fmt: skip
        yield slice(begin, begin + rows), chunk[:, : m - left]
        begin += rows


def _pitch(columns: int) -> int:
    """The next multiple of 16: what Triton knows of a size, and more than the 16 bytes that a
    library's products want of their operands."""
    return 16 * ceil(columns, 16)


def matmul(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """a b in fp32 into ``out``, or added to it; 16-bit operands keep fp32 sums."""
    if a.dtype != b.dtype:
        b = b.to(a.dtype)
    if a.dtype != torch.float32 and a.is_cuda:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)


@dataclass
class Gains:
    """Per-row factors of the weights of one side, see ``kernels.product.gains``."""

    gain: Tensor
    shift: Tensor
    ratio: Tensor


def gains(p: Problem, grads: list[Tensor], logsums: list[Tensor], offset: Tensor):
    """Factors of rows (and columns), and the unit [2] the weights were divided by."""
    grads = [grad.contiguous() for grad in grads]
    last = len(grads) - 1
    programs = 16
    tops = p.new(2 * programs)
    product.largest_gradient[(programs,)](
        grads[0], logsums[0], grads[last], logsums[last], tops,
        grads[0].numel(), grads[last].numel() if last else 0, BLOCK=1024, **configs.FUSION,
    )  # fmt: skip
    unit = p.new(2)
    sides = []
    for grad, logsum in zip(grads, logsums, strict=True):
        side = Gains(*(torch.empty_like(logsum) for _ in range(3)))
        product.gains[(ceil(grad.numel(), 1024),)](
            grad, logsum, tops, p.scale, offset, side.gain, side.shift, side.ratio, unit,
            grad.numel(), SLOTS=2 * programs, ROOM=_ROOM, BLOCK=1024, **configs.FUSION,
        )  # fmt: skip
        sides.append(side)
    return sides, unit


def exponential_weights(own: Gains | None, other: Gains | None) -> list[Weights]:
    """Forms of W = own gradients exp(s - own sums) + the same of the other side, as given."""
    if own is not None and other is not None:
        return [
            Weights("both_fixed", own_gain=own.ratio, other_gain=other.ratio),
            Weights(
                "both_online", own_gain=own.gain, other_gain=other.gain, own_shift=own.shift,
                other_shift=other.shift,
            ),
        ]  # fmt: skip
    if own is not None:
        return [Weights("own", own_gain=own.gain, own_shift=own.shift)]
    assert other is not None
    return [Weights("other", other_gain=other.gain, other_shift=other.shift)]


def largest(p: Problem, k: int, below: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices and values [N, k or fewer] of the best other rows; -1 and -inf for none."""
    config = p.config("topk")
    length = 1 << (k - 1).bit_length()
    n, splits = len(p.own), p.splits(config, ceil(len(p.own), config.own))
    packed = torch.empty(n, splits * length, dtype=torch.int64, device=p.scale.device)
    topk.topk[(ceil(n, config.own), splits)](
        p.own.rows, p.other.rows, p.scale, p.other.bias, below, p.own.ids, p.other.ids,
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
    entries = 2048 if d % 16 == 0 else 1024  # those that are not loaded as vectors take more room
    rows = max(1, entries // block)
    return {"BLOCK": block, "ROWS": rows, "num_warps": 4, **configs.FUSION}


def _rows(x: Tensor) -> Tensor:
    """``x`` with adjacent entries of a row; rows may be apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def unit_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Unit rows [N, D] and what each row was multiplied with [N], fp32."""
    n, d = x.shape
    x = _rows(x)
    y, factors = x.new_empty(n, d, dtype=torch.float32), x.new_empty(n, dtype=torch.float32)
    blocks = _row_blocks(n, d)
    normalize.forward[(ceil(n, blocks["ROWS"]),)](x, y, factors, n, x.stride(0), eps, d, **blocks)
    return y, factors


def unit_rows_backward(grad: Tensor, x: Tensor, y: Tensor, factors: Tensor, eps: float) -> Tensor:
    n, d = x.shape
    grad, out = _rows(grad), x.new_empty(n, d)
    blocks = _row_blocks(n, d)
    normalize.backward[(ceil(n, blocks["ROWS"]),)](
        grad, y, factors, out, n, grad.stride(0), eps, d, **blocks
    )
    return out


def unit_pairs(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of ``a`` and then ``b`` [2 N, D], their dot products [N], and factors [2 N]."""
    n, d = a.shape
    a, b = _rows(a), _rows(b)
    rows = a.new_empty(2 * n, d, dtype=torch.float32)
    cosines, factors = rows.new_empty(n), rows.new_empty(2 * n)
    blocks = _row_blocks(n, d)
    normalize.pair_forward[(ceil(n, blocks["ROWS"]),)](
        a, b, rows, cosines, factors, n, a.stride(0), b.stride(0), eps, d, **blocks
    )
    return rows, cosines, factors


def unit_pairs_backward(
    grad_rows, grad_cosines, a, b, rows, factors, eps: float, dtypes: list[torch.dtype]
) -> tuple[Tensor, Tensor]:
    """Gradients of ``a`` and ``b``, in ``dtypes``."""
    n, d = a.shape
    out_a, out_b = (a.new_empty(n, d, dtype=dtype) for dtype in dtypes)
    blocks = _row_blocks(n, d)
    normalize.pair_backward[(ceil(n, blocks["ROWS"]),)](
        grad_rows.contiguous(), grad_cosines.contiguous(), rows, factors, out_a, out_b, n,
        eps, d, **blocks,
    )  # fmt: skip
    return out_a, out_b


def classify(
    cosines: Tensor, scale: Tensor, sides: list[tuple[Tensor, Tensor]], share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of pairs, its derivative by their cosines [N], and by the scale in their scores.

    ``sides``: one or two, each log-sum-exps [N] and where the derivatives by these go.
    """
    (rows, grad_rows), (columns, grad_columns) = (*sides, (None, None))[:2]
    n = len(cosines)
    programs = ceil(n, 1024)
    grad_cosines, sums = torch.empty_like(cosines), cosines.new_empty(2, programs)
    classification.classify[(programs,)](
        cosines, rows, columns, scale, grad_rows, grad_columns, grad_cosines, sums, n, share,
        COLUMNS=columns is not None, BLOCK=1024, **configs.FUSION,
    )  # fmt: skip
    loss, by_scale = sums.sum(1).unbind()
    return loss, grad_cosines, by_scale

"""Log-sum-exp: one sweep of the tiles gives own-side sums, and other-side sums beside them.

The own block stands still and its sums grow in registers, element by element: a thread's
accumulator rows are folded onto each other without a shuffle. Sums of the other side cost one
short reduction per tile and leave as partial slots, one per own block, added up in a fixed order
by :func:`finish`. A symmetric problem sweeps its triangle only; a tile then serves its columns as
own rows and its rows as other rows. Of a tile's two sides one divides the other, so that what lies
on the diagonal is squares of the longer.
"""

import triton
import triton.language as tl

from .tile import (
    LN2,
    LOG2E,
    LOST,
    NEVER,
    exponent_offset,
    kept,
    load_rows,
    load_vector,
    related,
    scores,
    touched,
)

# sizes and offsets change from call to call, and no kernel is compiled anew for them
SIZES = ["size_own", "size_other", "skip0", "skip1", "skip2", "own_count", "other_count", "begin"]


@triton.jit
def _fold(e, REPEATS: tl.constexpr, OTHER: tl.constexpr, OWN: tl.constexpr):
    """Groups of an element's tile that live in one thread, ready to be reduced over dims 0 and 2.

    In the layout of tensor-core accumulators a thread owns rows g and g + 8 of a slab of 16.
    """
    return tl.reshape(e, [REPEATS, OTHER // 16 // REPEATS, 2, 8, OWN])


@triton.jit
def _add(total, e, REPEATS: tl.constexpr, OTHER: tl.constexpr, OWN: tl.constexpr):
    if REPEATS > 0:
        e = tl.sum(tl.sum(_fold(e, REPEATS, OTHER, OWN), 2), 0)
    return total + e


@triton.jit
def _largest(top, t, REPEATS: tl.constexpr, OTHER: tl.constexpr, OWN: tl.constexpr):
    if REPEATS > 0:
        t = tl.max(tl.max(_fold(t, REPEATS, OTHER, OWN), 2), 0)
    return tl.maximum(top, t)


@triton.jit
def _flat_sum(x, REPEATS: tl.constexpr):
    if REPEATS > 0:
        x = tl.sum(x, 0)
    return tl.sum(x, 0)


@triton.jit
def _flat_max(x, REPEATS: tl.constexpr):
    if REPEATS > 0:
        x = tl.max(x, 0)
    return tl.max(x, 0)


@triton.jit
def _write(slots, slot, first, size, value, MERGE: tl.constexpr, ROWS: tl.constexpr):
    """Into a slot [size]: replace what stands there, or "add" to it, or keep the "max"."""
    index = first + tl.arange(0, ROWS)
    at = slots + tl.cast(slot, tl.int64) * size + index
    if MERGE == "add":
        value += tl.load(at, mask=index < size, other=0.0)
    elif MERGE == "max":
        value = tl.maximum(value, tl.load(at, mask=index < size, other=0.0))
    tl.store(at, value, mask=index < size)


@triton.jit
def _tile(
    total, top, start, masked, held, own_index, ids, shift, group, first,
    own, other, scale, bias, other_ids, other_sum, other_max, size_own, size_other,
    skip0, skip1, skip2,
    D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    REPEATS: tl.constexpr, BIAS: tl.constexpr, RELATION: tl.constexpr, SKIPS: tl.constexpr,
    BOTH: tl.constexpr, MAXIMA: tl.constexpr, GROUPED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add one tile to the own sums and write its other sums, unless ``masked`` out entirely."""
    s = scores(
        held, other, start, size_other, own, first, size_own, D, BD, OTHER, OWN,
        PRECISION, EMULATE, "columns",
    )  # fmt: skip
    if BIAS == "other":
        shift = shift - load_vector(bias, start, size_other, OTHER)[:, None] * LOG2E
    t = s * scale - shift
    other_index = start + tl.arange(0, OTHER)
    if MASKED:
        keep = kept(
            own_index, other_index[:, None], size_own, size_other, skip0, skip1, skip2, SKIPS
        )
        t = tl.where(keep, t, -NEVER)
    if RELATION != "any":
        keys = load_vector(other_ids, start, size_other, OTHER)[:, None]
        t = tl.where(related(ids, keys, RELATION), t, -NEVER)
    e = tl.math.exp2(t)
    total = _add(total, e, REPEATS, OTHER, OWN)
    if MAXIMA:
        top = _largest(top, t, REPEATS, OTHER, OWN)
    if BOTH:
        if not masked:
            _write(
                other_sum, group, start, size_other, tl.sum(e, 1),
                "add" if GROUPED else "replace", OTHER,
            )  # fmt: skip
            if MAXIMA:
                _write(
                    other_max, group, start, size_other, tl.max(t, 1),
                    "max" if GROUPED else "replace", OTHER,
                )  # fmt: skip
    return total, top


@triton.jit
def _block(
    block, group, split, splits, own, other, scale, offset, bias, own_ids, other_ids,
    own_sum, other_sum, own_max, other_max, size_own, size_other, skip0, skip1, skip2,
    D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    REPEATS: tl.constexpr, BIAS: tl.constexpr, RELATION: tl.constexpr, SKIPS: tl.constexpr,
    SYMMETRIC: tl.constexpr, BOTH: tl.constexpr, MAXIMA: tl.constexpr, GROUPED: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One own block against the tiles of one split."""
    first = block * OWN
    own_index = (first + tl.arange(0, OWN))[None, :]
    held = own
    if BD == D:
        held = load_rows(own, first, size_own, 0, D, D, OWN)
    ids = own_ids
    if RELATION != "any":
        ids = load_vector(own_ids, first, size_own, OWN)[None, :]
    shift = offset
    if BIAS == "own":
        shift = offset - load_vector(bias, first, size_own, OWN)[None, :] * LOG2E
    if REPEATS > 0:
        total = tl.zeros([OTHER // 16 // REPEATS, 8, OWN], tl.float32)
        top = tl.full([OTHER // 16 // REPEATS, 8, OWN], -NEVER, tl.float32)
    else:
        total = tl.zeros([OTHER, OWN], tl.float32)
        top = tl.full([OTHER, OWN], -NEVER, tl.float32)

    tiles = tl.cdiv(size_other, OTHER)
    free = tiles  # tiles that the first loop may take
    if SYMMETRIC:
        free = first // OTHER
        tiles = tl.minimum(tiles, tl.cdiv(first + OWN, OTHER))
    free = tl.where(first + OWN > size_own, 0, free)
    for tile in range(split, free, splits):
        start = tile * OTHER
        hit = touched(first, start, size_own, size_other, skip0, skip1, skip2, SKIPS, OWN, OTHER)
        total, top = _tile(
            total, top, start, False, held, own_index, ids, shift + tl.where(hit, NEVER, 0.0),
            group, first, own, other, scale, bias, other_ids, other_sum, other_max,
            size_own, size_other, skip0, skip1, skip2, D, BD, OWN, OTHER, REPEATS, BIAS, RELATION,
            SKIPS, BOTH, MAXIMA, GROUPED, False, PRECISION, EMULATE,
        )  # fmt: skip
    tl.debug_barrier()  # slots written above by other threads of this program are written again
    for tile in range(split, tiles, splits):
        start = tile * OTHER
        if (tile >= free) | touched(
            first, start, size_own, size_other, skip0, skip1, skip2, SKIPS, OWN, OTHER
        ):
            diagonal = False
            if SYMMETRIC:  # both sums of such a tile are own sums
                diagonal = start + OTHER > first
            total, top = _tile(
                total, top, start, diagonal, held, own_index, ids, shift,
                group, first, own, other, scale, bias, other_ids, other_sum, other_max,
                size_own, size_other, skip0, skip1, skip2, D, BD, OWN, OTHER, REPEATS, BIAS,
                RELATION, SKIPS, BOTH, MAXIMA, GROUPED, True, PRECISION, EMULATE,
            )  # fmt: skip
    _write(own_sum, split, first, size_own, _flat_sum(total, REPEATS), "replace", OWN)
    if MAXIMA:
        _write(own_max, split, first, size_own, _flat_max(top, REPEATS), "replace", OWN)


@triton.jit(do_not_specialize=SIZES)
def sweep(
    own, other, scale, bias, own_ids, other_ids, own_sum, other_sum, own_max, other_max, offset,
    begin, size_own, size_other, skip0, skip1, skip2,
    D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    REPEATS: tl.constexpr, BIAS: tl.constexpr, RELATION: tl.constexpr, SKIPS: tl.constexpr,
    SYMMETRIC: tl.constexpr, BOTH: tl.constexpr, MAXIMA: tl.constexpr, GROUPED: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Partial sums of exp(score - offset).

    Grid (own blocks from ``begin`` on, splits). Writes own_sum [splits, N] and, if BOTH, other_sum
    [blocks, M]; with MAXIMA the largest score - offset (log2 units) in the same slots of own_max
    and other_max; offset [] in natural units. GROUPED, which caps the memory of the slots, adds to
    what earlier launches left there; they must be 0 (and -NEVER) before the first.
    """
    # blocks late in a triangle are the long ones and start first
    group = tl.num_programs(0) - 1 - tl.program_id(0) if SYMMETRIC else tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    factor = tl.load(scale)
    fixed = exponent_offset(factor, tl.maximum(size_own, size_other))
    if (group == 0) & (split == 0):
        tl.store(offset, fixed * LN2)
    _block(
        begin + group, group, split, splits, own, other, factor * LOG2E, fixed, bias, own_ids,
        other_ids, own_sum, other_sum, own_max, other_max, size_own, size_other,
        skip0, skip1, skip2, D, BD, OWN, OTHER, REPEATS, BIAS, RELATION, SKIPS, SYMMETRIC,
        BOTH, MAXIMA, GROUPED, PRECISION, EMULATE,
    )  # fmt: skip


@triton.jit
def _merge_slots(
    value, slots, count, first, size, SQUARE: tl.constexpr, SLOTS: tl.constexpr,
    MAXIMA: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add slots of a block of rows, 16 at a time and in order; or take their maxima. With a
    SQUARE a row has slots only after those, SLOTS each, of its own square and of all before."""
    index = first + tl.arange(0, ROWS)
    begin = 0
    if SQUARE > 0:
        begin = (first // SQUARE + 1) * SLOTS
    for slot in range(begin, count, 16):
        which = slot + tl.arange(0, 16)
        written = (which[:, None] < count) & (index[None, :] < size)
        if SQUARE > 0:
            written = written & (which[:, None] >= (index[None, :] // SQUARE + 1) * SLOTS)
        part = tl.load(
            slots + which[:, None].to(tl.int64) * size + index[None, :],
            mask=written,
            other=-NEVER if MAXIMA else 0.0,
        )
        if MAXIMA:
            value = tl.maximum(value, tl.max(part, 0))
        else:
            value += tl.sum(part, 0)
    return value


@triton.jit(do_not_specialize=SIZES)
def finish(
    own, other, scale, bias, own_ids, other_ids, own_slots, other_slots, own_tops, other_tops,
    means, offset, logsum, largest, mean, size_own, size_other, own_count, other_count,
    skip0, skip1, skip2,
    D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    BIAS: tl.constexpr, RELATION: tl.constexpr, SKIPS: tl.constexpr, SQUARE: tl.constexpr,
    SLOTS: tl.constexpr, MAXIMA: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp [N] from the slots of :func:`sweep` (or of ``product``).

    A row whose sum vanished or overflowed under the fixed offset is done again here with the
    running maximum, its block with it, and the offset becomes NaN: whoever reads it later must
    not rely on it. Every program that writes the offset writes the same value.

    Grid (row blocks,). Of a triangle only slots beyond the diagonal were written: SQUARE is the
    longer side of the sweep's tiles, with SLOTS own blocks; else 0. With MEAN, ``means`` [N, D],
    the rows times their exponentials, becomes the softmax-weighted mean of the other rows.
    """
    first = tl.program_id(0) * OWN
    index = first + tl.arange(0, OWN)
    inside = index < size_own
    total = tl.zeros([OWN], tl.float32)
    total = _merge_slots(total, own_slots, own_count, first, size_own, 0, 0, False, OWN)
    total = _merge_slots(
        total, other_slots, other_count, first, size_own, SQUARE, SLOTS, False, OWN
    )
    # not read from ``offset``, which another program may be setting to NaN just now
    fixed = exponent_offset(tl.load(scale), tl.maximum(size_own, size_other)) * LN2
    top = tl.full([OWN], -NEVER, tl.float32)
    if MAXIMA:
        top = _merge_slots(top, own_tops, own_count, first, size_own, 0, 0, True, OWN)
        top = _merge_slots(top, other_tops, other_count, first, size_own, SQUARE, SLOTS, True, OWN)
        top = tl.where(top > -0.5 * NEVER, top * LN2 + fixed, -float("inf"))
    result = tl.log2(total) * LN2 + fixed
    lost = inside & ((total < LOST) | (total == float("inf")))
    columns = tl.arange(0, D)[None, :] if MEAN else index
    place = index[:, None].to(tl.int64) * D + columns if MEAN else index
    if MEAN:
        average = tl.zeros([OWN, D], tl.float32)
    if tl.max(lost.to(tl.int32), 0) > 0:
        held = own
        if BD == D:
            held = load_rows(own, first, size_own, 0, D, D, OWN)
        ids = own_ids
        if RELATION != "any":
            ids = load_vector(own_ids, first, size_own, OWN)[:, None]
        factor = tl.load(scale) * LOG2E
        high = tl.full([OWN], -NEVER, tl.float32)
        total = tl.zeros([OWN], tl.float32)
        for start in range(0, size_other, OTHER):
            t = factor * scores(
                held, own, first, size_own, other, start, size_other, D, BD, OWN, OTHER,
                PRECISION, EMULATE, "rows",
            )  # fmt: skip
            if BIAS == "own":
                t += load_vector(bias, first, size_own, OWN)[:, None] * LOG2E
            elif BIAS == "other":
                t += load_vector(bias, start, size_other, OTHER)[None, :] * LOG2E
            keep = kept(
                index[:, None], (start + tl.arange(0, OTHER))[None, :], size_own, size_other,
                skip0, skip1, skip2, SKIPS,
            )  # fmt: skip
            if RELATION != "any":
                keys = load_vector(other_ids, start, size_other, OTHER)[None, :]
                keep = keep & related(ids, keys, RELATION)
            t = tl.where(keep, t, -NEVER)
            higher = tl.maximum(high, tl.max(t, 1))
            e = tl.where(keep, tl.math.exp2(t - higher[:, None]), 0.0)
            shrink = tl.math.exp2(high - higher)
            total = total * shrink + tl.sum(e, 1)
            high = higher
            if MEAN:
                rows = load_rows(other, start, size_other, 0, D, D, OTHER)
                if EMULATE:
                    rows = rows.to(tl.float32)
                part = tl.dot(e.to(rows.dtype), rows, input_precision=PRECISION)
                average = average * shrink[:, None] + part
        result = (tl.log2(total) + high) * LN2
        if MAXIMA:
            top = tl.where(total > 0, high * LN2, -float("inf"))
        result = tl.where(total == 0, -float("inf"), result)  # what is no number stays none
        tl.store(offset, float("nan"))
    else:
        if MEAN:
            average = tl.load(means + place, mask=inside[:, None], other=0.0)
    tl.store(logsum + index, result, mask=inside)
    if MAXIMA:
        tl.store(largest + index, top, mask=inside)
    if MEAN:
        average = average / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(mean + place, average, mask=inside[:, None])

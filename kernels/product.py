"""Weights of a tile times the other rows: the core of every backward, and of a queue's forward.

    out_i = factor * sum_j W_ij k_j        row_sum_i = sum_j W_ij

The weight is a function of the score and of one or two numbers per row and column (WEIGHT):

    exp             2^(t - offset): a forward that also averages the keys, and sets the offset
    own, other      gain * 2^(t - shift), with the gains and shifts of one side
    both_fixed      2^(t - offset) * (gain_own + gain_other): one exponential for both
    both_online     two exponentials, for sums that left the fixed offset's range
    softplus ...    phi(s), a forward that only sums
    d_softplus ...  gain * phi'(s), gains of the side GAIN

t is the score in UNITs: 1 / ln 2 for exponentials, for which t is a log2, and 1 for the others.
Gains and shifts that a weight does not use are None. :func:`product` multiplies in the tile; for
rows too wide for that, :func:`write_weights` writes a chunk of W, and a library's matrix product
does the rest.
"""

import triton
import triton.language as tl

from .tile import (
    LN2,
    LOG2E,
    NEVER,
    exponent_offset,
    kept,
    load_rows,
    load_vector,
    log1p,
    related,
    scores,
    touched,
)

# sizes and offsets change from call to call, and no kernel is compiled anew for them
SIZES = ["size_own", "size_other", "skip0", "skip1", "skip2", "begin", "rows", "left"]


@triton.jit
def _relu(x):
    """The hardware's maximum takes the number where the other is none; PyTorch's relu does not."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _weight(
    s, scale, away, offset, own_bias, other_bias, own_gain, other_gain, own_shift, other_shift,
    OWN_BIAS: tl.constexpr, OTHER_BIAS: tl.constexpr, WEIGHT: tl.constexpr, GAIN: tl.constexpr,
):  # fmt: skip
    """W of a tile [R, C] and its scores; vectors come in their broadcast shapes. ``away`` is 0,
    or large for a tile that shall weigh nothing."""
    if WEIGHT == "exp" or WEIGHT == "both_fixed":
        t = s * scale - (offset + away)
    elif WEIGHT == "own":
        t = s * scale - (own_shift + away)
    elif WEIGHT == "other":
        t = s * scale - (other_shift + away)
    else:
        t = s * scale - away
    if OWN_BIAS:
        t += own_bias
    if OTHER_BIAS:
        t += other_bias
    if WEIGHT == "exp":
        w = tl.math.exp2(t)
    elif WEIGHT == "own":
        w = tl.math.exp2(t) * own_gain
    elif WEIGHT == "other":
        w = tl.math.exp2(t) * other_gain
    elif WEIGHT == "both_fixed":
        w = tl.math.exp2(t) * (own_gain + other_gain)
    elif WEIGHT == "both_online":
        w = tl.math.exp2(t - own_shift) * own_gain + tl.math.exp2(t - other_shift) * other_gain
    elif WEIGHT == "softplus":
        w = tl.maximum(t, 0.0) + log1p(tl.math.exp2(-tl.abs(t) * LOG2E))
    elif WEIGHT == "relu":
        w = _relu(t)
    elif WEIGHT == "relu_squared":
        w = _relu(t)
        w = w * w
    elif WEIGHT == "d_softplus":
        small = tl.math.exp2(-tl.abs(t) * LOG2E)
        w = tl.where(t >= 0, 1.0, small) / (1.0 + small)
    elif WEIGHT == "d_relu":
        w = tl.where(t > 0, 1.0, 0.0)
    else:
        w = 2.0 * _relu(t)
    if GAIN == "own":
        w = w * own_gain
    elif GAIN == "other":
        w = w * other_gain
    return w, t


@triton.jit
def _vectors(
    start, size, bias, gain, shift, BIAS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Bias, gain and shift of a block; 0 for those that are not given."""
    b, g, m = 0.0, 0.0, 0.0
    if BIAS:
        b = load_vector(bias, start, size, ROWS) * UNIT
    if gain is not None:
        g = load_vector(gain, start, size, ROWS)
    if shift is not None:
        m = load_vector(shift, start, size, ROWS)
    return b, g, m


@triton.jit
def _weigh(
    s, start, away, own_index, ids, own_bias, own_gain, own_shift, scale, offset, other_bias,
    other_gain, other_shift, other_ids, size_own, size_other, skip0, skip1, skip2,
    OTHER: tl.constexpr, OWN_BIAS: tl.constexpr, OTHER_BIAS: tl.constexpr,
    RELATION: tl.constexpr, SKIPS: tl.constexpr, WEIGHT: tl.constexpr, GAIN: tl.constexpr,
    UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights [OWN, OTHER] of inner products, and scores, -NEVER where the rule drops a pair."""
    b, g, m = _vectors(
        start, size_other, other_bias, other_gain, other_shift, OTHER_BIAS, UNIT, OTHER
    )
    if OTHER_BIAS:
        b = b[None, :]
    if other_gain is not None:
        g = g[None, :]
    if other_shift is not None:
        m = m[None, :]
    w, t = _weight(
        s, scale, away, offset, own_bias, b, own_gain, g, own_shift, m,
        OWN_BIAS, OTHER_BIAS, WEIGHT, GAIN,
    )  # fmt: skip
    if MASKED:
        other_index = (start + tl.arange(0, OTHER))[None, :]
        keep = kept(own_index, other_index, size_own, size_other, skip0, skip1, skip2, SKIPS)
        w = tl.where(keep, w, 0.0)
        t = tl.where(keep, t, -NEVER)
    if RELATION != "any":
        keys = load_vector(other_ids, start, size_other, OTHER)[None, :]
        keep = related(ids, keys, RELATION)
        w = tl.where(keep, w, 0.0)
        t = tl.where(keep, t, -NEVER)
    return w, t


@triton.jit
def _tile(
    held, first, start, away, own_index, ids, own_bias, own_gain, own_shift, own, other, scale,
    offset, other_bias, other_gain, other_shift, other_ids, size_own, size_other, skip0, skip1,
    skip2,
    D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    OWN_BIAS: tl.constexpr, OTHER_BIAS: tl.constexpr, RELATION: tl.constexpr,
    SKIPS: tl.constexpr, WEIGHT: tl.constexpr, GAIN: tl.constexpr, UNIT: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Weights [OWN, OTHER] of one tile, and its scores."""
    s = scores(
        held, own, first, size_own, other, start, size_other, D, BD, OWN, OTHER,
        PRECISION, EMULATE, "rows",
    )  # fmt: skip
    return _weigh(
        s, start, away, own_index, ids, own_bias, own_gain, own_shift, scale, offset, other_bias,
        other_gain, other_shift, other_ids, size_own, size_other, skip0, skip1, skip2, OTHER,
        OWN_BIAS, OTHER_BIAS, RELATION, SKIPS, WEIGHT, GAIN, UNIT, MASKED,
    )  # fmt: skip


@triton.jit
def _own_side(
    first, size, bias, gain, shift, ids, BIAS: tl.constexpr, RELATION: tl.constexpr,
    UNIT: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Indices, ids and vectors of the own block as columns [OWN, 1]."""
    b, g, m = _vectors(first, size, bias, gain, shift, BIAS, UNIT, OWN)
    if BIAS:
        b = b[:, None]
    if gain is not None:
        g = g[:, None]
    if shift is not None:
        m = m[:, None]
    own_ids = 0
    if RELATION != "any":
        own_ids = load_vector(ids, first, size, OWN)[:, None]
    return (first + tl.arange(0, OWN))[:, None], own_ids, b, g, m


@triton.jit
def _accumulate(
    total, row_sum, top, w, t, other, start, size_other, D: tl.constexpr, OTHER: tl.constexpr,
    PRODUCT: tl.constexpr, ROW_SUM: tl.constexpr, MAXIMA: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    if PRODUCT:
        rows = load_rows(other, start, size_other, 0, D, D, OTHER)
        if WIDE or EMULATE:
            rows = rows.to(tl.float32)
        if WIDE:
            total = tl.dot(w, rows, total, input_precision="tf32")
        else:
            total = tl.dot(w.to(rows.dtype), rows, total, input_precision=PRECISION)
    if ROW_SUM:
        row_sum += tl.sum(w, 1)
    if MAXIMA:
        top = tl.maximum(top, tl.max(t, 1))
    return total, row_sum, top


@triton.jit(do_not_specialize=SIZES)
def product(
    own, other, scale, offset, factor, own_bias, other_bias, own_gain, other_gain, own_shift,
    other_shift, own_ids, other_ids, out, row_sums, tops, size_own, size_other,
    skip0, skip1, skip2,
    D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    OWN_BIAS: tl.constexpr, OTHER_BIAS: tl.constexpr, RELATION: tl.constexpr,
    SKIPS: tl.constexpr, WEIGHT: tl.constexpr, GAIN: tl.constexpr, UNIT: tl.constexpr,
    PRODUCT: tl.constexpr, ROW_SUM: tl.constexpr, MAXIMA: tl.constexpr, FACTOR: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Slots of out [splits, N, D], row_sums [splits, N] and tops [splits, N].

    Grid (own blocks, splits). "both_fixed" and "both_online" are launched one after the other
    and look at the offset: one of them returns at once.
    """
    shift = 0.0
    if WEIGHT == "both_fixed" or WEIGHT == "both_online":
        shift = tl.load(offset) * LOG2E
    if WEIGHT == "exp":
        shift = exponent_offset(tl.load(scale), tl.maximum(size_own, size_other))
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(offset, shift * LN2)
    if WEIGHT == "both_fixed":
        if shift != shift:
            return
    if WEIGHT == "both_online":
        if shift == shift:
            return
    first = tl.program_id(0) * OWN
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    unit = tl.load(scale) * UNIT
    held = own
    if BD == D:
        held = load_rows(own, first, size_own, 0, D, D, OWN)
    own_index, ids, bias, gain, level = _own_side(
        first, size_own, own_bias, own_gain, own_shift, own_ids, OWN_BIAS, RELATION, UNIT, OWN
    )
    total = tl.zeros([OWN, D if PRODUCT else 16], tl.float32)
    row_sum = tl.zeros([OWN], tl.float32)
    top = tl.full([OWN], -NEVER, tl.float32)
    tiles = tl.cdiv(size_other, OTHER)
    for tile in range(split, tiles, splits):
        start = tile * OTHER
        # rows past the own edge are never written, so only the other edge and offsets matter
        hit = touched(first, start, first + OWN, size_other, skip0, skip1, skip2, SKIPS, OWN, OTHER)
        w, t = _tile(
            held, first, start, tl.where(hit, NEVER, 0.0), own_index, ids, bias, gain, level, own,
            other, unit, shift, other_bias, other_gain, other_shift, other_ids, size_own,
            size_other, skip0, skip1, skip2, D, BD, OWN, OTHER, OWN_BIAS, OTHER_BIAS, RELATION,
            SKIPS, WEIGHT, GAIN, UNIT, False, PRECISION, EMULATE,
        )  # fmt: skip
        total, row_sum, top = _accumulate(
            total, row_sum, top, w, t, other, start, size_other, D, OTHER, PRODUCT, ROW_SUM,
            MAXIMA, WIDE, PRECISION, EMULATE,
        )  # fmt: skip
    for tile in range(split, tiles, splits):
        start = tile * OTHER
        if touched(first, start, first + OWN, size_other, skip0, skip1, skip2, SKIPS, OWN, OTHER):
            w, t = _tile(
                held, first, start, 0.0, own_index, ids, bias, gain, level, own, other, unit, shift,
                other_bias, other_gain, other_shift, other_ids, size_own, size_other,
                skip0, skip1, skip2, D, BD, OWN, OTHER, OWN_BIAS, OTHER_BIAS, RELATION, SKIPS,
                WEIGHT, GAIN, UNIT, True, PRECISION, EMULATE,
            )  # fmt: skip
            total, row_sum, top = _accumulate(
                total, row_sum, top, w, t, other, start, size_other, D, OTHER, PRODUCT, ROW_SUM,
                MAXIMA, WIDE, PRECISION, EMULATE,
            )  # fmt: skip
    row = first + tl.arange(0, OWN)
    slot = tl.cast(split, tl.int64) * size_own
    if PRODUCT:
        if FACTOR:
            total = total * tl.load(factor)
        at = (slot + row[:, None]) * D + tl.arange(0, D)[None, :]
        tl.store(out + at, total, mask=row[:, None] < size_own)
    if ROW_SUM:
        tl.store(row_sums + slot + row, row_sum, mask=row < size_own)
    if MAXIMA:
        tl.store(tops + slot + row, top, mask=row < size_own)


@triton.jit(do_not_specialize=SIZES)
def write_weights(
    own, other, scale, offset, own_bias, other_bias, own_gain, other_gain, own_shift,
    other_shift, own_ratio, other_ratio, own_ids, other_ids, out, begin, rows, left, pitch,
    size_own, size_other, skip0, skip1, skip2,
    D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
    OWN_BIAS: tl.constexpr, OTHER_BIAS: tl.constexpr, RELATION: tl.constexpr,
    SKIPS: tl.constexpr, WEIGHT: tl.constexpr, GAIN: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """W of own rows [begin, begin + rows) against the others from ``left`` on, in out's dtype:
    out [rows, M - left], its rows ``pitch`` apart; the columns between are written too, because
    whole vectors leave a thread only where a mask's end divides by their length.

    With ratios, weights are "both_fixed" by them where the offset is valid, and "both_online" by
    gains and shifts where not. Grid (own blocks of the chunk * other blocks,): a second dimension
    ends at 65535 blocks.
    """
    blocks = tl.cdiv(rows, OWN)
    block = tl.program_id(0) % blocks
    first = begin + block * OWN
    start = left + tl.program_id(0) // blocks * OTHER
    held = own
    if BD == D:
        held = load_rows(own, first, size_own, 0, D, D, OWN)
    own_index, ids, bias, gain, level = _own_side(
        first, size_own, own_bias, own_gain, own_shift, own_ids, OWN_BIAS, RELATION, UNIT, OWN
    )
    s = scores(
        held, own, first, size_own, other, start, size_other, D, BD, OWN, OTHER,
        PRECISION, EMULATE, "rows",
    )  # fmt: skip
    unit = tl.load(scale) * UNIT
    shift = 0.0
    if own_ratio is not None:
        shift = tl.load(offset) * LOG2E
        if shift == shift:
            ratio = load_vector(own_ratio, first, size_own, OWN)[:, None]
            w, _ = _weigh(
                s, start, 0.0, own_index, ids, bias, ratio, 0.0, unit, shift, other_bias,
                other_ratio, None, other_ids, size_own, size_other, skip0, skip1, skip2, OTHER,
                OWN_BIAS, OTHER_BIAS, RELATION, SKIPS, "both_fixed", GAIN, UNIT, False,
            )  # fmt: skip
        else:
            w, _ = _weigh(
                s, start, 0.0, own_index, ids, bias, gain, level, unit, shift, other_bias,
                other_gain, other_shift, other_ids, size_own, size_other, skip0, skip1, skip2,
                OTHER, OWN_BIAS, OTHER_BIAS, RELATION, SKIPS, WEIGHT, GAIN, UNIT, False,
            )  # fmt: skip
    else:
        w, _ = _weigh(
            s, start, 0.0, own_index, ids, bias, gain, level, unit, shift, other_bias, other_gain,
            other_shift, other_ids, size_own, size_other, skip0, skip1, skip2, OTHER, OWN_BIAS,
            OTHER_BIAS, RELATION, SKIPS, WEIGHT, GAIN, UNIT, False,
        )  # fmt: skip
    # what lies past the edges is never read
    if touched(first, start, first + OWN, start + OTHER, skip0, skip1, skip2, SKIPS, OWN, OTHER):
        index = (start + tl.arange(0, OTHER))[None, :]
        keep = kept(own_index, index, size_own, size_other, skip0, skip1, skip2, SKIPS)
        w = tl.where(keep, w, 0.0)
    row = block * OWN + tl.arange(0, OWN)
    column = start - left + tl.arange(0, OTHER)
    at = row[:, None].to(tl.int64) * pitch + column[None, :]
    tl.store(
        out + at,
        w.to(out.dtype.element_ty),
        mask=(row[:, None] < rows) & (column[None, :] < pitch),
    )


@triton.jit
def add_slots(slots, factor, out, count, size, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = factor * the sum of slots [count, size], added in order, eight at a time."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(0, count, 8):
        which = slot + tl.arange(0, 8)[:, None]
        part = tl.load(
            slots + which.to(tl.int64) * size + index[None, :],
            mask=(which < count) & (index[None, :] < size),
            other=0.0,
        )
        total += tl.sum(part, 0)
    if FACTOR:
        total = total * tl.load(factor)
    tl.store(out + index, total, mask=index < size)


@triton.jit
def _magnitude(grad, logsum, index, size):
    """|gradient|, or 0 for one that shall not set the unit of the others: that of an empty sum
    (-inf), through which nothing flows, or a broken one."""
    magnitude = tl.abs(tl.load(grad + index, mask=index < size, other=0.0).to(tl.float32))
    empty = tl.load(logsum + index, mask=index < size, other=0.0) == -float("inf")
    return tl.where(empty | (magnitude == float("inf")) | (magnitude != magnitude), 0.0, magnitude)


@triton.jit
def largest_gradient(grad0, logsum0, grad1, logsum1, out, size0, size1, BLOCK: tl.constexpr):
    """Slots [2 * programs] of the largest |gradient| of rows (first half) and of columns."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    top0 = tl.zeros([BLOCK], tl.float32)
    for start in range(program * BLOCK, size0, programs * BLOCK):
        index = start + tl.arange(0, BLOCK)
        top0 = tl.maximum(top0, _magnitude(grad0, logsum0, index, size0))
    tl.store(out + program, tl.max(top0, 0))
    top1 = tl.zeros([BLOCK], tl.float32)
    for start in range(program * BLOCK, size1, programs * BLOCK):
        index = start + tl.arange(0, BLOCK)
        top1 = tl.maximum(top1, _magnitude(grad1, logsum1, index, size1))
    tl.store(out + programs + program, tl.max(top1, 0))


@triton.jit
def gains(
    grad, logsum, tops, scale, offset, gain, shift, ratio, unit, size,
    SLOTS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What weights are made of: gain = gradient / unit, shift = log2-sum-exp and, for both_fixed,
    ratio = gain * 2^(offset - shift).

    ``unit`` [2] receives a power of two near the largest gradient, over 2^ROOM, and its product
    with the scale: weights of 16 bits then use their range, and gradients as small as 1e-19
    against sums as large as 1e30 keep their quotient out of the subnormal numbers.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    top = tl.max(tl.load(tops + tl.arange(0, SLOTS)), 0)
    power = tl.math.exp2(tl.floor(tl.log2(tl.maximum(top, 1.2e-38)))) * (2.0**-ROOM)
    power = tl.maximum(power, 1.2e-38)
    if tl.program_id(0) == 0:
        tl.store(unit, power)
        tl.store(unit + 1, power * tl.load(scale))
    sums = tl.load(logsum + index, mask=inside, other=0.0)
    empty = sums == -float("inf")
    g = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(empty, 0.0, g / power)
    s = tl.where(empty, 0.0, sums * LOG2E)
    tl.store(gain + index, g, mask=inside)
    tl.store(shift + index, s, mask=inside)
    tl.store(ratio + index, g * tl.math.exp2(tl.load(offset) * LOG2E - s), mask=inside)

"""The best-scoring other rows of each own row: a running list that a tile's winners enter.

Winners enter one per row and round, in place of the worst of the list; a tile takes as many
rounds as its luckiest row has winners, which is none for most tiles once the list is good.

A score and its index are one 64-bit integer, ordered by score and then by falling index, so that
every candidate is distinct and the result does not depend on the order of merging.
"""

import triton
import triton.language as tl

from .tile import kept, load_rows, load_vector, related, scores

# sizes and offsets change from call to call, and no kernel is compiled anew for them
LAST = tl.constexpr(0x7FFFFFFF)
SIZES = ["size_own", "size_other", "skip0", "skip1", "skip2"]


@triton.jit
def _pack(score, index):
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit(do_not_specialize=SIZES)
def topk(
    own, other, scale, own_bias, below, own_ids, other_ids, out, size_own, size_other,
    skip0, skip1, skip2,
    D: tl.constexpr, BD: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, BELOW: tl.constexpr, RELATION: tl.constexpr, SKIPS: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Packed candidates out [N, splits, K] in any order; K is a power of two.

    Grid (own blocks, splits). Dropped pairs are packed as -inf of the last index.
    """
    first = tl.program_id(0) * OWN
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    factor = tl.load(scale)
    held = own
    if BD == D:
        held = load_rows(own, first, size_own, 0, D, D, OWN)
    ids = own_ids
    if RELATION != "any":
        ids = load_vector(own_ids, first, size_own, OWN)[:, None]
    limit = 0.0
    if BELOW:
        limit = load_vector(below, first, size_own, OWN)[:, None]
    row = first + tl.arange(0, OWN)
    slot = tl.arange(0, K)[None, :]
    nothing = _pack(tl.full([OWN], -float("inf"), tl.float32), tl.full([OWN], LAST, tl.int32))
    best = nothing[:, None] + tl.zeros([OWN, K], tl.int64)
    for start in range(split * OTHER, size_other, splits * OTHER):
        t = factor * scores(
            held, own, first, size_own, other, start, size_other, D, BD, OWN, OTHER,
            PRECISION, EMULATE, "rows",
        )  # fmt: skip
        if BIAS:
            t += load_vector(own_bias, start, size_other, OTHER)[None, :]
        column = start + tl.arange(0, OTHER)
        keep = kept(row[:, None], column[None, :], size_own, size_other, skip0, skip1, skip2, SKIPS)
        if RELATION != "any":
            keys = load_vector(other_ids, start, size_other, OTHER)[None, :]
            keep = keep & related(ids, keys, RELATION)
        if BELOW:
            keep = keep & (t < limit)
        index = tl.where(keep, column[None, :], LAST)
        packed = _pack(tl.where(keep, t, -float("inf")), index)
        top, worst = tl.max(packed, 1), tl.min(best, 1)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            place = tl.argmin(best, 1)
            enters = (top > worst)[:, None] & (slot == place[:, None])
            best = tl.where(enters, top[:, None], best)
            packed = tl.where(packed == top[:, None], nothing[:, None], packed)
            top, worst = tl.max(packed, 1), tl.min(best, 1)
    place = (row[:, None].to(tl.int64) * splits + split) * K + slot
    tl.store(out + place, best, mask=row[:, None] < size_own)

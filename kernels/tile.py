"""What every kernel does to a tile: load rows, form scores, apply the pair rule.

A kernel holds a block of its *own* rows and streams blocks of the *other* operand past it. Which
of queries and keys is the own side is the launcher's choice, so a rule's offsets are always given
as (other index - own index). Rows are packed: contiguous, D a power of two or a multiple of 64.

Tiles that a rule or a ragged edge touches are few. The main loop of a kernel runs without any
mask and makes such tiles count for nothing (:func:`touched_or` moves their exponents out of
range); a second loop then does them with the mask. The main loop thereby keeps the registers and
instructions of the problem without a rule.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(1e30)  # an exponent offset after which 2^x is 0 for any score
LOST = tl.constexpr(2.0**-100)  # a sum below this may have lost terms to underflow


@triton.jit
def load_rows(x, first, size, d, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Rows ``first + [0, ROWS)`` and columns ``d + [0, BD)``; the last row repeats past the end."""
    row = tl.minimum(tl.arange(0, ROWS), size - 1 - first)
    start = x + tl.cast(first, tl.int64) * D + d
    return tl.load(start + row[:, None] * D + tl.arange(0, BD)[None, :])


@triton.jit
def load_vector(x, first, size, ROWS: tl.constexpr):
    """Entries ``first + [0, ROWS)``; the last one repeats past the end."""
    index = tl.minimum(tl.arange(0, ROWS), size - 1 - first)
    return tl.load(x + first + index)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """a b^T with fp32 accumulation. ``EMULATE``: the interpreter multiplies bf16 wrongly."""
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def scores(
    a, rows, first_row, size_rows, columns, first_column, size_columns,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Inner products [R, C]. ``a`` is the held block, of ``HELD`` "rows" or "columns", where D
    fits one block; wider rows are streamed in blocks of BD on both sides."""
    if BD == D:
        if HELD == "rows":
            b = load_rows(columns, first_column, size_columns, 0, D, D, C)
            s = dot(a, b, PRECISION, EMULATE)
        else:
            b = load_rows(rows, first_row, size_rows, 0, D, D, R)
            s = dot(b, a, PRECISION, EMULATE)
    else:
        s = tl.zeros([R, C], tl.float32)
        for d in range(0, D, BD):
            x = load_rows(rows, first_row, size_rows, d, D, BD, R)
            y = load_rows(columns, first_column, size_columns, d, D, BD, C)
            s += dot(x, y, PRECISION, EMULATE)
    return s


@triton.jit
def touched(
    own, other, size_own, size_other, skip0, skip1, skip2,
    SKIPS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Whether the tile that begins at (own, other) holds a skipped offset or an edge."""
    hit = (own + OWN > size_own) | (other + OTHER > size_other)
    apart = other - own
    if SKIPS > 0:
        hit = hit | ((skip0 > apart - OWN) & (skip0 < apart + OTHER))
    if SKIPS > 1:
        hit = hit | ((skip1 > apart - OWN) & (skip1 < apart + OTHER))
    if SKIPS > 2:
        hit = hit | ((skip2 > apart - OWN) & (skip2 < apart + OTHER))
    return hit


@triton.jit
def kept(own, other, size_own, size_other, skip0, skip1, skip2, SKIPS: tl.constexpr):
    """The offsets of the rule and the edges as a mask; indices come in their broadcast shapes."""
    keep = (own < size_own) & (other < size_other)
    apart = other - own
    if SKIPS > 0:
        keep = keep & (apart != skip0)
    if SKIPS > 1:
        keep = keep & (apart != skip1)
    if SKIPS > 2:
        keep = keep & (apart != skip2)
    return keep


@triton.jit
def related(own_ids, other_ids, RELATION: tl.constexpr):
    """The rule's relation on ids as a mask; ids come in their broadcast shapes."""
    if RELATION == "same":
        keep = own_ids == other_ids
    else:
        keep = own_ids != other_ids
    return keep


@triton.jit
def exponent_offset(scale, size):
    """The balanced offset in log2 units, for unit rows: just what would overflow is taken off.

    Scores of other rows may still overflow or vanish; the sums show it, see ``finish``.
    """
    bound = tl.abs(scale) * (LOG2E * 1.01)
    room = 124.0 - tl.log2(tl.cast(size, tl.float32))
    return tl.maximum(0.0, bound - room)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1] to a few ulp, as 2 atanh(x / (2 + x)) in powers of the square.

    The hardware's logarithm is only exact to 2^-22 absolutely, and sums of softplus are made of
    smaller terms than that.
    """
    z = x / (2.0 + x)
    y = z * z
    series = 1.0 / 15.0
    series = series * y + 1.0 / 13.0
    series = series * y + 1.0 / 11.0
    series = series * y + 1.0 / 9.0
    series = series * y + 1.0 / 7.0
    series = series * y + 0.2
    series = series * y + 1.0 / 3.0
    return 2.0 * z * (series * y + 1.0)

"""Log-sum-exp over tiles, in one of two regimes.

- *Fixed offset* c: one exponential per pair, 2^(s - c), serves its row and its column. The offset
  is the balanced one of :func:`_fixed_offset`, checked against underflow afterwards.
- *Online maximum*: a running maximum per row and per column, exact for any finite input. Taken
  where the fixed offset could lose a row, and on accelerators, where looking would stall them.

Scores are in log2 units throughout: log2 e is folded into the queries, and exp2 is the cheaper
exponential on CPUs and the native one on GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import accumulator
from .problem import Problem, accumulate, at, blocks, tile_shape

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# Per accumulator: the largest x for which 2^x and 2^-x are normal with room for rounding, and
# the exponent below which a sum may have lost terms to underflow.
_EXPONENT_RANGE = {torch.float32: 124.0, torch.float64: 1020.0}
_LOST = {torch.float32: 2.0**-100, torch.float64: 2.0**-900}


def _bound(p: Problem) -> float:
    """A bound on |score| by Cauchy and Schwarz, in log2 units."""
    _, m, d = p.shape
    longest = 0.0
    height, _ = tile_shape(m, d, p.queries.device)
    for block in blocks(m, height):
        longest = max(longest, float(torch.linalg.vector_norm(p.keys_of(block), dim=1).amax()))
    bound = float(torch.linalg.vector_norm(p.scaled, dim=1).amax()) * longest
    return bound if p.bias is None else bound + float(p.bias.abs().amax())


def _fixed_offset(p: Problem) -> tuple[float, bool]:
    """The balanced offset in log2 units (NaN: use the online maximum), and whether to check sums.

    Scores lie in [-b, b]. Offset 0 is safe while b plus log2 of the count fits the exponent;
    beyond that the offset takes just what would overflow, so that a row is lost only if all its
    scores lie near -b. Once unrelated rows (scores near 0) would be lost, trying is pointless.
    """
    if p.queries.device.type != "cpu":
        return math.nan, False
    bound = _bound(p)
    limit = _EXPONENT_RANGE[p.queries.dtype]
    offset = max(bound - (limit - math.log2(max(p.shape))), 0.0)  # NaN stays NaN, being first
    if not offset < -math.log2(_LOST[p.queries.dtype]):
        return math.nan, False
    return offset, bound + offset > limit


def similarity_logsumexp(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima, save,
    precision,
):  # fmt: skip
    acc = accumulator(precision)
    rule = (query_ids, key_ids, relation, skip)
    p = Problem.of(queries, keys, scale, key_bias, rule, acc, LOG2E)
    offset, check = _fixed_offset(p)
    if not math.isnan(offset):
        outputs = _fixed(p, offset, columns, maxima, save)
        sums = outputs[:2] if check else ()
        threshold = offset * LN2 + math.log(_LOST[acc])
        if not any(bool((s < threshold).any()) for s in sums):
            return outputs
    return _online(p, columns, maxima, save)


def _fixed(p: Problem, offset: float, columns: bool, maxima: bool, save: str):
    n, m, d = p.shape
    new = p.queries.new_zeros
    row_sum, row_max = new(n), new(n if maxima else 0)
    # a symmetric tile feeds its columns' rows; both names then mean the same vector
    column_sum = row_sum if p.symmetric else new(m if columns else 0)
    column_max = row_max if p.symmetric else new(m if maxima and columns else 0)
    mean = new(n, d) if save == "mean_keys" else None
    kept = new(n, m) if save == "exponentials" else None

    for rows, cols, scratch in p.tiles():
        e = scratch if kept is None else at(kept, rows)[:, cols.start : cols.stop]
        keys = p.keys_of(cols)
        p.score(rows, cols, keys, e)
        if offset:
            e.sub_(offset)
        p.drop(e.exp2_(), rows, cols, 0.0)
        sides = [(rows, 1, row_sum, row_max)]
        if columns or (p.symmetric and rows != cols):
            sides.append((cols, 0, column_sum, column_max))
        for block, dim, sums, largest in sides:
            at(sums, block).add_(e.sum(dim))
            if maxima:
                at(largest, block).copy_(torch.maximum(at(largest, block), e.amax(dim)))
        if mean is not None:
            at(mean, rows).addmm_(e, keys)

    if mean is not None:
        mean.div_(torch.where(row_sum > 0, row_sum, 1.0)[:, None])
    shift = offset * LN2
    if p.symmetric:
        column_sum, column_max = new(0), new(0)
    return (
        *(s.log().add_(shift) for s in (row_sum, column_sum, row_max, column_max)),
        next((t for t in (mean, kept) if t is not None), new(0)),
        p.queries.new_full((), shift),
    )


class _Running:
    """Running maximum and sum of 2^score per row (or column), merged tile by tile."""

    def __init__(self, like: Tensor, length: int):
        self.max = like.new_full((length,), float("-inf"))
        self.sum = like.new_zeros(length)

    def add(self, block: range, tile: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Merge ``tile`` along ``dim``; returns its exponentials and what rescales older sums."""
        old = at(self.max, block)
        new = torch.maximum(old, tile.amax(dim))
        finite = torch.where(torch.isneginf(new), 0.0, new)
        e = (tile - finite.unsqueeze(dim)).exp2_()
        rescale = torch.exp2(old - finite)
        at(self.sum, block).mul_(rescale).add_(e.sum(dim))
        old.copy_(new)
        return e, rescale

    def logsumexp(self) -> Tensor:
        return (self.max + self.sum.log2()) * LN2


def _online(p: Problem, columns: bool, maxima: bool, save: str):
    n, m, d = p.shape
    new = p.queries.new_zeros
    row = _Running(p.queries, n)
    column = row if p.symmetric else _Running(p.queries, m if columns else 0)
    mean = new(n, d) if save == "mean_keys" else None
    for rows, cols, scratch in p.tiles():
        keys = p.keys_of(cols)
        s = p.drop(p.score(rows, cols, keys, scratch), rows, cols, float("-inf"))
        e, rescale = row.add(rows, s, 1)
        if mean is not None:
            at(mean, rows).mul_(rescale[:, None]).addmm_(e, keys)
        if columns or (p.symmetric and rows != cols):
            column.add(cols, s, 0)
    saved = new(0)
    if mean is not None:
        saved = mean.div_(row.sum.clamp_min(1.0)[:, None])
    elif save == "exponentials":
        saved = new(n, m)  # no meaning; the NaN offset says so
    other = _Running(p.queries, 0) if p.symmetric else column
    return (
        row.logsumexp(),
        other.logsumexp(),
        row.max * LN2 if maxima else new(0),
        other.max * LN2 if maxima else new(0),
        saved,
        p.queries.new_full((), float("nan")),
    )


@dataclass
class _Side:
    """One family of sums: its gradients and its log-sum-exps, both 0 where nothing was kept."""

    grad: Tensor
    logsum: Tensor  # log2 units

    @classmethod
    def of(cls, grad: Tensor, logsum: Tensor, acc: torch.dtype) -> _Side:
        empty = torch.isneginf(logsum)
        return cls(
            torch.where(empty, 0.0, grad.to(acc)),
            torch.where(empty, 0.0, logsum.to(acc) * LOG2E),
        )

    def against(self, offset: float) -> Tensor:
        """What 2^(s - offset) must be multiplied with to give grad * exp(s - logsum)."""
        return self.grad * torch.exp2(offset - self.logsum)


def _shrink(sides: list[_Side]) -> Tensor:
    """Divide all gradients by a power of two near the largest, and return it.

    They may be as small as 1e-19 where the sums are as large as 1e30; this keeps their quotient
    out of the subnormal numbers.
    """
    # one broken gradient shall not spoil the others
    known = [torch.nan_to_num(side.grad.abs(), nan=0.0, posinf=0.0) for side in sides]
    largest = torch.stack([grad.amax() for grad in known]).amax()
    size = torch.exp2(largest.clamp_min(torch.finfo(largest.dtype).tiny).log2().floor())
    for side in sides:
        side.grad = side.grad / size
    return size


def similarity_logsumexp_backward(
    grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip,
    rows, columns, saved, offset, save, needs, precision,
):  # fmt: skip
    acc = accumulator(precision)
    rule = (query_ids, key_ids, relation, skip)
    p = Problem.of(queries, keys, scale, key_bias, rule, acc, LOG2E)
    by_row = _Side.of(grad_rows, rows, acc)
    by_column = None if grad_columns is None else _Side.of(grad_columns, columns, acc)
    size = _shrink([by_row] if by_column is None else [by_row, by_column])
    if p.symmetric:
        by_column = by_row
    # on accelerators the offset stays where it is: the online form needs none
    fixed = float(offset) * LOG2E if queries.device.type == "cpu" else math.nan

    def weigh_online(row_block, column_block, keys_block, scratch):
        s = p.score(row_block, column_block, keys_block, scratch)
        p.drop(s, row_block, column_block, float("-inf"))
        w = (s - at(by_row.logsum, row_block)[:, None]).exp2_()
        w.mul_(at(by_row.grad, row_block)[:, None])
        if by_column is not None:
            other = (s - at(by_column.logsum, column_block)).exp2_()
            w.addcmul_(other, at(by_column.grad, column_block))
        return w

    if math.isnan(fixed):
        return accumulate(p, scale, weigh_online, size, [*needs, False])[:4]
    u = by_row.against(fixed)
    v = None if by_column is None else by_column.against(fixed)
    spare = None if v is None else p.scratch()

    def weigh_fixed(row_block, column_block, keys_block, scratch):
        if save == "exponentials":
            e = at(saved, row_block)[:, column_block.start : column_block.stop]
            if p.symmetric and row_block == column_block:
                e = e.triu() + e.triu(1).mT  # a symmetric problem keeps only j >= i
        else:
            e = p.score(row_block, column_block, keys_block, scratch)
            if fixed:
                e.sub_(fixed)
            p.drop(e.exp2_(), row_block, column_block, 0.0)
        both = at(u, row_block)[:, None]
        if v is not None and spare is not None:
            out = spare[: scratch.numel()].view_as(scratch)
            both = torch.add(both, at(v, column_block), out=out)
        return torch.mul(e, both, out=scratch)

    return accumulate(p, scale, weigh_fixed, size, [*needs, False])[:4]

"""Operands, tiles and the two gradient products that all tiled reductions share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pairs import keep_mask

# Numbers in a tile. 2^19 fp32 numbers are the 2 MB that two cores' L2 hold; see
# benchmarks/tiles.py, which prints the times behind this choice. Accelerators want few launches.
_TILE = {"cpu": 2**19}
_TILE_ELSEWHERE = 2**24


def tile_shape(n: int, m: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile of an N x M problem: square, or a strip along the longer side."""
    area = _TILE.get(device.type, _TILE_ELSEWHERE)
    side = math.isqrt(area)
    rows = min(n, side if m > side else max(side, area // max(m, 1)))
    return rows, min(m, max(1, area // rows))


def blocks(length: int, size: int) -> Iterator[range]:
    """``range(length)`` in pieces of at most ``size``."""
    for start in range(0, length, size):
        yield range(start, min(start + size, length))


def at(tensor: Tensor, block: range) -> Tensor:
    """The view of ``tensor`` along its first dimension."""
    return tensor[block.start : block.stop]


@dataclass
class Problem:
    """Operands in the accumulator's dtype, and the rule."""

    queries: Tensor  # [N, D]
    scaled: Tensor  # [N, D], scale * unit * queries
    keys: Tensor  # [M, D] as stored; the queries themselves when symmetric
    bias: Tensor | None  # [M], in the scores' unit
    rule: tuple[Tensor | None, Tensor | None, str, list[int]]
    symmetric: bool

    @classmethod
    def of(cls, queries, keys, scale, key_bias, rule, acc: torch.dtype, unit: float) -> Problem:
        """``unit`` multiplies every score: log2 e where exponentials follow, else 1."""
        query_ids, key_ids, relation, skip = rule
        q = queries.to(acc)
        return cls(
            queries=q,
            scaled=q * (scale.to(acc) * unit),
            keys=q if keys is None else keys,
            bias=None if key_bias is None else key_bias.to(acc) * unit,
            rule=(query_ids, query_ids if keys is None else key_ids, relation, list(skip)),
            symmetric=keys is None,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, M and D."""
        return self.queries.shape[0], self.keys.shape[0], self.queries.shape[1]

    def tile(self) -> tuple[int, int]:
        """Height and width of the largest tile."""
        n, m, _ = self.shape
        height, width = tile_shape(n, m, self.queries.device)
        return (min(height, width),) * 2 if self.symmetric else (height, width)

    def scratch(self) -> Tensor:
        """Room for one tile. Taken once per sweep: the C library maps fresh pages for a block of
        this size, and touching them costs as much as the arithmetic."""
        height, width = self.tile()
        return self.queries.new_empty(height * width)

    def tiles(self) -> Iterator[tuple[range, range, Tensor]]:
        """Row block, column block and scratch for their scores; the upper triangle if symmetric."""
        n, m, _ = self.shape
        height, width = self.tile()
        scratch = self.scratch()
        for columns in blocks(m, width):
            for rows in blocks(columns.stop if self.symmetric else n, height):
                tile = scratch[: len(rows) * len(columns)].view(len(rows), len(columns))
                yield rows, columns, tile

    def keys_of(self, columns: range) -> Tensor:
        """Keys [len(columns), D] in the accumulator's dtype."""
        return at(self.keys, columns).to(self.queries.dtype)

    def score(self, rows: range, columns: range, keys: Tensor, out: Tensor) -> Tensor:
        """Scores of a tile, in ``unit``; ``keys`` are those of ``columns``."""
        torch.mm(at(self.scaled, rows), keys.mT, out=out)
        return out if self.bias is None else out.add_(at(self.bias, columns))

    def drop(self, tile: Tensor, rows: range, columns: range, value: float) -> Tensor:
        """Overwrite the pairs of ``tile`` that do not count with ``value``."""
        if self.rule[0] is not None:
            keep = keep_mask(*self.rule, rows, columns, tile.device)
            return tile if keep is None else tile.masked_fill_(~keep, value)
        for offset in self.rule[3]:  # without ids, diagonals of the tile and no mask
            diagonal = offset - columns.start + rows.start
            if -len(rows) < diagonal < len(columns):
                tile.diagonal(diagonal).fill_(value)
        return tile


def accumulate(
    p: Problem,
    scale: Tensor,
    weigh: Callable[[range, range, Tensor, Tensor], Tensor],
    size: Tensor | float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients from the weights W = dLoss/dScore, formed tile by tile by ``weigh``.

    Args:
        weigh: (rows, columns, keys, scratch) -> W / size on that tile.
        size: what W was divided by to keep it in range.
        needs: whether queries, keys, scale, key bias and row bias want a gradient.

    Returns:
        scale W k [N, D], scale W^T q [M, D], <q, W k> [], column sums [M], row sums [N]; an empty
        tensor for what nobody needs. When symmetric, the first holds the whole gradient.
    """
    need_queries, need_keys, need_scale, need_bias, need_row_bias = needs
    n, m, d = p.shape
    new = p.queries.new_zeros
    product = new(n, d) if need_queries or need_scale else None
    transposed = new(m, d) if need_keys and not p.symmetric else None
    column_sums = new(m) if need_bias else None
    row_sums = new(n) if need_row_bias else None
    for rows, columns, scratch in p.tiles():
        keys = p.keys_of(columns)
        w = weigh(rows, columns, keys, scratch)
        if product is not None:
            at(product, rows).addmm_(w, keys)
            if p.symmetric and rows != columns:
                at(product, columns).addmm_(w.mT, at(p.queries, rows))
        if transposed is not None:
            at(transposed, columns).addmm_(w.mT, at(p.queries, rows))
        if column_sums is not None:
            at(column_sums, columns).add_(w.sum(0))
        if row_sums is not None:
            at(row_sums, rows).add_(w.sum(1))

    factor = scale.to(p.queries.dtype) * size
    grad_scale = None
    if (
        product is not None and need_scale
    ):  # each unordered pair stands twice in a symmetric product
        inner = torch.linalg.vecdot(p.queries, product).sum()
        grad_scale = inner * (size * (0.5 if p.symmetric else 1.0))
    gradients = (
        product.mul_(factor) if product is not None and need_queries else None,
        None if transposed is None else transposed.mul_(factor),
        grad_scale,
        None if column_sums is None else column_sums.mul_(size),
        None if row_sums is None else row_sums.mul_(size),
    )
    return tuple(new(0) if gradient is None else gradient for gradient in gradients)

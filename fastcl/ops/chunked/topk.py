"""The k best-scoring keys of each query, without the score matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import accumulator
from .problem import Problem, at, blocks, tile_shape


def _best(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest per row, descending; among equals those that stand first.

    ``torch.topk`` leaves the order of ties open, so it only finds the k-th value; a stable sort
    then orders the k entries that are kept.
    """
    if values.shape[1] > k:
        threshold = values.topk(k, dim=1).values[:, -1:]
        above = values > threshold
        tied = values == threshold
        room = k - above.sum(1, keepdim=True)
        chosen = above | (tied & (tied.cumsum(1) <= room))
        values = values[chosen].view(-1, k)
        indices = indices.expand_as(chosen)[chosen].view(-1, k)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, indices.expand_as(order).gather(1, order)


def similarity_topk(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, k, below, precision
):
    acc = accumulator(precision)
    rule = (query_ids, query_ids if keys is None else key_ids, relation, skip)
    p = Problem.of(queries, queries if keys is None else keys, scale, key_bias, rule, acc, 1.0)
    n, m, _ = p.shape
    height, width = tile_shape(n, m, queries.device)
    all_indices = torch.full((n, k), -1, dtype=torch.int64, device=queries.device)
    all_values = p.queries.new_full((n, k), float("-inf"))
    for rows in blocks(n, height):
        values = p.queries.new_empty(len(rows), 0)
        indices = all_indices[:1, :0]
        for columns in blocks(m, width):
            out = p.queries.new_empty(len(rows), len(columns))
            s = p.score(rows, columns, p.keys_of(columns), out)
            p.drop(s, rows, columns, float("-inf"))
            if below is not None:
                s.masked_fill_(s >= at(below, rows)[:, None], float("-inf"))
            here = torch.arange(columns.start, columns.stop, device=s.device)[None]
            best, where = _best(s, here, k)
            # earlier columns stand first, so equal scores keep the lowest index
            values, indices = _best(
                torch.cat([values, best], 1),
                torch.cat([indices.expand(len(rows), -1), where], 1),
                k,
            )
        at(all_values, rows)[:, : values.shape[1]] = values
        at(all_indices, rows)[:, : values.shape[1]] = indices
    return all_indices.masked_fill_(torch.isneginf(all_values), -1), all_values

"""Sums of scores over the pairs that a rule keeps, and their number, without visiting pairs.

A sum that is linear in the scores needs no tile: it is a product with a sum of keys, so it costs
O(N D + M D). Label smoothing, SupCon's positives and the metrics are made of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import Pairs


def pair_count(queries: Tensor, m: int, pairs: Pairs) -> Tensor:
    """How many of ``m`` keys the rule keeps for each query, as floats [N]."""
    if pairs.relation == "any":
        return m - _skipped_count(queries, m, pairs)
    begin, end, _ = _same_id(pairs, queries.shape[0], m)
    return _kept_count(queries, m, pairs, end - begin)


def pair_sums(queries: Tensor, keys: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Sum of <q_i, k_j> over the keys kept for each query [N], and :func:`pair_count`.

    Skipped offsets must join equal ids, as those of a row and itself or its other view do.
    """
    n, m = queries.shape[0], keys.shape[0]
    if pairs.relation == "any":
        kept = keys.sum(0) - _skipped_sum(queries, keys, pairs)
        return (queries * kept).sum(1), m - _skipped_count(queries, m, pairs)
    begin, end, slots = _same_id(pairs, n, m)
    sums = _add_rows(keys, slots)
    same = torch.where((end > begin)[:, None], take_rows(sums, begin.clamp(max=m - 1)), 0.0)
    if pairs.relation == "different":
        kept = keys.sum(0) - same
    else:
        kept = same - _skipped_sum(queries, keys, pairs)
    return (queries * kept).sum(1), _kept_count(queries, m, pairs, end - begin)


# Adding and taking rows have each other as gradient. Of PyTorch's two ways one adds in a fixed
# order on CPUs and the other on GPUs.


def _add_rows(rows: Tensor, slots: Tensor) -> Tensor:
    """For each slot the sum of its rows [M, D]."""
    zeros = torch.zeros_like(rows)
    if rows.is_cuda:
        return zeros.index_put((slots,), rows, accumulate=True)
    return zeros.index_add(0, slots, rows)


def take_rows(rows: Tensor, slots: Tensor) -> Tensor:
    return rows[slots] if rows.is_cuda else rows.index_select(0, slots)


def _kept_count(queries: Tensor, m: int, pairs: Pairs, same: Tensor) -> Tensor:
    same = same.to(queries.dtype)
    if pairs.relation == "different":  # equal ids include the skipped offsets
        return m - same
    return same - _skipped_count(queries, m, pairs)


def _same_id(pairs: Pairs, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each query where keys of its id begin and end among sorted ids; each key's slot there."""
    query_ids, key_ids = pairs.ids(n, m)
    assert query_ids is not None
    assert key_ids is not None
    ordered = key_ids.sort().values
    begin = torch.searchsorted(ordered, query_ids)
    end = torch.searchsorted(ordered, query_ids, right=True)
    return begin, end, torch.searchsorted(ordered, key_ids)


def numbered(*ids: Tensor) -> list[Tensor]:
    """The same ids as small numbers: equal where they are equal, so that arithmetic fits."""
    ordered = torch.cat(ids).sort().values
    return [torch.searchsorted(ordered, x) for x in ids]


def _skipped_count(queries: Tensor, m: int, pairs: Pairs) -> Tensor:
    count = torch.zeros_like(queries[:, 0])
    index = torch.arange(queries.shape[0], device=queries.device)
    for offset in pairs.skip:
        count = count + ((index >= -offset) & (index < m - offset)).to(count.dtype)
    return count


def _skipped_sum(queries: Tensor, keys: Tensor, pairs: Pairs) -> Tensor:
    total = torch.zeros_like(queries)
    m = keys.shape[0]
    index = torch.arange(queries.shape[0], device=queries.device)
    for offset in pairs.skip:
        inside = (index >= -offset) & (index < m - offset)
        total = total + torch.where(inside[:, None], keys[(index + offset).clamp(0, m - 1)], 0.0)
    return total

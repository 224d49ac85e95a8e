"""Log-sum-exp over negatives within groups: patches of an image, steps of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import LogSumExp, Pairs, similarity_logsumexp

# Groups of more rows are swept one by one. Smaller ones are one batched product, of at most this
# many scores per row; a sweep each would cost more calls than arithmetic.
_BATCHED = 1024


def negatives_within(
    queries: Tensor, keys: Tensor, scale: float | Tensor, *, maxima: bool, precision: torch.dtype
) -> LogSumExp:
    """Of each query [G, n, D] over its group's keys [G, n, D] but its own, row by row: [G, n].

    -inf where a group has one row.
    """
    groups, n, _ = queries.shape
    none = queries.new_empty(0)
    if n == 1:
        rows = queries.new_full((groups, 1), float("-inf"))
        return LogSumExp(rows, none, rows if maxima else none, none)
    if n > _BATCHED:
        found = [
            similarity_logsumexp(
                q, k, scale, pairs=Pairs(skip=(0,)), maxima=maxima, precision=precision
            )
            for q, k in zip(queries, keys, strict=True)
        ]
        rows = torch.stack([f.rows for f in found])
        return LogSumExp(
            rows, none, torch.stack([f.row_max for f in found]) if maxima else none, none
        )
    with torch.autocast(queries.device.type, enabled=False):
        scores = torch.bmm(queries, keys.mT) * scale
    own = torch.eye(n, dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(own, float("-inf"))
    largest = scores.detach().amax(2) if maxima else none
    return LogSumExp(torch.logsumexp(scores, 2), none, largest, none)

"""Sums over all pairs or triplets of a batch by label, for pytorch-metric-learning's losses.

Softmax losses are compositions of fastcl's operators. Losses of distances, which are no function
of a score alone or count what is above zero, go through rows of the matrix of distances a block at
a time: a block is formed, reduced and forgotten, and formed again for the backward, so memory is
that of one block. Sums are fp64, because triplets are counted by millions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.common import softmax_loss
from ..losses.distances import by_blocks
from ..ops import Pairs, similarity_logsumexp, similarity_sum
from ..ops.pair_sums import pair_count, pair_sums


@dataclass
class Candidates:
    """Anchors and what they are compared with, by label.

    A pair with ``j - i`` in ``skip`` is an anchor with itself: no positive. Its label is its own,
    so it is no negative either.
    """

    queries: Tensor  # [N, D]
    labels: Tensor  # [N] integers
    keys: Tensor | None  # [M, D], or None for the queries
    key_labels: Tensor | None  # [M]
    skip: tuple[int, ...] = (0,)

    @property
    def m(self) -> int:
        return (self.queries if self.keys is None else self.keys).shape[0]

    @property
    def positives(self) -> Pairs:
        return Pairs("same", self.labels, self.key_labels, self.skip)

    @property
    def negatives(self) -> Pairs:
        return Pairs("different", self.labels, self.key_labels)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Positives and negatives of each anchor, as floats [N]."""
        return tuple(
            pair_count(self.queries.detach(), self.m, rule)
            for rule in (self.positives, self.negatives)
        )  # type: ignore[return-value]


@dataclass
class Sums:
    """What reducers need of all pairs or triplets of a kind, 0-dim each."""

    total: Tensor  # of the losses
    count: Tensor  # how many there are
    above: Tensor | None = None  # how many are above 0

    def reduced(self, reduction: str | None) -> Tensor:
        """``"mean"``, ``"sum"``, or the mean of those ``"above zero"``; 0 where there is none."""
        if reduction == "sum":
            return self.total
        number = self.count if reduction == "mean" else self.above
        assert number is not None
        return self.total / number.clamp_min(1)


def _enough(positives: Tensor, negatives: Tensor) -> Tensor:
    """Whether there is a loss: pairs of both kinds, and more than one of a kind."""
    p, n = positives.sum(), negatives.sum()
    return (p > 0) & (n > 0) & ((p > 1) | (n > 1))


def nt_xent_sums(pairs: Candidates, scale: float | Tensor, precision: torch.dtype) -> Sums:
    """Over positive pairs, of -ln(e^s+ / (e^s+ + sum over the anchor's negatives)).

    The softplus of every positive pair is summed by the operator, whose row bias is the anchor's
    log-sum-exp: no list of pairs. An anchor's single positive is a row's dot product instead,
    because there nothing may cancel.
    """
    queries, keys = pairs.queries, pairs.keys
    positives, negatives = pairs.counts()
    sums = similarity_logsumexp(
        queries, keys, scale, pairs=pairs.negatives, precision=precision
    ).rows
    some = (positives > 0) & (negatives > 0) & _enough(positives, negatives)
    sums = torch.where(negatives > 0, sums, 0.0)
    score = scale * pair_sums(queries, queries if keys is None else keys, pairs.positives)[0]
    several = similarity_sum(
        queries, keys, -scale, phi="softplus", row_bias=sums, pairs=pairs.positives,
        precision=queries.dtype,
    )  # fmt: skip
    losses = torch.where(positives > 1, several, softmax_loss(score, sums))
    return Sums(torch.where(some, losses, 0.0).sum(), positives.sum())


def sup_con_sums(pairs: Candidates, scale: float | Tensor, precision: torch.dtype) -> Sums:
    """Over anchors, of the mean over positives of -ln(e^s+ / sum over all its pairs).

    An anchor without positives has a loss of 0.
    """
    queries, keys = pairs.queries, pairs.keys
    positives, negatives = pairs.counts()
    some = positives > 0
    score = scale * pair_sums(queries, queries if keys is None else keys, pairs.positives)[0]
    score = score / positives.clamp_min(1)

    def sums(rule: Pairs) -> Tensor:
        return similarity_logsumexp(queries, keys, scale, pairs=rule, precision=precision).rows

    # with one positive the sum over positives is its score, exactly
    same = torch.where(positives > 1, sums(pairs.positives), score)
    losses = softmax_loss(same, sums(pairs.negatives)) + (same - score)
    losses = torch.where(some & _enough(positives, negatives), losses, 0.0)
    above = (losses.detach() > 0).sum()
    return Sums(losses.sum(), torch.full_like(above, len(losses)), above)


Distance = Callable[[Tensor, Tensor], Tensor]


def contrastive_sums(pairs: Candidates, distance: Distance, positive, negative) -> list[Sums]:
    """Sums of hinge losses over positive and over negative pairs.

    Args:
        distance: (rows [n, D], rows [m, D]) -> [n, m].
        positive, negative: the signed violation of each distance.
    """

    def block(distances: Tensor, same: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        found = []
        for kept, violation in ((same, positive), (other, negative)):
            loss = torch.relu(violation(distances)).masked_fill(~kept, 0.0).double()
            found += [loss.sum(1), kept.sum(1).double(), (loss.detach() > 0).sum(1).double()]
        return tuple(found)

    found = _by_rows(pairs, distance, block)
    return [Sums(*found[:3]), Sums(*found[3:])]


def triplet_sums(pairs: Candidates, distance: Distance, margin: float) -> Sums:
    """Sums of relu(d_ap - d_an + margin) over all triplets of a batch.

    Negatives are sorted by distance and summed up; of a positive those that violate are the first
    k of them, so its losses are k (d_ap + margin) minus a prefix sum. N M log M, not N M^2.
    """

    def block(distances: Tensor, same: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        far = distances.masked_fill(~other, float("inf")).double().sort(1).values
        bound = distances.double() + margin
        k = torch.searchsorted(far.detach(), bound.detach().contiguous())
        prefix = F.pad(torch.where(torch.isinf(far), 0.0, far).cumsum(1), (1, 0))
        losses = (k * bound - prefix.gather(1, k)).masked_fill(~same, 0.0)
        above = k.masked_fill(~same, 0).sum(1)
        return losses.sum(1), (same.sum(1) * other.sum(1)).double(), above.double()

    return Sums(*_by_rows(pairs, distance, block))


def _by_rows(
    pairs: Candidates, distance: Distance, block: Callable[..., tuple[Tensor, ...]]
) -> list[Tensor]:
    """The sums over anchors of ``block(distances, positives, negatives)``, which gives rows."""
    queries = pairs.queries
    keys = queries if pairs.keys is None else pairs.keys.to(queries.dtype)
    key_labels = pairs.labels if pairs.key_labels is None else pairs.key_labels
    columns = torch.arange(keys.shape[0], device=keys.device)
    index = torch.arange(queries.shape[0], device=keys.device)

    def part(anchors: range, queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        at = slice(anchors.start, anchors.stop)
        equal = pairs.labels[at, None] == key_labels
        same = equal
        for offset in pairs.skip:
            same = same & (columns != index[at, None] + offset)
        return block(distance(queries[at], keys), same, ~equal)

    return [rows.sum() for rows in by_blocks(part, queries, keys, columns=len(keys))]

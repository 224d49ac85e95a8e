"""Triplet losses: of given triplets, of scores, and of triplets mined from a labelled batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import mining as miners
from ..ops.checks import check_same_shape
from ..ops.pair_sums import take_rows
from ..ops.pairs import describe
from .common import finish, reduce_counted
from .distances import (
    block_distances,
    block_same,
    by_blocks,
    check_distance,
    row_distance,
    widened,
)
from .inputs import check_choice, check_number, check_vector, given_scores, unit_rows
from .modules import FixedLoss

MINING = ("batch_hard", "batch_all", "semi_hard", "semi_hard_all")


def triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 0.2,
    *,
    distance: str | Callable[[Tensor, Tensor], Tensor] = "squared",
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
):
    """Triplet loss (FaceNet, Schroff et al. 2015, section 3.1): [d(a, p) - d(a, n) + margin]_+.

    ``torch.nn.TripletMarginLoss`` is the ``"euclidean"`` one of raw rows, but for the 1e-6 that
    it adds to each difference.

    Args:
        anchor, positive, negative: [N, D], row by row; any float dtype.
        margin: a number.
        distance: ``"squared"`` (FaceNet's), ``"euclidean"`` (plain), or a function of two
            matrices [N, D] that returns [N] distances.
        weight: [N] floats; each triplet's share, the mean becoming sum(w l) / sum(w).
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over all N triplets, ``"sum"`` (FaceNet's), or ``"none"``.
        return_metrics: also return a dict of 0-dim tensors: ``positive_distance``,
            ``negative_distance`` (means) and ``active_fraction`` (share of losses above 0).

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_number(margin, "margin")
    if not callable(distance):
        check_distance(distance)
    check_same_shape(anchor, positive, "anchor", "positive")
    check_same_shape(anchor, negative, "anchor", "negative")
    a = unit_rows(anchor, "anchor", normalize)
    near, far = (
        _distances(a, unit_rows(x, name, normalize), distance)
        for x, name in ((positive, "positive"), (negative, "negative"))
    )
    losses = F.relu(near - far + margin)
    metrics = None
    if return_metrics:
        metrics = {
            "positive_distance": near.detach().mean(),
            "negative_distance": far.detach().mean(),
            "active_fraction": (losses.detach() > 0).to(losses.dtype).mean(),
        }
    return finish(losses, reduction, weight, metrics)


def _distances(a: Tensor, b: Tensor, distance) -> Tensor:
    if not callable(distance):
        return row_distance(a, b, distance)
    found = distance(a, b)
    if not isinstance(found, Tensor) or found.shape != a.shape[:1]:
        raise ValueError(f"distance gave what {describe(found)}; expected {a.shape[0]} distances")
    return found


class TripletLoss(FixedLoss):
    """:func:`~fastcl.functional.triplet` as a module."""

    def __init__(
        self,
        margin: float = 0.2,
        *,
        distance: str | Callable[[Tensor, Tensor], Tensor] = "squared",
        normalize: bool = True,
        reduction: str = "mean",
        return_metrics: bool = False,
    ):
        check_number(margin, "margin")
        if not callable(distance):
            check_distance(distance)
        super().__init__(
            margin=margin, distance=distance, normalize=normalize, reduction=reduction,
            return_metrics=return_metrics,
        )  # fmt: skip

    def forward(self, anchor, positive, negative, *, weight=None):
        return triplet(anchor, positive, negative, weight=weight, **self.options())


def triplet_score(
    positive_scores: Tensor,
    negative_scores: Tensor,
    margin: float = 0.2,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Triplet loss of scores (larger is closer): [margin - s+ + s-]_+.

    The two may come from different score functions.

    Args:
        positive_scores: [N] floats.
        negative_scores: [N], or [N, K] for K negatives each, whose losses are summed.
        margin: eta, a number.
        weight, reduction: as for :func:`triplet`.

    Returns:
        The loss in fp32 (fp64 for fp64 scores).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_number(margin, "margin")
    positive, negative = given_scores(positive_scores, negative_scores)
    losses = F.relu(margin - positive[:, None] + negative).sum(1)
    return finish(losses, reduction, weight, None)


class TripletScoreLoss(FixedLoss):
    """:func:`~fastcl.functional.triplet_score` as a module."""

    def __init__(self, margin: float = 0.2, *, reduction: str = "mean"):
        check_number(margin, "margin")
        super().__init__(margin=margin, reduction=reduction)

    def forward(self, positive_scores, negative_scores, *, weight=None):
        return triplet_score(positive_scores, negative_scores, weight=weight, **self.options())


def mined_triplet(
    features: Tensor,
    labels: Tensor,
    margin: float = 0.2,
    *,
    mining: str = "batch_hard",
    distance: str = "squared",
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
):
    """Triplet loss of a labelled batch, whose triplets are chosen by ``mining``:

    - ``"batch_hard"``: each anchor with its farthest positive and nearest negative (Hermans et
      al. 2017, eq. 5), by :func:`fastcl.mining.batch_hard`; O(N) memory. Anchors that lack either
      do not count.
    - ``"batch_all"``: every triplet whose loss is above 0 (their eq. 6 with the mean over active
      triplets).
    - ``"semi_hard"``: every pair of one label with the nearest negative that is farther, or the
      farthest where none is (TensorFlow Addons).
    - ``"semi_hard_all"``: every triplet with d(a, p) < d(a, n) < d(a, p) + margin (FaceNet).

    The last three visit no triplet one by one: the distances of a few anchors at a time are sorted
    and summed by prefixes, in O(N^2 (D + log N)) time and O(N) memory beyond a fixed block,
    computed again for the backward.

    Args:
        features: [N, D], any float dtype.
        labels: [N] integers; a batch wants several classes and several samples of each.
        margin: a number; at least 0 for ``"semi_hard_all"`` to find anything.
        mining: see above.
        distance: ``"squared"`` or ``"euclidean"``.
        weight: [N] floats; each anchor's share, the mean becoming sum(w l) / sum(w) over triplets.
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over the triplets that count (0 where none does), ``"sum"`` over
            them, or ``"none"`` for [N] means, each anchor's own.
        return_metrics: also return a dict of 0-dim tensors: ``active_fraction``, the share of
            losses above 0 among the chosen triplets, or with the two ``all`` forms of the chosen
            among all valid triplets; ``triplets``, how many counted.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_number(margin, "margin")
    check_choice(mining, "mining", MINING)
    check_distance(distance)
    rows = unit_rows(features, "features", normalize)
    labels = check_vector(labels, "labels", rows.shape[0], rows)
    if mining == "batch_hard":
        sums, counts, active, valid = _batch_hard(rows, labels, margin, distance)
    else:
        results = by_blocks(
            lambda block, wide: _sorted_triplets(wide, labels, block, margin, distance, mining),
            widened(rows),
        )
        sums, counts, active, valid = (x.to(rows.dtype) for x in results)
    loss = reduce_counted(sums, counts, reduction, weight)
    if not return_metrics:
        return loss
    return loss, {
        "active_fraction": active.sum() / valid.sum().clamp_min(1),
        "triplets": counts.sum(),
    }


def _batch_hard(rows: Tensor, labels: Tensor, margin: float, distance: str):
    positives, negatives = miners.batch_hard(rows, labels)
    counted = (positives >= 0) & (negatives >= 0)
    near, far = (
        row_distance(rows, take_rows(rows, index.clamp_min(0)), distance)
        for index in (positives, negatives)
    )
    sums = torch.where(counted, F.relu(near - far + margin), 0.0)
    counts = counted.to(rows.dtype)
    return sums, counts, (sums.detach() > 0).to(rows.dtype), counts


def _sorted_triplets(rows, labels, block: range, margin: float, distance: str, mining: str):
    """Per anchor of a block: sum of losses, triplets counted, active and valid ones [len(block)].

    With an anchor's negatives in order, those that make a triplet with a given positive are a
    stretch [low, high), and their losses sum to (high - low) * limit - (prefix sums).
    """
    d = block_distances(rows, block, distance)
    same, positive = block_same(labels, block)
    # what is no negative goes behind them all, and beyond any limit
    ordered = torch.where(same, float("inf"), d).sort(1).values
    number = (~same).sum(1, keepdim=True)
    fixed = d.detach().contiguous()
    keys = ordered.detach().contiguous()
    high = torch.searchsorted(keys, fixed + margin)
    low = torch.zeros_like(high)
    if mining != "batch_all":
        low = torch.searchsorted(keys, fixed, right=True)
    limit = d + margin
    if mining == "semi_hard":
        chosen = torch.where(low < number, low, number - 1).clamp_min(0)
        chosen_far = ordered.gather(1, chosen)
        counted = positive & (number > 0)
        losses = F.relu(limit - torch.where(number > 0, chosen_far, 0.0))
        active = counted & (losses.detach() > 0)
        valid = counted
    else:
        finite = torch.where(torch.isinf(ordered), 0.0, ordered)
        prefix = F.pad(finite.cumsum(1), (1, 0))
        high = torch.maximum(high, low)  # of a margin below 0
        counted = torch.where(positive, high - low, 0)
        losses = (high - low) * limit - (prefix.gather(1, high) - prefix.gather(1, low))
        active, valid = counted, positive * number
    sums = torch.where(counted > 0, losses, 0.0).sum(1)
    return sums, *(x.sum(1) for x in (counted, active, valid))


class MinedTripletLoss(FixedLoss):
    """:func:`~fastcl.functional.mined_triplet` as a module."""

    def __init__(
        self,
        margin: float = 0.2,
        *,
        mining: str = "batch_hard",
        distance: str = "squared",
        normalize: bool = True,
        reduction: str = "mean",
        return_metrics: bool = False,
    ):
        check_number(margin, "margin")
        check_choice(mining, "mining", MINING)
        check_distance(distance)
        super().__init__(
            margin=margin, mining=mining, distance=distance, normalize=normalize,
            reduction=reduction, return_metrics=return_metrics,
        )  # fmt: skip

    def forward(self, features, labels, *, weight=None):
        return mined_triplet(features, labels, weight=weight, **self.options())

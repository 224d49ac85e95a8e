"""Losses of labelled pairs: contrastive (Hadsell), lifted structure, multi-similarity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Pairs, similarity_logsumexp
from ..ops.checks import check_same_shape, precision_of
from ..ops.pairs import describe
from .common import finish, reduce_counted, softmax_loss
from .distances import (
    block_distances,
    block_same,
    by_blocks,
    check_distance,
    masked_logsumexp,
    root,
    widened,
)
from .inputs import (
    check_binary,
    check_choice,
    check_number,
    check_positive,
    check_vector,
    unit_rows,
)
from .modules import FixedLoss

FORMS = ("hadsell", "squared")


def pairwise_contrastive(
    a: Tensor,
    b: Tensor,
    similar: Tensor,
    margin: float = 1.0,
    *,
    form: str = "hadsell",
    eps: float = 0.0,
    weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Contrastive loss of pairs (Hadsell et al. 2006, eq. 4), D the Euclidean distance of a pair.

    Half of D^2 for a similar pair. For another, half of max(0, margin - D)^2 (``"hadsell"``), or
    half of max(0, margin - D^2) (``"squared"``, another loss of the same name). The gradient of D
    at 0 is 0.

    Args:
        a, b: [N, D], row by row; any float dtype.
        similar: [N] bools or integers, 1 for a similar pair and 0 for another. (Hadsell et al.
            write Y = 0 for a similar one.)
        margin: positive.
        form: see above.
        eps: added to D^2 inside the root of dissimilar pairs, as some implementations do.
        weight: [N] floats; each pair's share, the mean becoming sum(w l) / sum(w).
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over all N pairs, ``"sum"``, or ``"none"``.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_positive(margin, "margin")
    check_choice(form, "form", FORMS)
    check_number(eps, "eps", minimum=0.0)
    check_same_shape(a, b, "a", "b")
    similar = check_binary(similar, "similar", a.shape[:1], a)
    rows = unit_rows(a, "a", normalize) - unit_rows(b, "b", normalize)
    squares = rows.square().sum(1)
    if form == "squared":
        apart = F.relu(margin - squares)
    else:
        apart = F.relu(margin - root(squares + eps)).square()
    return finish(0.5 * torch.where(similar, squares, apart), reduction, weight, None)


class PairwiseContrastiveLoss(FixedLoss):
    """:func:`~fastcl.functional.pairwise_contrastive` as a module."""

    def __init__(
        self,
        margin: float = 1.0,
        *,
        form: str = "hadsell",
        eps: float = 0.0,
        normalize: bool = False,
        reduction: str = "mean",
    ):
        check_positive(margin, "margin")
        check_choice(form, "form", FORMS)
        check_number(eps, "eps", minimum=0.0)
        super().__init__(
            margin=margin, form=form, eps=eps, normalize=normalize, reduction=reduction
        )

    def forward(self, a, b, similar, *, weight=None):
        return pairwise_contrastive(a, b, similar, weight=weight, **self.options())


def lifted_structure(
    features: Tensor,
    labels: Tensor,
    margin: float = 1.0,
    *,
    distance: str = "euclidean",
    weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Lifted structured loss (Song et al. 2016, eq. 4), over all pairs of one label:

        1/2 [D_ij + ln(sum_k e^(margin - D_ik) + sum_l e^(margin - D_jl))]_+^2,

    k running over the negatives of i and l over those of j.

    The distances of a few anchors exist at a time: O(N^2 D) time and O(N) memory beyond a fixed
    block, computed again for the backward.

    Args:
        features: [N, D], any float dtype; the paper does not normalise them.
        labels: [N] integers.
        margin: a number.
        distance: ``"euclidean"`` (the paper's) or ``"squared"``.
        weight: [N] floats; each anchor's share, the mean becoming sum(w l) / sum(w) over pairs.
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over the pairs (0 where there is none), ``"sum"`` over ordered
            pairs, or ``"none"`` for [N] means, each anchor's own.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs). Without negatives it is 0.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_number(margin, "margin")
    check_distance(distance)
    rows = unit_rows(features, "features", normalize)
    labels = check_vector(labels, "labels", rows.shape[0], rows)
    wide = widened(rows)

    def push(block: range, wide: Tensor) -> tuple[Tensor]:
        same, _ = block_same(labels, block)
        return (masked_logsumexp(margin - block_distances(wide, block, distance), ~same),)

    (pushes,) = by_blocks(push, wide)
    # all rows have negatives or none has
    lonely = torch.isneginf(pushes)
    pushes = torch.where(lonely, 0.0, pushes)

    def pull(block: range, wide: Tensor, pushes: Tensor) -> tuple[Tensor, Tensor]:
        _, positive = block_same(labels, block)
        both = torch.logaddexp(pushes[block.start : block.stop, None], pushes)
        losses = 0.5 * F.relu(both + block_distances(wide, block, distance)).square()
        return torch.where(positive & ~lonely, losses, 0.0).sum(1), positive.sum(1)

    sums, counts = (x.to(rows.dtype) for x in by_blocks(pull, wide, pushes))
    return reduce_counted(sums, counts, reduction, weight)


class LiftedStructureLoss(FixedLoss):
    """:func:`~fastcl.functional.lifted_structure` as a module."""

    def __init__(
        self,
        margin: float = 1.0,
        *,
        distance: str = "euclidean",
        normalize: bool = False,
        reduction: str = "mean",
    ):
        check_number(margin, "margin")
        check_distance(distance)
        super().__init__(margin=margin, distance=distance, normalize=normalize, reduction=reduction)

    def forward(self, features, labels, *, weight=None):
        return lifted_structure(features, labels, weight=weight, **self.options())


def multi_similarity(
    features: Tensor,
    labels: Tensor,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    *,
    epsilon: float | None = 0.1,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Multi-similarity loss (Wang et al. 2019), with its mining:

        1/alpha ln[1 + sum over positives of e^(-alpha (s - base))]
        + 1/beta ln[1 + sum over negatives of e^(beta (s - base))]

    Without mining these are two sweeps of an operator. With it, the scores of a few anchors exist
    at a time, computed again for the backward.

    Args:
        features: [N, D], any float dtype.
        labels: [N] integers.
        alpha, beta: positive.
        base: lambda, a cosine.
        epsilon: mining keeps negatives above the least similar positive minus epsilon, and
            positives below the most similar negative plus epsilon; ``None`` keeps all pairs.
        weight: [N] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over the N anchors, ``"sum"``, or ``"none"`` for [N] losses.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    _check_multi_similarity(alpha, beta, base, epsilon)
    rows = unit_rows(features, "features", normalize)
    labels = check_vector(labels, "labels", rows.shape[0], rows)
    precision = precision_of(features, None, None)
    same, different = Pairs("same", labels, skip=(0,)), Pairs("different", labels)

    def sweep(inputs: Tensor, scale: float, pairs: Pairs, maxima: bool = False):
        return similarity_logsumexp(
            inputs, None, scale, pairs=pairs, maxima=maxima, precision=precision
        )

    if epsilon is None:
        pull, push = sweep(rows, -alpha, same).rows, sweep(rows, beta, different).rows
    else:
        fixed = rows.detach()
        least_positive = -sweep(fixed, -1.0, same, True).row_max
        most_negative = sweep(fixed, 1.0, different, True).row_max

        def mined(block: range, wide: Tensor) -> tuple[Tensor, Tensor]:
            part = slice(block.start, block.stop)
            scores = wide[part] @ wide.mT
            equal, positive = block_same(labels, block)
            hard = ~equal & (scores > least_positive[part, None] - epsilon)
            easy = positive & (scores < most_negative[part, None] + epsilon)
            return masked_logsumexp(-alpha * scores, easy), masked_logsumexp(beta * scores, hard)

        pull, push = (x.to(rows.dtype) for x in by_blocks(mined, widened(rows)))
    losses = softmax_loss(torch.full_like(pull, -alpha * base), pull) / alpha
    losses = losses + softmax_loss(torch.full_like(push, beta * base), push) / beta
    return finish(losses, reduction, weight, None)


def _check_multi_similarity(alpha, beta, base, epsilon) -> None:
    check_positive(alpha, "alpha")
    check_positive(beta, "beta")
    check_number(base, "base")
    if epsilon is not None and not (isinstance(epsilon, (int, float)) and math.isfinite(epsilon)):
        raise ValueError(f"epsilon {describe(epsilon)}; expected None or a finite number")


class MultiSimilarityLoss(FixedLoss):
    """:func:`~fastcl.functional.multi_similarity` as a module."""

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        *,
        epsilon: float | None = 0.1,
        normalize: bool = True,
        reduction: str = "mean",
    ):
        _check_multi_similarity(alpha, beta, base, epsilon)
        super().__init__(
            alpha=alpha, beta=beta, base=base, epsilon=epsilon, normalize=normalize,
            reduction=reduction,
        )  # fmt: skip

    def forward(self, features, labels, *, weight=None):
        return multi_similarity(features, labels, weight=weight, **self.options())

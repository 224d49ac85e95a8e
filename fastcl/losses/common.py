"""What losses share: reduction, softmax of a positive among negatives, metrics, two views."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import ALONE, Ranks
from ..ops import LogSumExp, Pairs, fuses_pairs
from ..ops.checks import (
    check_same_shape,
    precision_of,
)
from .inputs import (
    _check_finite,
    _refuse_unfinite,
    can_look,
    check_reduction,
    check_vector,
    is_transformed,
    unit_pair,
)


def reduce(
    losses: Tensor, reduction: str, weight: Tensor | None = None, ranks: Ranks = ALONE
) -> Tensor:
    """Per-sample losses [N] to the asked form, over all ranks; with weights the mean is
    sum(w l) / sum(w)."""
    check_reduction(reduction)
    if weight is not None:
        weight = check_vector(weight, "weight", losses.shape[0], losses, floats=True)
        weight = weight.to(losses.dtype)
        losses = losses * weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return ranks.totals(losses.sum())[0]
    if weight is None and ranks is ALONE:
        return losses.mean()
    share = losses.new_ones(()) * losses.shape[0] if weight is None else weight.sum()
    total, share = ranks.totals(losses.sum(), share)
    return total / torch.where(share == 0, 1.0, share)


def reduce_counted(
    sums: Tensor, counts: Tensor, reduction: str, weight: Tensor | None = None
) -> Tensor:
    """Per-anchor sums [N] over ``counts`` [N] tuples each to the asked form.

    ``"mean"`` is over all tuples, so that nothing counted gives 0; ``"none"`` is each anchor's own
    mean. An anchor's weight is that of its tuples.
    """
    check_reduction(reduction)
    if weight is not None:
        weight = check_vector(weight, "weight", sums.shape[0], sums, floats=True).to(sums.dtype)
        sums = sums * weight
    if reduction == "sum":
        return sums.sum()
    if reduction == "none":
        return sums / counts.clamp_min(1)
    total = (counts if weight is None else counts * weight).sum()
    return sums.sum() / torch.where(total == 0, 1.0, total)


def finish(losses, reduction, weight, metrics: dict[str, Tensor] | None, ranks: Ranks = ALONE):
    """The reduced loss, with ``metrics`` beside it when there are any."""
    loss = reduce(losses, reduction, weight, ranks)
    return loss if metrics is None else (loss, metrics)


def softmax_loss(positive: Tensor, negatives: Tensor) -> Tensor:
    """-log softmax of the positive against a log-sum-exp of negatives: softplus(lse - positive).

    The positive stays out of the log-sum-exp, so nothing cancels where the loss is tiny. PyTorch's
    softplus turns linear at 20, an error of 2e-9; at 50 it is below float64's resolution.
    """
    return torch.nn.functional.softplus(negatives - positive, threshold=50.0)


def whole_loss(
    operator: Callable[..., Tensor], a: Tensor, b: Tensor, names: tuple[str, str], reduction: str,
    *arguments, **options,
) -> Tensor | None:  # fmt: skip
    """The plain loss of two aligned batches in one operator, one of :mod:`fastcl.ops.fused`.

    ``None`` where no backend would rather take it whole: the caller composes the primitives then.

    Raises:
        TypeError, ValueError: as :func:`unit_pair` does.
    """
    check_reduction(reduction)
    check_same_shape(a, b, *names)
    if reduction == "none" or is_transformed() or not fuses_pairs(operator.__name__, a, b):
        return None
    if not options.get("normalize", True):
        _check_finite(None, (a, names[0]), (b, names[1]))
    loss = operator(a, b, *arguments, mean=reduction == "mean", **options)
    # what is not finite in a row is not finite in its cosine, and shows in any sum of losses
    if can_look(a) and not math.isfinite(loss.detach()):
        _refuse_unfinite((a, names[0]), (b, names[1]))
    return loss


def smooth(losses, positive, scale, sums: Tensor, count: Tensor, label_smoothing: float) -> Tensor:
    """Label smoothing: move that share of the target to the uniform mean over all candidates."""
    sums = torch.where(count > 0, sums, 0.0)  # differences of sums, which leave round-off
    mean = (positive + scale * sums) / (count + 1.0)
    return losses + label_smoothing * (positive - mean)


@torch.no_grad()
def softmax_metrics(
    cosines: Tensor,
    positive: Tensor,
    negatives: LogSumExp,
    sums: Tensor,
    count: Tensor,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """What users log, 0-dim each: see :func:`fastcl.functional.nt_xent`."""
    effective = torch.exp(negatives.rows - negatives.row_max)
    n, right, cosine, negative, pairs, effective = ranks.totals(
        torch.ones_like(cosines).sum(),
        (positive > negatives.row_max).to(cosines.dtype).sum(),
        cosines.sum(),
        torch.where(count > 0, sums, 0.0).sum(),
        count.sum(),
        torch.where(count > 0, effective, 0.0).sum(),
    )
    return {
        "accuracy": right / n,
        "positive_similarity": cosine / n,
        "negative_similarity": negative / pairs.clamp_min(1.0),
        "effective_negatives": effective / n,
    }


@dataclass
class Views:
    """Two views of a batch as one symmetric problem of 2B rows."""

    rows: Tensor  # [2B, D]
    cosines: Tensor  # [2B], each row with its other view
    pairs: Pairs  # keeps the negatives: not the row itself, its other view, or an equal id
    precision: torch.dtype

    @classmethod
    def of(cls, z1: Tensor, z2: Tensor, ids: Tensor | None, normalize: bool) -> Views:
        rows, cosines = unit_pair(z1, z2, ("z1", "z2"), normalize)
        batch = z1.shape[0]
        skip = (0, batch, -batch)
        pairs = Pairs(skip=skip)
        if ids is not None:
            ids = check_vector(ids, "ids", batch, z1)
            pairs = Pairs("different", torch.cat([ids, ids]), skip=skip)
        return cls(rows, torch.cat([cosines, cosines]), pairs, precision_of(z1, z2, None))

    def repeat(self, weight: Tensor | None) -> Tensor | None:
        """Per-sample weights [B] for both views."""
        if weight is None:
            return None
        batch = self.rows.shape[0] // 2
        weight = check_vector(weight, "weight", batch, self.rows, floats=True)
        return torch.cat([weight, weight])

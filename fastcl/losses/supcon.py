"""Supervised contrastive loss: many positives per anchor, from labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import Ranks, meet
from ..ops import Pairs
from ..ops.checks import check_features, precision_of
from ..ops.pairs import describe
from .common import (
    TemperatureLoss,
    check_vector,
    finish,
    scale_of,
    softmax_loss,
    unit_rows,
)


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    form: str = "out",
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    distributed: str | None = None,
    process_group=None,
):
    """SupCon (Khosla et al. 2020, eqs. 2 and 3): every sample of the anchor's label is a positive.

    The positives' mean score comes from sums over classes in O(N D); no pair is ever listed. An
    anchor with one positive keeps it out of the log-sum-exp, as :func:`nt_xent` does, so nothing
    cancels where the loss is tiny; with more positives the loss is at least ln(positives).

    Args:
        features: [N, D], or [N, V, D] for V views of each sample; any float dtype.
        labels: [N] integers; ``None`` gives every sample its own label (needs V of 2 or more).
        temperature: positive number or one-element tensor (differentiable).
        form: ``"out"`` for L_out (the mean over positives outside the logarithm), ``"in"`` for
            L_in (inside).
        weight: [N] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over the N V anchors, ``"sum"``, or ``"none"`` for [N V] losses,
            view by view. An anchor without positives counts as 0 in each.
        return_metrics: also return a dict of 0-dim tensors: ``positive_similarity``,
            ``negative_similarity`` (mean cosines) and ``accuracy`` (the nearest other row has the
            anchor's label; costs two more sweeps).
        distributed, process_group: as for :func:`nt_xent`; labels mean the same on every rank.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    _check_form(form)
    scale = scale_of(temperature)
    own_labels = labels is None
    flat, labels, views = _flatten(features, labels)
    rows = unit_rows(flat, "features", normalize)
    precision = precision_of(flat, None, None)
    ranks = meet(
        distributed, process_group, rows, reduction, loss="sup_con", form=form, scale=scale,
        labels=own_labels, precision=precision, weight=weight, return_metrics=return_metrics,
    )  # fmt: skip
    if own_labels:  # a sample is unlike any of another rank
        labels = labels + ranks.start
    others = Pairs("same", labels, skip=(0,))
    positive_cosines, positives = ranks.pair_sums(rows, rows, others)
    compute = _outside if form == "out" else _inside
    losses = compute(ranks, rows, labels, positives, positive_cosines, scale, precision)
    losses = torch.where(positives > 0, losses, 0.0)
    metrics = None
    if return_metrics:
        metrics = _metrics(ranks, rows, labels, positives, positive_cosines, precision)
    if weight is not None:
        weight = check_vector(weight, "weight", features.shape[0], features, floats=True)
        weight = weight.repeat(views)
    return finish(losses, reduction, weight, metrics, ranks)


def _check_form(form: str) -> None:
    if form not in ("out", "in"):
        raise ValueError(f"form is {form!r}; expected 'out' or 'in'")


def _flatten(features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Rows [N V, D], one label each, and V; rows go view by view."""
    multiple = isinstance(features, Tensor) and features.dim() == 3
    check_features(features, "features", "[N, V, D]" if multiple else "[N, D]")
    n = features.shape[0]
    views = features.shape[1] if multiple else 1
    if labels is None:
        if views == 1:
            raise ValueError(
                f"features {describe(features)} came without labels; expected labels, or several "
                "views [N, V, D]"
            )
        labels = torch.arange(n, device=features.device)
    labels = check_vector(labels, "labels", n, features).to(torch.int64).repeat(views)
    rows = features.transpose(0, 1).reshape(n * views, -1) if multiple else features
    return rows, labels, views


def _outside(ranks: Ranks, rows, labels, positives, positive_cosines, scale, precision) -> Tensor:
    """L_out: log-sum-exp over all others minus the positives' mean score."""
    mean_score = positive_cosines * scale / positives.clamp_min(1)
    # One sweep serves both kinds of anchor. Rows with one positive share their id with it, so the
    # rule "different" leaves their negatives; every other row gets an id of its own. Even and odd
    # ids keep the two apart.
    single = positives == 1
    index = torch.arange(rows.shape[0], device=rows.device) + ranks.start
    rule = Pairs("different", torch.where(single, 2 * labels, 2 * index + 1), skip=(0,))
    sums = ranks.logsumexp(rows, None, scale, pairs=rule, precision=precision).rows
    others = torch.where(positives > 1, sums, mean_score)
    return torch.where(single, softmax_loss(mean_score, sums), others - mean_score)


def _inside(ranks: Ranks, rows, labels, positives, positive_cosines, scale, precision) -> Tensor:
    """L_in: -log of the positives' mean share of the softmax."""
    negatives = ranks.logsumexp(
        rows, None, scale, pairs=Pairs("different", labels, skip=(0,)), precision=precision
    ).rows
    together = ranks.logsumexp(
        rows, None, scale, pairs=Pairs("same", labels, skip=(0,)), precision=precision
    ).rows
    # an empty sum is -inf; its loss is overwritten, so it only must not poison the gradient
    together = torch.where(positives > 0, together, 0.0)
    return softmax_loss(together, negatives) + positives.clamp_min(1).log()


@torch.no_grad()
def _metrics(
    ranks: Ranks, rows, labels, positives, positive_cosines, precision
) -> dict[str, Tensor]:
    def nearest(relation):
        rule = Pairs(relation, labels, skip=(0,))
        return ranks.logsumexp(
            rows, None, 1.0, pairs=rule, maxima=True, precision=precision
        ).row_max

    all_cosines, others = ranks.pair_sums(rows, rows, Pairs(skip=(0,)))
    n, right, positive, positives, everything, others = ranks.totals(
        torch.ones_like(positives).sum(),
        (nearest("same") > nearest("different")).to(rows.dtype).sum(),
        positive_cosines.sum(),
        positives.sum(),
        all_cosines.sum(),
        others.sum(),
    )
    return {
        "accuracy": right / n,
        "positive_similarity": positive / positives.clamp_min(1),
        "negative_similarity": (everything - positive) / (others - positives).clamp_min(1),
    }


class SupConLoss(TemperatureLoss):
    """:func:`~fastcl.functional.sup_con` as a module."""

    described = ("form",)

    def __init__(self, temperature: float = 0.1, *, form: str = "out", **options):
        super().__init__(temperature, **options)
        _check_form(form)
        self.form = form

    def forward(self, features, labels=None, *, weight=None):
        return sup_con(
            features, labels, self.temperature, form=self.form, weight=weight, **self.options()
        )

"""Supervised contrastive loss: many positives per anchor, from labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Pairs, similarity_logsumexp, similarity_topk
from ..ops.checks import check_features, precision_of
from ..ops.pairs import describe
from .common import (
    TemperatureLoss,
    check_vector,
    class_slots,
    class_sums,
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
            anchor's label; costs one more sweep).

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    _check_form(form)
    scale = scale_of(temperature)
    flat, labels, views = _flatten(features, labels)
    rows = unit_rows(flat, "features", normalize)
    slots, members = class_slots(labels)
    positives = members - 1
    compute = _outside if form == "out" else _inside
    positive_cosines = (rows * (class_sums(rows, slots) - rows)).sum(1)
    losses = compute(
        rows, labels, slots, positives, positive_cosines, scale, precision_of(flat, None, None)
    )
    losses = torch.where(positives > 0, losses, 0.0)
    metrics = None
    if return_metrics:
        metrics = _metrics(rows.detach(), labels, positives, positive_cosines.detach())
    if weight is not None:
        weight = check_vector(weight, "weight", features.shape[0], features, floats=True)
        weight = weight.repeat(views)
    return finish(losses, reduction, weight, metrics)


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


def _outside(rows, labels, slots, positives, positive_cosines, scale, precision) -> Tensor:
    """L_out: log-sum-exp over all others minus the positives' mean score."""
    mean_score = positive_cosines * scale / positives.clamp_min(1)
    # One sweep serves both kinds of anchor. Rows with one positive share their slot, so the rule
    # "different" leaves their negatives; every other row gets an id of its own.
    single = positives == 1
    index = torch.arange(rows.shape[0], device=rows.device)
    rule = Pairs("different", torch.where(single, slots, index + rows.shape[0]), skip=(0,))
    sums = similarity_logsumexp(rows, None, scale, pairs=rule, precision=precision).rows
    others = torch.where(positives > 1, sums, mean_score)
    return torch.where(single, softmax_loss(mean_score, sums), others - mean_score)


def _inside(rows, labels, slots, positives, positive_cosines, scale, precision) -> Tensor:
    """L_in: -log of the positives' mean share of the softmax."""
    negatives = similarity_logsumexp(
        rows, None, scale, pairs=Pairs("different", labels, skip=(0,)), precision=precision
    ).rows
    together = similarity_logsumexp(
        rows, None, scale, pairs=Pairs("same", labels, skip=(0,)), precision=precision
    ).rows
    # an empty sum is -inf; its loss is overwritten, so it only must not poison the gradient
    together = torch.where(positives > 0, together, 0.0)
    return softmax_loss(together, negatives) + positives.clamp_min(1).to(rows.dtype).log()


@torch.no_grad()
def _metrics(rows, labels, positives, positive_cosines) -> dict[str, Tensor]:
    n = rows.shape[0]
    all_cosines = (rows * (rows.sum(0) - rows)).sum()
    negative_count = n * (n - 1) - positives.sum()
    nearest = similarity_topk(rows, None, k=1, pairs=Pairs(skip=(0,))).indices[:, 0]
    return {
        "accuracy": (labels[nearest] == labels).to(rows.dtype).mean(),
        "positive_similarity": positive_cosines.sum() / positives.sum().clamp_min(1),
        "negative_similarity": (all_cosines - positive_cosines.sum()) / negative_count.clamp_min(1),
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

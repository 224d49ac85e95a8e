"""Supervised contrastive loss: many positives per anchor, from labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed import ALONE, Ranks, meet
from ..memory.queue import NO_ID, NegativeQueue, check_queue, merge, stored_precision
from ..ops import Pairs
from ..ops.checks import check_features, precision_of
from ..ops.pair_sums import numbered
from ..ops.pairs import describe
from .common import finish, softmax_loss
from .inputs import check_vector, scale_of, unit_rows
from .modules import TemperatureLoss


def sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    form: str = "out",
    queue: NegativeQueue | None = None,
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
        queue: cross-batch memory (Wang et al. 2020, XBM): its keys, whose ids are labels, are
            further positives and negatives of every anchor; read, not changed. Needs labels.
        weight: [N] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over the N V anchors, ``"sum"``, or ``"none"`` for [N V] losses,
            view by view. An anchor without positives counts as 0 in each.
        return_metrics: also return a dict of 0-dim tensors: ``positive_similarity``,
            ``negative_similarity`` (mean cosines) and ``accuracy`` (the nearest other row has the
            anchor's label; costs two more sweeps), of the batch alone.
        distributed, process_group: as for :func:`nt_xent`; labels mean the same on every rank.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    _check_form(form)
    scale = scale_of(temperature)
    if queue is not None:
        check_queue(queue, normalize)
        if labels is None:
            raise ValueError("queue came without labels; expected labels, which its ids match")
    own_labels = labels is None
    flat, labels, views = _flatten(features, labels)
    rows = unit_rows(flat, "features", normalize)
    precision = precision_of(flat, None, None)
    ranks = meet(
        distributed, process_group, rows, reduction, loss="sup_con", form=form, scale=scale,
        labels=own_labels, precision=precision, weight=weight, return_metrics=return_metrics,
        queue=queue is not None,
    )  # fmt: skip
    if own_labels:  # a sample is unlike any of another rank
        labels = labels + ranks.start
    others = Pairs("same", labels, skip=(0,))
    positive_cosines, positives = ranks.pair_sums(rows, rows, others)
    metrics = None
    if return_metrics:
        metrics = _metrics(ranks, rows, labels, positives, positive_cosines, precision)
    if queue is not None:
        stored, number = queue.class_sums(labels)
        positives = positives + number
        positive_cosines = positive_cosines + (rows * stored).sum(1)
    compute = _outside if form == "out" else _inside
    losses = compute(
        _Sweep(ranks, rows, scale, precision, queue), labels, positives, positive_cosines
    )
    losses = torch.where(positives > 0, losses, 0.0)
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


@dataclass
class _Sweep:
    """Log-sum-exp of each anchor over the batch's other rows and, with a queue, over its keys."""

    ranks: Ranks
    rows: Tensor
    scale: float | Tensor
    precision: torch.dtype
    queue: NegativeQueue | None

    def __call__(self, relation: str, batch_ids: Tensor, queue_ids: Tensor) -> Tensor:
        """Over those whose id relates so to the anchor's, which the queue's keys may see anew."""
        found = self.ranks.logsumexp(
            self.rows, None, self.scale, pairs=Pairs(relation, batch_ids, skip=(0,)),
            precision=self.precision,
        )  # fmt: skip
        if self.queue is not None:
            stored = self.queue.logsumexp(
                self.rows, self.scale, relation=relation, ids=queue_ids,
                precision=stored_precision(self.precision, self.queue),
            )  # fmt: skip
            found = merge(found, stored)
        return found.rows


def _outside(sweep: _Sweep, labels, positives, positive_cosines) -> Tensor:
    """L_out: log-sum-exp over all others minus the positives' mean score."""
    mean_score = positive_cosines * sweep.scale / positives.clamp_min(1)
    # One sweep serves both kinds of anchor. Rows with one positive share their id with it, so the
    # rule "different" leaves their negatives; every other row gets an id of its own, and in the
    # queue one that no key carries. Even and odd ids keep the two apart.
    single = positives == 1
    own = labels
    if sweep.queue is None and sweep.ranks is ALONE:  # doubled labels may overflow and coincide
        (own,) = numbered(labels)
    index = torch.arange(labels.shape[0], device=labels.device) + sweep.ranks.start
    sums = sweep(
        "different",
        torch.where(single, 2 * own, 2 * index + 1),
        torch.where(single, labels, NO_ID),
    )
    others = torch.where(positives > 1, sums, mean_score)
    return torch.where(single, softmax_loss(mean_score, sums), others - mean_score)


def _inside(sweep: _Sweep, labels, positives, positive_cosines) -> Tensor:
    """L_in: -log of the positives' mean share of the softmax."""
    negatives = sweep("different", labels, labels)
    together = sweep("same", labels, labels)
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
    """:func:`~fastcl.functional.sup_con` as a module.

    With a ``queue`` (cross-batch memory), every row enters it with its label after the loss is
    taken (in training mode).
    """

    described = ("form",)

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        form: str = "out",
        queue: NegativeQueue | None = None,
        **options,
    ):
        super().__init__(temperature, **options)
        _check_form(form)
        self.form = form
        self.queue = None if queue is None else check_queue(queue, self.normalize)

    def forward(self, features, labels=None, *, weight=None):
        result = sup_con(
            features, labels, self.temperature, form=self.form, queue=self.queue, weight=weight,
            **self.options(),
        )  # fmt: skip
        if self.queue is not None:
            rows, row_labels, _ = _flatten(features.detach(), labels)
            self.queue.enqueue(rows, row_labels)
        return result

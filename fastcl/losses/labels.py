"""Losses of labels: multi-label classification, and classes across domains."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Pairs, similarity_logsumexp
from ..ops.checks import check_features, check_same_width, precision_of
from ..ops.pair_sums import numbered, pair_sums
from .common import finish, softmax_loss
from .inputs import check_binary, check_choice, check_vector, scale_of, unit_rows
from .modules import FixedLoss, TemperatureLoss

FORMS = ("out", "in")


def zlpr(
    scores: Tensor, targets: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """ZLPR (Su et al. 2022) for any number of labels per sample, against the threshold 0:

        ln(1 + sum over absent labels of e^s) + ln(1 + sum over present labels of e^-s)

    A label is predicted where its score is above 0.

    Args:
        scores: [N, C], any float dtype.
        targets: [N, C] bools or integers, which labels each sample has; any number of them.
        weight: [N] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        reduction: ``"mean"`` over N, ``"sum"``, or ``"none"`` for [N] losses.

    Returns:
        The loss in fp32 (fp64 for fp64 scores).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    s = unit_rows(scores, "scores", normalize=False)
    present = check_binary(targets, "targets", s.shape, s)
    zero = s.new_zeros(s.shape[0], 1)
    absent = torch.cat([zero, s.masked_fill(present, float("-inf"))], 1)
    others = torch.cat([zero, (-s).masked_fill(~present, float("-inf"))], 1)
    losses = torch.logsumexp(absent, 1) + torch.logsumexp(others, 1)
    return finish(losses, reduction, weight, None)


class ZLPRLoss(FixedLoss):
    """:func:`~fastcl.functional.zlpr` as a module."""

    def __init__(self, *, reduction: str = "mean"):
        super().__init__(reduction=reduction)

    def forward(self, scores, targets, *, weight=None):
        return zlpr(scores, targets, weight=weight, **self.options())


def domain_sup_con(
    target: Tensor,
    source: Tensor,
    target_labels: Tensor,
    source_labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    form: str = "out",
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """SupCon across domains: anchors of a target domain, keys of a labelled source domain.

    :func:`sup_con` with separate anchors and keys: the source samples of the anchor's label are its
    positives, and all source samples its candidates.

    Args:
        target: [N, D] anchors, any float dtype.
        source: [M, D] keys; without a gradient (detached) they make the backward free.
        target_labels: [N] integers, usually pseudo-labels; one that no source sample has (-1, say)
            leaves its anchor out. Confidence goes into ``weight``.
        source_labels: [M] integers.
        temperature: positive number or one-element tensor (differentiable).
        form: ``"out"`` for the mean over positives outside the logarithm, ``"in"`` for inside.
        weight: [N] floats; each anchor's share, the mean becoming sum(w l) / sum(w).
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over the N anchors, ``"sum"``, or ``"none"`` for [N] losses. An anchor
            without positives counts as 0 in each.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_choice(form, "form", FORMS)
    scale = scale_of(temperature)
    rows = unit_rows(target, "target", normalize)
    check_features(source, "source", "[M, D]")
    check_same_width(target, source, "target", "source")
    keys = unit_rows(source, "source", normalize)
    labels = check_vector(target_labels, "target_labels", rows.shape[0], rows).to(torch.int64)
    key_labels = check_vector(source_labels, "source_labels", keys.shape[0], keys).to(torch.int64)
    precision = precision_of(target, source, None)

    def sweep(relation: str, ids: Tensor, key_ids: Tensor) -> Tensor:
        rule = Pairs(relation, ids, key_ids)
        return similarity_logsumexp(rows, keys, scale, pairs=rule, precision=precision).rows

    cosines, positives = pair_sums(rows, keys, Pairs("same", labels, key_labels))
    some = positives > 0
    if form == "in":
        together = torch.where(some, sweep("same", labels, key_labels), 0.0)
        losses = softmax_loss(together, sweep("different", labels, key_labels))
        losses = losses + positives.clamp_min(1).log()
    else:
        mean_score = cosines * scale / positives.clamp_min(1)
        # an anchor's only positive stays out of the sum; others get an id that no key has
        single = positives == 1
        own, of_keys = numbered(labels, key_labels)
        sums = sweep("different", torch.where(single, own, -1), of_keys)
        safe = torch.where(single, mean_score, sums)
        losses = torch.where(single, softmax_loss(mean_score, sums), safe - mean_score)
    return finish(torch.where(some, losses, 0.0), reduction, weight, None)


class DomainSupConLoss(TemperatureLoss):
    """:func:`~fastcl.functional.domain_sup_con` as a module."""

    described = ("form",)
    shares_ranks = False
    has_metrics = False

    def __init__(self, temperature: float = 0.1, *, form: str = "out", **options):
        super().__init__(temperature, **options)
        check_choice(form, "form", FORMS)
        self.form = form

    def forward(self, target, source, target_labels, source_labels, *, weight=None):
        return domain_sup_con(
            target, source, target_labels, source_labels, self.temperature, form=self.form,
            weight=weight, **self.options(),
        )  # fmt: skip

"""Softmax over two aligned batches: CLIP in both directions, additive margin in one or both."""

from __future__ import annotations

from torch import Tensor

from ..distributed import meet
from ..ops import pair_softmax
from ..ops.checks import precision_of
from .common import finish, smooth, softmax_loss, softmax_metrics, whole_loss
from .inputs import (
    check_fraction,
    check_number,
    scale_of,
    unit_pair,
)
from .modules import TemperatureLoss
from .softmax import info_nce, shared_rule


def both_directions(
    a, b, names, scale, ids, weight, label_smoothing, margin, normalize, reduction, return_metrics,
    distributed, process_group,
):  # fmt: skip
    """Mean of the row and column softmax losses of two aligned batches, from one sweep."""
    check_fraction(label_smoothing, "label_smoothing")
    plain = ids is None and weight is None and not (label_smoothing or margin or return_metrics)
    if plain and normalize and distributed is None and process_group is None:
        loss = whole_loss(pair_softmax, a, b, names, reduction, scale, form="both")
        if loss is not None:
            return loss
    both_rows, cosines = unit_pair(a, b, names, normalize)
    n = a.shape[0]
    rows, columns = both_rows.split(n)
    pairs = shared_rule(ids, None, True, n, n, rows)
    precision = precision_of(a, b, None)
    ranks = meet(
        distributed, process_group, columns, reduction, loss="clip", scale=scale, ids=ids,
        precision=precision, weight=weight, label_smoothing=label_smoothing, margin=margin,
        return_metrics=return_metrics,
    )  # fmt: skip
    both = ranks.logsumexp(
        rows, columns, scale, pairs=pairs, columns=True, maxima=return_metrics, precision=precision
    )
    positive = (cosines - margin) * scale
    losses = 0.5 * (softmax_loss(positive, both.rows) + softmax_loss(positive, both.columns))
    metrics = None
    if label_smoothing or return_metrics:
        sums, count = ranks.pair_sums(rows, columns, pairs)
        if label_smoothing:
            back, _ = ranks.pair_sums(columns, rows, pairs)
            losses = smooth(losses, positive, scale, 0.5 * (sums + back), count, label_smoothing)
        if return_metrics:
            metrics = softmax_metrics(cosines, positive, both, sums, count, ranks)
    return finish(losses, reduction, weight, metrics, ranks)


def clip(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    logit_scale: float | Tensor | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    distributed: str | None = None,
    process_group=None,
):
    """The loss of CLIP (Radford et al. 2021, fig. 3): both directions of a softmax, averaged.

    Args:
        image_features, text_features: [N, D], row by row.
        temperature: positive number or one-element tensor (differentiable).
        logit_scale: inverse temperature, already exponentiated; replaces ``temperature``.
        ids: [N] integers; pairs of equal id are never each other's negatives.
        weight, label_smoothing, normalize, distributed, process_group: as for :func:`nt_xent`.
        reduction: ``"mean"`` over N pairs, ``"sum"``, or ``"none"`` for [N] losses.
        return_metrics: as for :func:`nt_xent`, from image to text.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    scale = scale_of(temperature, logit_scale)
    return both_directions(
        image_features, text_features, ("image_features", "text_features"), scale, ids, weight,
        label_smoothing, 0.0, normalize, reduction, return_metrics, distributed, process_group,
    )  # fmt: skip


class CLIPLoss(TemperatureLoss):
    """:func:`~fastcl.functional.clip` as a module; ``logit_scale`` may come with each call."""

    def __init__(self, temperature: float = 0.07, *, label_smoothing: float = 0.0, **options):
        super().__init__(temperature, **options)
        check_fraction(label_smoothing, "label_smoothing")
        self.label_smoothing = label_smoothing

    def forward(self, image_features, text_features, logit_scale=None, *, ids=None, weight=None):
        return clip(
            image_features, text_features, self.temperature, logit_scale=logit_scale, ids=ids,
            weight=weight, label_smoothing=self.label_smoothing, **self.options(),
        )  # fmt: skip


def margin_softmax(
    query: Tensor,
    positive_key: Tensor,
    temperature: float | Tensor = 0.05,
    margin: float = 0.3,
    *,
    bidirectional: bool = True,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    distributed: str | None = None,
    process_group=None,
):
    """Additive margin softmax over the batch (Yang et al. 2019, eqs. 5 and 6; LaBSE).

    Args:
        query, positive_key: [N, D], row by row.
        temperature: positive number or one-element tensor (differentiable).
        margin: taken off the positive's cosine before it is scaled.
        bidirectional: average the losses of queries over keys and of keys over queries (one
            sweep), else queries over keys only.
        ids, weight, label_smoothing, normalize, reduction, return_metrics, distributed,
            process_group: as for :func:`clip`.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_number(margin, "margin")
    if bidirectional:
        return both_directions(
            query, positive_key, ("query", "positive_key"), scale_of(temperature), ids, weight,
            label_smoothing, margin, normalize, reduction, return_metrics, distributed,
            process_group,
        )  # fmt: skip
    return info_nce(
        query, positive_key, None, temperature, ids=ids, weight=weight, margin=margin,
        label_smoothing=label_smoothing, normalize=normalize, reduction=reduction,
        return_metrics=return_metrics, distributed=distributed, process_group=process_group,
    )  # fmt: skip


class MarginSoftmaxLoss(TemperatureLoss):
    """:func:`~fastcl.functional.margin_softmax` as a module."""

    described = ("margin", "bidirectional")

    def __init__(
        self,
        temperature: float = 0.05,
        margin: float = 0.3,
        *,
        bidirectional: bool = True,
        label_smoothing: float = 0.0,
        **options,
    ):
        super().__init__(temperature, **options)
        check_fraction(label_smoothing, "label_smoothing")
        check_number(margin, "margin")
        self.margin = margin
        self.bidirectional = bidirectional
        self.label_smoothing = label_smoothing

    def forward(self, query, positive_key, *, ids=None, weight=None):
        return margin_softmax(
            query, positive_key, self.temperature, self.margin, bidirectional=self.bidirectional,
            ids=ids, weight=weight, label_smoothing=self.label_smoothing, **self.options(),
        )  # fmt: skip

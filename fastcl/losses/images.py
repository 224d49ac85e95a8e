"""Losses of generated images: PatchNCE, and the 2C loss of ContraGAN."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Pairs, similarity_logsumexp
from ..ops.checks import check_features, check_same_width, precision_of
from ..ops.pair_sums import take_rows
from ..ops.pairs import describe
from .common import finish, softmax_loss
from .groups import negatives_within
from .inputs import check_choice, check_range, check_vector, scale_of, unit_pair, unit_rows
from .modules import TemperatureLoss

NEGATIVES = ("image", "batch")


def patch_nce(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    negatives: str = "image",
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
):
    """PatchNCE (Park et al. 2020): each patch of the output picks the input's patch of its place.

    Args:
        query: [B, P, D] features of the output's patches, or [P, D] of one image; any float dtype.
        key: the same shape, of the input's; a constant, it gets no gradient.
        temperature: positive number or one-element tensor (differentiable).
        negatives: other patches of the same ``"image"``, or of the whole ``"batch"``.
        weight: [B P] floats; each patch's share, the mean becoming sum(w l) / sum(w).
        normalize: divide features by their length first.
        reduction: ``"mean"`` over all patches, ``"sum"``, or ``"none"`` for [B P] losses.
        return_metrics: also return a dict with ``accuracy``, 0-dim.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_choice(negatives, "negatives", NEGATIVES)
    scale = scale_of(temperature)
    several = isinstance(query, Tensor) and query.dim() == 3
    for name, x in (("query", query), ("key", key)):
        check_features(x, name, "[B, P, D]" if several else "[P, D]")
    if key.shape != query.shape:
        raise ValueError(
            f"key {describe(key)}; expected shape {tuple(query.shape)}, the shape of query"
        )
    d = query.shape[-1]
    rows, cosines = unit_pair(
        query.reshape(-1, d), key.detach().reshape(-1, d), ("query", "key"), normalize
    )
    groups = (query.shape[0] if several and negatives == "image" else 1, -1, d)
    ours, theirs = (x.view(groups) for x in rows.chunk(2))
    found = negatives_within(
        ours, theirs.detach(), scale, maxima=return_metrics,
        precision=precision_of(query, key, None),
    )  # fmt: skip
    positive = cosines * scale
    metrics = None
    if return_metrics:
        right = positive > found.row_max.flatten()
        metrics = {"accuracy": right.to(rows.dtype).mean()}
    return finish(softmax_loss(positive, found.rows.flatten()), reduction, weight, metrics)


class PatchNCELoss(TemperatureLoss):
    """:func:`~fastcl.functional.patch_nce` as a module."""

    described = ("negatives",)
    shares_ranks = False

    def __init__(self, temperature: float = 0.07, *, negatives: str = "image", **options):
        super().__init__(temperature, **options)
        check_choice(negatives, "negatives", NEGATIVES)
        self.negatives = negatives

    def forward(self, query, key, *, weight=None):
        return patch_nce(
            query, key, self.temperature, negatives=self.negatives, weight=weight, **self.options()
        )


def conditional_contrastive(
    features: Tensor,
    labels: Tensor,
    proxies: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The conditional contrastive (2C) loss of ContraGAN (Kang and Park 2020, eq. 8).

    -ln of the share that the class's proxy and the other samples of the class have in the softmax
    over that proxy and all other samples.

    Args:
        features: [N, D], any float dtype.
        labels: [N] integers in [0, C).
        proxies: [C, D], an embedding of each class.
        temperature: positive number or one-element tensor (differentiable).
        weight: [N] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over N, ``"sum"``, or ``"none"`` for [N] losses.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range (of labels,
            looked at where that is free, on a CPU).
    """
    scale = scale_of(temperature)
    rows = unit_rows(features, "features", normalize)
    check_features(proxies, "proxies", "[C, D]")
    check_same_width(features, proxies, "features", "proxies")
    table = unit_rows(proxies, "proxies", normalize)
    labels = check_vector(labels, "labels", rows.shape[0], rows).to(torch.int64)
    check_range(labels, "labels", table.shape[0], "rows of proxies")
    precision = precision_of(features, proxies, None)
    own = (rows * take_rows(table, labels)).sum(1) * scale

    def sweep(pairs: Pairs) -> Tensor:
        return similarity_logsumexp(rows, None, scale, pairs=pairs, precision=precision).rows

    together = torch.logaddexp(own, sweep(Pairs("same", labels, skip=(0,))))
    losses = softmax_loss(together, sweep(Pairs("different", labels)))
    return finish(losses, reduction, weight, None)


class ConditionalContrastiveLoss(TemperatureLoss):
    """:func:`~fastcl.functional.conditional_contrastive` as a module."""

    shares_ranks = False
    has_metrics = False

    def __init__(self, temperature: float = 0.5, **options):
        super().__init__(temperature, **options)

    def forward(self, features, labels, proxies, *, weight=None):
        return conditional_contrastive(
            features, labels, proxies, self.temperature, weight=weight, **self.options()
        )

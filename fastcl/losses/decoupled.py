"""Decoupled contrastive learning: the positive leaves the denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import meet
from .common import Views, finish, softmax_metrics
from .inputs import check_positive, scale_of
from .modules import TemperatureLoss


def dcl(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    sigma: float | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    distributed: str | None = None,
    process_group=None,
):
    """DCL (Yeh et al. 2022, eq. 6), mean of both directions; with ``sigma``, DCLW (section 3.3).

    Per row: -w s+ + log-sum-exp over the 2B - 2 negatives. Negative values are correct.

    Args:
        z1, z2: [B, D], any float dtype; two views, row by row.
        temperature: positive number or one-element tensor (differentiable).
        sigma: temperature of the positive's weight w = 2 - B softmax(cosine / sigma) over the
            batch, a constant for the gradient; ``None`` for w = 1.
        ids, weight, normalize, reduction, return_metrics, distributed, process_group: as for
            :func:`nt_xent`.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    scale = scale_of(temperature)
    if sigma is not None:
        check_positive(sigma, "sigma")
    views = Views.of(z1, z2, ids, normalize)
    ranks = meet(
        distributed, process_group, views.rows, reduction, loss="dcl", scale=scale, sigma=sigma,
        ids=ids, precision=views.precision, weight=weight, return_metrics=return_metrics,
    )  # fmt: skip
    negatives = ranks.logsumexp(
        views.rows, None, scale, pairs=views.pairs, maxima=return_metrics, precision=views.precision
    )
    positive = views.cosines * scale
    attraction = positive
    if sigma is not None:
        batch = z1.shape[0]
        share = ranks.relative_softmax(views.cosines[:batch] / sigma)
        attraction = torch.cat([2.0 - share] * 2) * positive
    # a row without negatives has nothing to be pushed from
    sums = torch.where(torch.isneginf(negatives.rows), 0.0, negatives.rows)
    metrics = None
    if return_metrics:
        inner = ranks.pair_sums(views.rows, views.rows, views.pairs)
        metrics = softmax_metrics(views.cosines, positive, negatives, *inner, ranks)
    return finish(sums - attraction, reduction, views.repeat(weight), metrics, ranks)


class DCLLoss(TemperatureLoss):
    """:func:`~fastcl.functional.dcl` as a module."""

    sigma: float | None = None

    def __init__(self, temperature: float = 0.1, **options):
        super().__init__(temperature, **options)

    def forward(self, z1, z2, *, ids=None, weight=None):
        return dcl(
            z1, z2, self.temperature, sigma=self.sigma, ids=ids, weight=weight, **self.options()
        )


class DCLWLoss(DCLLoss):
    """:class:`DCLLoss` with the positives weighted, rarer ones more (DCLW)."""

    described = ("sigma",)

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, **options):
        super().__init__(temperature, **options)
        check_positive(sigma, "sigma")
        self.sigma = sigma

"""Negatives corrected for the positives hidden among them, and weighted by hardness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import meet
from .common import Views, finish, softmax_loss, softmax_metrics
from .inputs import check_fraction, check_number, scale_of
from .modules import TemperatureLoss


def hard_negative(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    *,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    distributed: str | None = None,
    process_group=None,
):
    """Hard negatives (Robinson et al. 2021, eq. 4); beta = 0 is :func:`debiased`.

    With n negatives of score s (n = 2B - 2 unless ids drop some) and the positive's s+:
    loss = softplus(ln N_g - s+), N_g = max((S - tau_plus n e^s+) / (1 - tau_plus), n e^(-1/T)),
    S = n mean(e^((beta+1) s)) / mean(e^(beta s)). The gradient flows through the weights.

    Args:
        z1, z2: [B, D], any float dtype; two views, row by row.
        temperature: positive number or one-element tensor (differentiable).
        beta: concentration on hard negatives, 0 or more; beyond 0 it costs a second sweep.
        tau_plus: prior probability that a negative is of the anchor's class, in [0, 1).
        ids, weight, normalize, reduction, return_metrics, distributed, process_group: as for
            :func:`nt_xent`.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_fraction(tau_plus, "tau_plus")
    check_number(beta, "beta", minimum=0.0)
    scale = scale_of(temperature)
    views = Views.of(z1, z2, ids, normalize)
    rows, pairs, precision = views.rows, views.pairs, views.precision
    ranks = meet(
        distributed, process_group, rows, reduction, loss="hard_negative", scale=scale, beta=beta,
        tau_plus=tau_plus, ids=ids, precision=precision, weight=weight,
        return_metrics=return_metrics,
    )  # fmt: skip
    log_count = ranks.pair_count(rows, rows.shape[0], pairs).log()

    def sweep(factor, maxima=False):
        return ranks.logsumexp(
            rows, None, scale * factor, pairs=pairs, maxima=maxima, precision=precision
        )

    if beta == 0.0:
        negatives = sweep(1.0, return_metrics)
        total = negatives.rows
    else:
        hard, easy = sweep(beta + 1.0).rows, sweep(beta).rows
        # without negatives both are -inf, and so is the total
        total = hard + log_count - torch.where(torch.isneginf(easy), 0.0, easy)
        negatives = sweep(1.0, True) if return_metrics else None
    positive = views.cosines * scale
    if tau_plus > 0.0:
        # ln((S - tau_plus n e^s+) / (1 - tau_plus)), where the difference is positive
        excess = math.log(tau_plus) + log_count + positive - total
        above = excess < 0
        remainder = torch.log(-torch.expm1(torch.where(above, excess, -1.0)))
        total = torch.where(above, total + remainder - math.log1p(-tau_plus), float("-inf"))
    losses = softmax_loss(positive, torch.maximum(total, log_count - scale))
    metrics = None
    if return_metrics:
        sums, count = ranks.pair_sums(rows, rows, pairs)
        metrics = softmax_metrics(views.cosines, positive, negatives, sums, count, ranks)
    return finish(losses, reduction, views.repeat(weight), metrics, ranks)


def debiased(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.5,
    tau_plus: float = 0.1,
    **options,
):
    """Debiased contrastive loss (Chuang et al. 2020, eq. 8): :func:`hard_negative`, beta = 0."""
    return hard_negative(z1, z2, temperature, 0.0, tau_plus, **options)


class HardNegativeLoss(TemperatureLoss):
    """:func:`~fastcl.functional.hard_negative` as a module."""

    described: tuple[str, ...] = ("beta", "tau_plus")

    def __init__(
        self, temperature: float = 0.5, beta: float = 1.0, tau_plus: float = 0.1, **options
    ):
        super().__init__(temperature, **options)
        check_fraction(tau_plus, "tau_plus")
        check_number(beta, "beta", minimum=0.0)
        self.beta = beta
        self.tau_plus = tau_plus

    def forward(self, z1, z2, *, ids=None, weight=None):
        return hard_negative(
            z1, z2, self.temperature, self.beta, self.tau_plus, ids=ids, weight=weight,
            **self.options(),
        )  # fmt: skip


class DebiasedLoss(HardNegativeLoss):
    """:func:`~fastcl.functional.debiased` as a module."""

    described = ("tau_plus",)

    def __init__(self, temperature: float = 0.5, tau_plus: float = 0.1, **options):
        super().__init__(temperature, 0.0, tau_plus, **options)

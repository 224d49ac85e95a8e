"""Information bottleneck: what a Gaussian code pays for being informative."""

from __future__ import annotations

import math

from torch import Tensor

from ..ops.checks import check_same_shape
from .common import finish
from .inputs import can_look, check_positive, unit_rows
from .modules import FixedLoss


def vib_compression(
    mean: Tensor, std: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)), the compression term of VIB (Alemi et al. 2017, eq. 17).

    The whole loss is cross-entropy + beta times this.

    Args:
        mean, std: [N, D], any float dtype; std positive.
        weight: [N] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        reduction: ``"mean"`` over N, ``"sum"``, or ``"none"`` for [N]; always the sum over D.

    Returns:
        The divergence in nats, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    mu, sigma = _gaussian(mean, std, "mean", "std")
    losses = 0.5 * (mu.square() + sigma.square() - 1.0 - 2.0 * sigma.log()).sum(1)
    return finish(losses, reduction, weight, None)


def mib_compression(
    mean1: Tensor,
    std1: Tensor,
    mean2: Tensor,
    std2: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """1/2 (KL(p1 || p2) + KL(p2 || p1)) of the two views' Gaussian codes, the compression term of
    the multi-view information bottleneck (MIB, Federici et al. 2020).

    The whole loss is minus a bound on I(z1; z2) (:func:`mi_lower_bound`) + beta times this, with
    beta as :func:`exponential_beta`.

    Args:
        mean1, std1, mean2, std2: [N, D], any float dtype; the stds positive.
        weight, reduction: as for :func:`vib_compression`.

    Returns:
        The divergence in nats, fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_same_shape(mean1, mean2, "mean1", "mean2")
    mu1, sigma1 = _gaussian(mean1, std1, "mean1", "std1")
    mu2, sigma2 = _gaussian(mean2, std2, "mean2", "std2")
    gap, first, second = (mu1 - mu2).square(), sigma1.square(), sigma2.square()
    # the logarithms of the two directions cancel, and so do most of the quotients
    spread = (first - second).square() / (first * second)
    losses = 0.25 * (spread + gap / first + gap / second).sum(1)
    return finish(losses, reduction, weight, None)


def _gaussian(mean: Tensor, std: Tensor, mean_name: str, std_name: str) -> tuple[Tensor, Tensor]:
    check_same_shape(mean, std, mean_name, std_name)
    mu = unit_rows(mean, mean_name, normalize=False)
    sigma = unit_rows(std, std_name, normalize=False)
    if can_look(sigma):
        count = int((sigma <= 0).sum())
        if count:
            raise ValueError(f"{std_name} holds {count} numbers of 0 or less; expected positive")
    return mu, sigma


def exponential_beta(
    step: int,
    start: int = 50_000,
    length: int = 100_000,
    first: float = 1e-3,
    last: float = 1.0,
) -> float:
    """The weight of MIB's compression term: ``first`` until ``start``, then growing exponentially
    to ``last`` in ``length`` steps, and ``last`` from there on.

    Raises:
        ValueError: a length, first or last that is not positive.
    """
    for name, value in (("length", length), ("first", first), ("last", last)):
        check_positive(value, name)
    share = min(max((step - start) / length, 0.0), 1.0)
    return first * math.exp(share * math.log(last / first))


class VIBCompression(FixedLoss):
    """:func:`~fastcl.functional.vib_compression` as a module."""

    def __init__(self, *, reduction: str = "mean"):
        super().__init__(reduction=reduction)

    def forward(self, mean, std, *, weight=None):
        return vib_compression(mean, std, weight=weight, **self.options())


class MIBCompression(FixedLoss):
    """:func:`~fastcl.functional.mib_compression` as a module."""

    def __init__(self, *, reduction: str = "mean"):
        super().__init__(reduction=reduction)

    def forward(self, mean1, std1, mean2, std2, *, weight=None):
        return mib_compression(mean1, std1, mean2, std2, weight=weight, **self.options())

"""Losses of sigmoid type: every pair is a binary decision."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import meet
from ..ops import Pairs, pair_sigmoid
from ..ops.checks import as_scalar, check_dense, precision_of, recordable
from ..ops.pairs import describe
from ..ops.registry import FLOATS
from .common import finish, whole_loss
from .inputs import can_look, check_number, check_vector, given_scores, scale_of, unit_pair
from .modules import FixedLoss, TemperatureLoss


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    *,
    logit_scale: float | Tensor | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    distributed: str | None = None,
    process_group=None,
):
    """SigLIP (Zhai et al. 2023, algorithm 1): softplus of every pair's signed logit.

    Per image: softplus(-(t s_ii + b)) + sum over j != i of softplus(t s_ij + b).

    Args:
        image_features, text_features: [N, D], row by row; any float dtype.
        temperature: 1 / t, a positive number or one-element tensor (differentiable).
        bias: b, a number or one-element tensor (differentiable).
        logit_scale: t itself, already exponentiated; replaces ``temperature``.
        ids: [N] integers; pairs of equal id are never each other's negatives.
        weight: [N] floats; each image's share, the mean becoming sum(w l) / sum(w).
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over N (not N^2), ``"sum"``, or ``"none"`` for [N] losses.
        return_metrics: also return a dict with ``positive_similarity`` and
            ``negative_similarity`` (mean cosines), 0-dim each.
        distributed, process_group: as for :func:`nt_xent`.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    names = ("image_features", "text_features")
    scale = scale_of(temperature, logit_scale)
    alone = distributed is None and process_group is None
    if ids is None and weight is None and not return_metrics and alone:
        loss = whole_loss(
            pair_sigmoid, image_features, text_features, names, reduction, scale, bias,
            normalize=normalize,
        )  # fmt: skip
        if loss is not None:
            return loss
    rows, cosines = unit_pair(image_features, text_features, names, normalize)
    n = image_features.shape[0]
    images, texts = rows.split(n)
    pairs = Pairs(skip=(0,))
    if ids is not None:
        pairs = Pairs("different", check_vector(ids, "ids", n, images), skip=(0,))
    precision = precision_of(image_features, text_features, None)
    bias = as_scalar(bias, "bias", images, precision)
    ranks = meet(
        distributed, process_group, texts, reduction, loss="siglip", scale=scale, ids=ids,
        precision=precision, weight=weight, return_metrics=return_metrics,
    )  # fmt: skip
    negatives = ranks.sum(
        images, texts, scale, phi="softplus", row_bias=bias.expand(n), pairs=pairs,
        precision=precision,
    )  # fmt: skip
    losses = negatives - F.logsigmoid(cosines * scale + bias)
    metrics = None
    if return_metrics:
        with torch.no_grad():
            sums, count = ranks.pair_sums(images, texts, pairs)
            cosine, number, negative, count = ranks.totals(
                cosines.sum(), torch.ones_like(cosines).sum(), sums.sum(), count.sum()
            )
            metrics = {
                "positive_similarity": cosine / number,
                "negative_similarity": negative / count.clamp_min(1.0),
            }
    return finish(losses, reduction, weight, metrics, ranks)


class SigLIPLoss(TemperatureLoss):
    """:func:`~fastcl.functional.siglip` as a module.

    With ``learnable``, both the scale (``logit_scale``, its logarithm) and ``logit_bias`` are
    parameters; either may also come with each call.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        *,
        learnable: bool = False,
        **options,
    ):
        super().__init__(temperature, learnable=learnable, **options)
        check_number(bias, "bias")
        self.logit_bias: Tensor | float = (
            nn.Parameter(torch.tensor(float(bias))) if learnable else bias
        )

    def forward(
        self, image_features, text_features, logit_scale=None, logit_bias=None, *, ids=None,
        weight=None,
    ):  # fmt: skip
        return siglip(
            image_features, text_features, self.temperature,
            self.logit_bias if logit_bias is None else logit_bias,
            logit_scale=logit_scale, ids=ids, weight=weight, **self.options(),
        )  # fmt: skip


def nce(
    positive_scores: Tensor,
    negative_scores: Tensor,
    log_noise: float | Tensor,
    negative_log_noise: float | Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Noise-contrastive estimation (Gutmann and Hyvarinen 2010; Mnih and Teh 2012) of given scores.

    Per sample, with k noise samples: -ln sigma(s+ - ln k p_n(+)) - sum over the noise samples of
    ln(1 - sigma(s- - ln k p_n(-))). :func:`memory_bank` has the form that estimates a constant.

    Args:
        positive_scores: [N] floats, unnormalised log-probabilities under the model.
        negative_scores: [N, k], of samples drawn from the noise.
        log_noise: ln p_n of the positives, a number or [N].
        negative_log_noise: ln p_n of the negatives, a number or [N, k]; by default ``log_noise``,
            which then is a number.
        weight: [N] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        reduction: ``"mean"`` over N, ``"sum"``, or ``"none"`` for [N] losses.

    Returns:
        The loss in fp32 (fp64 for fp64 scores).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    positive, negative = given_scores(positive_scores, negative_scores)
    n, k = negative.shape
    if negative_log_noise is None:
        negative_log_noise = log_noise
        if isinstance(log_noise, Tensor) and log_noise.dim():
            raise ValueError(
                f"log_noise {describe(log_noise)} came alone; expected negative_log_noise beside it"
            )
    shifts = []
    for name, noise, shape in (
        ("log_noise", log_noise, (n,)),
        ("negative_log_noise", negative_log_noise, (n, k)),
    ):
        if isinstance(noise, Tensor):
            if noise.dtype not in FLOATS:
                raise TypeError(f"{name} {describe(noise)}; expected a number or floats")
            check_dense(noise, name)
            if noise.dim() and (noise.shape != shape or noise.device != positive.device):
                raise ValueError(
                    f"{name} {describe(noise)}; expected a number or shape {shape} on "
                    f"{positive.device}"
                )
            bad = int((~torch.isfinite(noise)).sum()) if can_look(noise) else 0
            if bad:
                raise ValueError(
                    f"{name} holds NaN or infinity {bad} times; expected finite numbers"
                )
            noise = recordable(noise)
        else:
            check_number(noise, name)
        shifts.append(noise + math.log(k))
    losses = -F.logsigmoid(positive - shifts[0]) - F.logsigmoid(shifts[1] - negative).sum(1)
    return finish(losses, reduction, weight, None)


class NCELoss(FixedLoss):
    """:func:`~fastcl.functional.nce` as a module."""

    def __init__(self, *, reduction: str = "mean"):
        super().__init__(reduction=reduction)

    def forward(
        self, positive_scores, negative_scores, log_noise, negative_log_noise=None, *, weight=None
    ):
        return nce(
            positive_scores, negative_scores, log_noise, negative_log_noise, weight=weight,
            **self.options(),
        )  # fmt: skip

"""Losses that predict what follows: two of the name CPC."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Pairs, similarity_logsumexp
from ..ops.checks import check_features, check_same_width, precision_of
from ..ops.pairs import describe
from ..ops.registry import FLOATS
from .common import finish, softmax_loss
from .groups import negatives_within
from .inputs import check_binary, check_choice, check_positive, scale_of, unit_pair, unit_rows
from .modules import FixedLoss, TemperatureLoss

NEGATIVES = ("batch", "sequence", "all", "other_sequences")


def mi_lower_bound(loss: Tensor, candidates: int | Tensor) -> Tensor:
    """The mutual information that an InfoNCE loss proves: ln(candidates) - loss, in nats.

    Args:
        loss: mean of :func:`info_nce` or :func:`cpc` (van den Oord et al. 2018, section 2.3).
        candidates: how many keys each query chooses from, the positive included.

    Raises:
        TypeError: a loss that is no float. ValueError: fewer than one candidate.
    """
    real = loss.dtype in FLOATS if isinstance(loss, Tensor) else isinstance(loss, float)
    if not real:
        raise TypeError(f"loss {describe(loss)}; expected a float or a tensor of floats")
    if isinstance(candidates, Tensor):
        return candidates.log() - loss
    check_positive(candidates, "candidates")
    return math.log(candidates) - loss


def cpc(
    predictions: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    negatives: str = "batch",
    weight: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    return_metrics: bool = False,
):
    """Contrastive predictive coding (van den Oord et al. 2018, eq. 4), the mean over steps ahead.

    Each prediction W_k c_t picks its target z_(t+k) among *targets*, never among contexts. (The
    loss of a widespread implementation of that name is :func:`cpc_bce`.)

    Args:
        predictions, targets: [B, K, D], from one time of B sequences for K steps ahead, or
            [B, T, K, D] from T times; ``predictions[b, t, k]`` belongs to ``targets[b, t, k]``.
        temperature: positive number or one-element tensor (differentiable).
        negatives: where other targets of the same k come from: ``"batch"``, the other sequences
            at the same time; ``"sequence"``, other times of the same sequence; ``"all"``, both and
            other times of other sequences; ``"other_sequences"`` at any time.
        weight: [B] floats; each sequence's share, the mean becoming sum(w l) / sum(w).
        normalize: divide predictions and targets by their length first.
        reduction: ``"mean"``, or over sequences, each the mean of its steps, ``"sum"`` or
            ``"none"`` for [B] losses.
        return_metrics: also return a dict: ``accuracy`` (the target beats every negative; 0-dim)
            and ``step_accuracy`` [K].

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_choice(negatives, "negatives", NEGATIVES)
    scale = scale_of(temperature)
    timed = isinstance(predictions, Tensor) and predictions.dim() == 4
    check_features(predictions, "predictions", "[B, T, K, D]" if timed else "[B, K, D]")
    _check_shape(targets, "targets", predictions, "predictions")
    if negatives == "sequence" and (not timed or predictions.shape[1] == 1):
        raise ValueError(
            f"predictions {describe(predictions)}; expected [B, T, K, D] with several times T for "
            "negatives of the same sequence"
        )
    b, k, d = predictions.shape[0], predictions.shape[-2], predictions.shape[-1]
    t = predictions.shape[1] if timed else 1
    precision = precision_of(predictions, targets, None)
    rows, scores = unit_pair(
        predictions.reshape(-1, d), targets.reshape(-1, d), ("predictions", "targets"), normalize
    )
    queries, keys = (x.view(b, t, k, d) for x in rows.chunk(2))
    positive = (scores * scale).view(b, t, k)

    sums, *largest = _others(queries, keys, scale, negatives, return_metrics, precision)
    losses = softmax_loss(positive, sums).mean((1, 2))
    metrics = None
    if return_metrics:
        right = (positive > largest[0]).to(rows.dtype)
        metrics = {"accuracy": right.mean(), "step_accuracy": right.mean((0, 1))}
    return finish(losses, reduction, weight, metrics)


def _others(queries, keys, scale, negatives: str, maxima: bool, precision: torch.dtype):
    """Log-sum-exp (and maximum) of each prediction [B, T, K, D] over its negatives: [B, T, K]."""
    b, t, k, d = queries.shape
    order = {"batch": (1, 2, 0), "sequence": (0, 2, 1)}.get(negatives, (2, 0, 1))
    queries, keys = (x.permute(*order, 3) for x in (queries, keys))
    shape = queries.shape[:3]
    if negatives == "other_sequences":
        ids = torch.arange(b, device=queries.device).repeat_interleave(t)
        steps = [
            similarity_logsumexp(
                query, key, scale, pairs=Pairs("different", ids), maxima=maxima,
                precision=precision,
            )
            for query, key in zip(queries.flatten(1, 2), keys.flatten(1, 2), strict=True)
        ]  # fmt: skip
        sums, largest = (torch.stack([step[i] for step in steps]) for i in (0, 2))
    else:
        groups = (k, b * t, d) if negatives == "all" else (-1, shape[2], d)
        sums, _, largest, _ = negatives_within(
            queries.reshape(groups), keys.reshape(groups), scale, maxima=maxima, precision=precision
        )
    back = [order.index(i) for i in range(3)]
    found = (sums, largest) if maxima else (sums,)
    return [x.view(shape).permute(back).contiguous() for x in found]


def _check_shape(x: Tensor, name: str, like: Tensor, like_name: str) -> None:
    dims = f"[{', '.join('.' for _ in like.shape)}]"
    check_features(x, name, dims)
    if x.shape != like.shape:
        raise ValueError(
            f"{name} {describe(x)}; expected shape {tuple(like.shape)}, the shape of {like_name}"
        )
    check_same_width(like, x, like_name, name)


class _Predictors(nn.Linear):
    """W_1 to W_K: contexts [..., C] to predictions [..., K, D]."""

    def __init__(self, context_dim: int, feature_dim: int, steps: int):
        super().__init__(context_dim, steps * feature_dim, bias=False)
        self.steps = steps

    def forward(self, context: Tensor) -> Tensor:
        return super().forward(context).unflatten(-1, (self.steps, -1))


class CPCLoss(TemperatureLoss):
    """:func:`~fastcl.functional.cpc` with its predictors W_k.

    ``CPCLoss(256, 512, steps=12)(context, features)`` takes contexts [B, T, C] and features
    [B, T, D] of the same times and predicts from every time that has ``steps`` more; or contexts
    [B, C] of one time and the features [B, K, D] that followed.
    """

    described = ("negatives",)
    shares_ranks = False

    def __init__(
        self,
        context_dim: int,
        feature_dim: int,
        steps: int = 12,
        temperature: float = 1.0,
        *,
        negatives: str = "batch",
        normalize: bool = False,
        **options,
    ):
        super().__init__(temperature, normalize=normalize, **options)
        check_choice(negatives, "negatives", NEGATIVES)
        self.negatives = negatives
        self.predictors = _Predictors(context_dim, feature_dim, steps)

    def forward(self, context, features, *, weight=None):
        steps = self.predictors.steps
        check_features(features, "features", "[B, T, D]")
        if context.dim() == 3:
            times = features.shape[1] - steps
            if context.shape[:2] != features.shape[:2] or times < 1:
                raise ValueError(
                    f"context {describe(context)}; expected as many sequences and times as "
                    f"features, {tuple(features.shape[:2])}, and more times than steps = {steps}"
                )
            context = context[:, :times]
            features = features[:, 1:].unfold(1, steps, 1).transpose(2, 3)
        return cpc(
            self.predictors(context), features, self.temperature, negatives=self.negatives,
            weight=weight, **self.options(),
        )  # fmt: skip


def cpc_bce(
    predictions: Tensor,
    targets: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_metrics: bool = False,
):
    """Do these features follow this context? The binary loss that some call CPC.

    Cross-entropy of one logit per sequence, the mean over steps and code of prediction times
    target. Negatives are sequences with wrong continuations. It is *not* InfoNCE: see :func:`cpc`.

    Args:
        predictions, targets: [B, K, D]; any float dtype.
        labels: [B] bools or integers, 1 where targets are the true continuation.
        weight: [B] floats; each sequence's share, the mean becoming sum(w l) / sum(w).
        reduction: ``"mean"`` over B, ``"sum"``, or ``"none"`` for [B] losses.
        return_metrics: also return a dict with ``accuracy``, 0-dim.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_features(predictions, "predictions", "[B, K, D]")
    _check_shape(targets, "targets", predictions, "predictions")
    labels = check_binary(labels, "labels", predictions.shape[:1], predictions)
    p, z = (
        unit_rows(x.flatten(1), name, normalize=False)
        for x, name in ((predictions, "predictions"), (targets, "targets"))
    )
    logits = (p * z).mean(1)
    losses = -F.logsigmoid(torch.where(labels, logits, -logits))
    metrics = None
    if return_metrics:
        metrics = {"accuracy": ((logits > 0) == labels).to(logits.dtype).mean()}
    return finish(losses, reduction, weight, metrics)


class CPCBCELoss(FixedLoss):
    """:func:`~fastcl.functional.cpc_bce` with its predictors.

    ``CPCBCELoss(256, 64, steps=4)(context, features, labels)`` takes contexts [B, C] and the
    features [B, K, D] said to follow.
    """

    def __init__(
        self,
        context_dim: int,
        feature_dim: int,
        steps: int = 4,
        *,
        reduction: str = "mean",
        return_metrics: bool = False,
    ):
        super().__init__(reduction=reduction, return_metrics=return_metrics)
        self.predictors = _Predictors(context_dim, feature_dim, steps)

    def forward(self, context, features, labels, *, weight=None):
        predictions = self.predictors(context)
        return cpc_bce(predictions, features, labels, weight=weight, **self.options())

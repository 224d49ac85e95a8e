"""Contrastive learning for captions: a model against a frozen reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import check_dense, check_features, recordable
from ..ops.pairs import describe
from ..ops.registry import accumulator
from .common import finish
from .inputs import can_look, check_number, check_range, given_scores
from .modules import FixedLoss


def sequence_log_prob(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """ln p of whole sequences: the sum over tokens, without any division by length.

    Args:
        logits: [N, T, V], any float dtype, the scores that predict each token.
        tokens: [N, T] integers in [0, V), the end token included; anything where masked.
        mask: [N, T] bools, which tokens belong to the sequence (the end token does); ``None``: all.

    Returns:
        [N] in fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; NaN (looked
            at where that is free, in eager mode on a CPU).
    """
    check_features(logits, "logits", "[N, T, V]")
    shape = logits.shape[:2]
    expected = {"tokens": (tokens, "integers")}
    if mask is not None:
        expected["mask"] = (mask, "bools")
    for name, (x, kind) in expected.items():
        fits = isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex())
        if not fits or (kind == "bools" and x.dtype != torch.bool):
            raise TypeError(f"{name} {describe(x)}; expected a tensor of {kind} {tuple(shape)}")
        check_dense(x, name)
        if x.shape != shape or x.device != logits.device:
            raise ValueError(
                f"{name} {describe(x)}; expected shape {tuple(shape)}, as logits, on "
                f"{logits.device}"
            )
    if mask is not None:  # what stands there is often no token, -100 say
        mask = recordable(mask)
        tokens = torch.where(mask, tokens, 0)
    check_range(tokens, "tokens", logits.shape[2], "numbers of logits' columns")
    acc = accumulator(logits.dtype)
    logits = recordable(logits)
    chosen = logits.gather(2, tokens.to(torch.int64)[:, :, None])[:, :, 0].to(acc)
    terms = chosen - torch.logsumexp(logits.to(acc), 2)
    found = (terms if mask is None else torch.where(mask, terms, 0.0)).sum(1)
    bad = int(torch.isnan(found).sum()) if can_look(found) else 0
    if bad:  # minus infinity is a token that cannot be, and no error
        raise ValueError(f"logits holds NaN in {bad} of its {len(found)} sequences; expected none")
    return found


def caption_contrastive(
    positive: Tensor,
    reference_positive: Tensor,
    negative: Tensor,
    reference_negative: Tensor,
    *,
    log_noise_ratio: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Contrastive learning for image captioning (Dai and Lin 2017).

    With G = ln p_model - ln p_reference of a whole caption: -ln sigma(G+ - ln nu), and the mean
    over mismatched captions of -ln(1 - sigma(G- - ln nu)).

    Args:
        positive, reference_positive: [N] ln p of the image's own caption, as
            :func:`sequence_log_prob` gives them. The reference is a frozen copy in evaluation mode.
        negative, reference_negative: [N] or [N, K], of captions of other images.
        log_noise_ratio: ln nu, a number; the authors' code has 0.
        weight: [N] floats; each caption's share, the mean becoming sum(w l) / sum(w).
        reduction: ``"mean"`` over N, ``"sum"``, or ``"none"`` for [N] losses.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_number(log_noise_ratio, "log_noise_ratio")
    own, others = given_scores(positive, negative, ("positive", "negative"))
    names = ("reference_positive", "reference_negative")
    own_reference, reference = given_scores(reference_positive, reference_negative, names)
    if reference.shape != others.shape:
        raise ValueError(
            f"reference_negative {describe(reference_negative)}; expected shape "
            f"{tuple(negative.shape)}, the shape of negative"
        )
    gain = own - own_reference.detach() - log_noise_ratio
    gains = others - reference.detach() - log_noise_ratio
    losses = -F.logsigmoid(gain) - F.logsigmoid(-gains).mean(1)
    return finish(losses, reduction, weight, None)


class CaptionContrastiveLoss(FixedLoss):
    """:func:`~fastcl.functional.caption_contrastive` as a module."""

    def __init__(self, *, log_noise_ratio: float = 0.0, reduction: str = "mean"):
        check_number(log_noise_ratio, "log_noise_ratio")
        super().__init__(log_noise_ratio=log_noise_ratio, reduction=reduction)

    def forward(self, positive, reference_positive, negative, reference_negative, *, weight=None):
        return caption_contrastive(
            positive, reference_positive, negative, reference_negative, weight=weight,
            **self.options(),
        )  # fmt: skip

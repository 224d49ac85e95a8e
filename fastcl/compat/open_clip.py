"""The losses of open_clip (3 and 4) on fastcl's operators.

    from fastcl.compat.open_clip import ClipLoss      # was: from open_clip.loss import ClipLoss

Same constructors and values; no matrix of logits is formed, on one rank or many. Features are
taken as they are, as there: normalise them first; ``logit_scale`` is already exponentiated. What
differs, and why:

- ``ClipLoss`` across ranks gives every weight the gradient of the global batch, whatever
  ``gather_with_grad`` says: without it open_clip's is 1/world_size of that, or with ``local_loss``
  points elsewhere (open_clip #616, #894). The constructor warns where that changes something.
- Local batches of ranks may differ in size; open_clip aborts.
- ``SigLipLoss`` needs no ``chunk_size`` (open_clip #1214: chunks keep all logits for the backward);
  it is accepted and changes nothing.
- The loss of 16-bit features is fp32, and sums are never in 16 bits.
- ``use_horovod`` is refused.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as f
from ..distributed import ALONE, Ranks, group_of, meet, rows_of
from ..losses.common import reduce, softmax_loss, whole_loss
from ..losses.inputs import scale_of, stored_rows, unit_pair
from ..ops import Pairs, pair_sigmoid
from ..ops.checks import (
    as_scalar,
    check_features,
    check_same_shape,
    check_same_width,
    precision_of,
)
from ..ops.registry import accumulator
from .common import CompatLoss, own_mean

__all__ = ["ClipLoss", "SigLipLoss"]

_NAMES = ("image_features", "text_features")
_DIST_IMPLS = {"bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}


class _RankedLoss(CompatLoss):
    """A loss that is told its rank and how many there are."""

    rank: int
    world_size: int

    def _ranks(self, mode: str, keys: Tensor, **facts) -> Ranks:
        """
        Raises:
            RuntimeError: no process group. ValueError: one of another size.
        """
        group = group_of(None)
        here = (0, 1) if group is None else (group.rank, group.size)
        if here != (self.rank, self.world_size):
            raise ValueError(
                f"rank and world_size are {self.rank} and {self.world_size}; expected those of the "
                f"default process group, {here[0]} and {here[1]}"
            )
        return meet(mode, None, keys, "mean", **facts)


def _untouched(loss: Tensor, logit_bias) -> Tensor:
    """``loss`` with a zero gradient for a bias that it does not depend on, as DDP needs."""
    if logit_bias is None:
        return loss
    return loss + 0.0 * as_scalar(logit_bias, "logit_bias", loss, loss.dtype)


class ClipLoss(_RankedLoss):
    """open_clip's ``ClipLoss``: the mean of both directions' softmax losses.

    Args:
        local_loss: a rank returns the mean over its own pairs, else over those of all ranks.
        gather_with_grad: gradients are always as if it were True; see the module.
        cache_labels: there is nothing to cache.
        rank, world_size: those of the default process group.
        use_horovod: must be False.

    Raises:
        ValueError: ``use_horovod``.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod is True; expected False: fastcl has torch.distributed")
        if world_size > 1 and not gather_with_grad:
            warnings.warn(
                "gather_with_grad is False, but fastcl's ClipLoss gives the gradient of the global "
                "batch all the same; open_clip's is wrong then (open_clip #616, #894)",
                UserWarning,
                stacklevel=2,
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def get_ground_truth(self, device, num_logits: int) -> Tensor:
        """The positives' columns for :meth:`get_logits`, which the loss itself does not need."""
        start = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(start, start + num_logits, device=device)

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
        """Both matrices of logits, for losses derived from this one; the loss forms neither."""
        images, texts = image_features, text_features
        if self.world_size > 1:
            images, texts = (
                x if rows is None else rows.spread(x)
                for x, rows in ((x, rows_of(None, x, "logits")) for x in (images, texts))
            )
        if self.local_loss:
            per_image = logit_scale * image_features @ texts.T
            per_text = logit_scale * text_features @ images.T
        else:
            per_image = logit_scale * images @ texts.T
            per_text = per_image.T
        if logit_bias is not None:
            per_image, per_text = per_image + logit_bias, per_text + logit_bias
        return per_image, per_text

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ):
        """The loss, or ``{"contrastive_loss": loss}``, in fp32 (fp64 for fp64 inputs).

        Args:
            image_features, text_features: [N, D], row by row.
            logit_scale: positive number or one-element tensor (differentiable).
            logit_bias: has no influence on a softmax; its gradient is 0.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape, device or range; ranks
                that disagree; NaN or infinity (looked at where that is free, on a CPU).
            RuntimeError: a rank that ended or does not answer.
        """
        if self.world_size == 1:
            loss = f.clip(image_features, text_features, logit_scale=logit_scale, normalize=False)
        else:
            loss = self._over_ranks(image_features, text_features, scale_of(1.0, logit_scale))
        loss = _untouched(loss, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_ranks(self, image_features, text_features, scale) -> Tensor:
        rows, scores = unit_pair(image_features, text_features, _NAMES, normalize=False)
        images, texts = rows.split(image_features.shape[0])
        precision = precision_of(image_features, text_features, None)
        ranks = self._ranks("gather", texts, loss="compat clip", precision=precision)
        both = ranks.logsumexp(
            images, texts, scale, pairs=Pairs(skip=(0,)), columns=True, precision=precision
        )
        positive = scores * scale
        losses = 0.5 * (softmax_loss(positive, both.rows) + softmax_loss(positive, both.columns))
        return own_mean(losses, ranks) if self.local_loss else reduce(losses, "mean", None, ranks)


class SigLipLoss(_RankedLoss):
    """open_clip's ``SigLipLoss``: sums over a rank's images and all texts, over the local batch.

    Args:
        cache_labels: there is nothing to cache.
        rank, world_size: those of the default process group.
        dist_impl: ``"bidir"`` (the default) and ``"shift"`` pass texts around a ring, ``"reduce"``
            and ``"gather"`` gather them; the result is the same.
        chunk_size: changes nothing.

    Raises:
        ValueError: an unknown ``dist_impl``.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in _DIST_IMPLS:
            raise ValueError(f"dist_impl is {dist_impl!r}; expected one of {tuple(_DIST_IMPLS)}")
        self.chunk_size = chunk_size

    def get_ground_truth(self, device, dtype, num_logits: int, negative_only: bool = False):
        """[N, N] of -1, and 1 on the diagonal unless ``negative_only``; the loss needs none."""
        labels = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1.0)

    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None) -> Tensor:
        """The matrix of logits, for those who want to look at it; the loss itself forms none."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ):
        """The loss, or ``{"contrastive_loss": loss}``, in fp32 (fp64 for fp64 inputs).

        Args:
            image_features, text_features: [N, D], row by row.
            logit_scale, logit_bias: numbers or one-element tensors (differentiable).

        Raises: as :meth:`ClipLoss.forward`.
        """
        mode = None if self.world_size == 1 else _DIST_IMPLS[self.dist_impl]
        loss = self._sum(image_features, text_features, logit_scale, logit_bias, False, mode)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self, image_features, text_features, logit_scale, logit_bias=None, negative_only=False
    ) -> Tensor:
        """Of this process alone; with ``negative_only`` no pair is a positive one."""
        return self._sum(
            image_features, text_features, logit_scale, logit_bias, negative_only, None
        )

    def _sum(
        self, image_features, text_features, logit_scale, logit_bias, negative_only: bool, mode
    ) -> Tensor:
        images, texts = image_features, text_features
        check_features(images, _NAMES[0])
        check_features(texts, _NAMES[1])
        check = check_same_width if negative_only else check_same_shape
        check(images, texts, *_NAMES)
        precision = precision_of(images, texts, None)
        bias = as_scalar(0.0 if logit_bias is None else logit_bias, "logit_bias", images, precision)
        scale = as_scalar(logit_scale, "logit_scale", images, precision)
        if mode is None and not negative_only:
            loss = whole_loss(
                pair_sigmoid, images, texts, _NAMES, "mean", scale, bias, normalize=False
            )
            if loss is not None:
                return loss
        acc = accumulator(torch.promote_types(images.dtype, texts.dtype))
        images, texts = (
            stored_rows(x, name).to(acc) for x, name in zip((images, texts), _NAMES, strict=True)
        )
        n = images.shape[0]
        ranks = ALONE
        if mode is not None:
            ranks = self._ranks(mode, texts, loss="compat siglip", precision=precision)
        losses = ranks.sum(
            images, texts, scale, phi="softplus", row_bias=bias.expand(n),
            pairs=Pairs() if negative_only else Pairs(skip=(0,)), precision=precision,
        )  # fmt: skip
        if not negative_only:
            losses = losses - F.logsigmoid((images * texts).sum(1) * scale + bias)
        return own_mean(losses, ranks)

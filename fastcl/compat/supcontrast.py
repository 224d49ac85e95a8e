"""The loss of SupContrast (HobbitLong/SupContrast, losses.py) on fastcl's operators.

    from fastcl.compat.supcontrast import SupConLoss      # was: from losses import SupConLoss

Same signature, values and gradients; no (V B) x (V B) matrix is formed, and of a ``mask`` [B, B]
none but the mask itself. Features are taken as they are, as there: normalise them first. What
differs, and why:

- Low temperatures stay finite. SupContrast subtracts a row's maximum *with* the row itself in it,
  so that its exponentials vanish together (fp32 below T of about 0.01) and the loss is NaN.
- An anchor without positives counts as 0, as there since its fix of issue #141.
- The loss of 16-bit features is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as f
from ..losses.common import softmax_loss
from ..losses.inputs import can_look, check_positive, check_vector, scale_of, unit_rows
from ..ops import Pairs, similarity_logsumexp
from ..ops.checks import check_dense, precision_of, recordable
from ..ops.pair_sums import numbered, pair_sums
from ..ops.pairs import describe
from .common import CompatLoss

__all__ = ["SupConLoss"]

_MODES = ("all", "one")


class SupConLoss(CompatLoss):
    """SupCon (Khosla et al. 2020), times temperature / base_temperature.

    Args:
        temperature: positive number.
        contrast_mode: ``"all"``: every view of every sample is an anchor; ``"one"``: the first.
        base_temperature: what the temperature is compared with.

    Raises:
        ValueError: an unknown mode; a base temperature that is not positive.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
    ):
        super().__init__()
        if contrast_mode not in _MODES:
            raise ValueError(f"contrast_mode is {contrast_mode!r}; expected one of {_MODES}")
        check_positive(base_temperature, "base_temperature")
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(
        self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The mean loss over anchors, in fp32 (fp64 for fp64 inputs).

        Args:
            features: [B, V, ...], further dimensions are flattened.
            labels: [B] (or [B, 1]) numbers, mostly integers; without labels and mask, views of one
                sample are each other's positives.
            mask: [B, B], how much sample j is a positive of sample i; may be asymmetric, and any
                number rather than 0 or 1.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape, device or range; both
                labels and mask; NaN or infinity (looked at where that is free, on a CPU).
        """
        if isinstance(features, Tensor):
            check_dense(features, "features")
        if not isinstance(features, Tensor) or features.dim() < 3 or 0 in features.shape:
            raise ValueError(
                f"features {describe(features)}; expected [B, V, ...], at least 3 dimensions and "
                "none empty"
            )
        if labels is not None and mask is not None:
            raise ValueError("Cannot define both `labels` and `mask`; expected one of them")
        features = features.flatten(2)
        batch = features.shape[0]
        if isinstance(labels, Tensor) and labels.dim() == 2:
            labels = labels.reshape(-1)
        if isinstance(labels, Tensor) and labels.is_floating_point():
            check_vector(labels, "labels", batch, features, floats=True)
            (labels,) = numbered(labels)
        if labels is not None:
            labels = check_vector(labels, "labels", batch, features)
        scale = scale_of(self.temperature)
        factor = self.temperature / self.base_temperature
        views = features.shape[1]
        # a single view without labels has no positives, and a loss of 0
        if self.contrast_mode == "all" and mask is None and (labels is not None or views > 1):
            return factor * f.sup_con(features, labels, self.temperature, normalize=False)

        keys = unit_rows(
            features.transpose(0, 1).reshape(batch * views, -1), "features", normalize=False
        )
        anchors = keys if self.contrast_mode == "all" else keys[:batch]
        precision = precision_of(features, None, None)

        def sums(pairs: Pairs) -> Tensor:
            return similarity_logsumexp(anchors, keys, scale, pairs=pairs, precision=precision).rows

        if mask is not None:
            score, count = _masked(anchors, keys, mask, batch)
            losses = sums(Pairs(skip=(0,))) - scale * score / torch.where(count < 1e-6, 1.0, count)
            # the share of the log-sum-exp is the mask's: an anchor without positives has none
            losses = torch.where(count < 1e-6, 0.0, losses)
            return factor * losses.mean()
        if labels is None:
            labels = torch.arange(batch, device=features.device)
        ids = labels.repeat(views)
        positives = Pairs("same", labels, ids, skip=(0,))
        score, count = pair_sums(anchors, keys, positives)
        score = scale * score / count.clamp_min(1)
        # softplus(negatives - positives) + (positives - their mean): with one positive the sum
        # over positives is its score, and nothing cancels where the loss is tiny
        same = torch.where(count > 1, sums(positives), score)
        losses = softmax_loss(same, sums(Pairs("different", labels, ids))) + (same - score)
        return factor * torch.where(count > 0, losses, 0.0).mean()


def _masked(anchors: Tensor, keys: Tensor, mask: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """For each anchor the sum of its products with keys, by their share, and the sum of shares.

    Sums over views come first, so that the mask is used as it came.
    """
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise TypeError(f"mask {describe(mask)}; expected a tensor of real numbers")
    check_dense(mask, "mask")
    if mask.shape != (batch, batch) or mask.is_meta != keys.is_meta:
        raise ValueError(f"mask {describe(mask)}; expected shape ({batch}, {batch})")
    mask = recordable(mask).to(keys)
    if can_look(mask) and not bool(torch.isfinite(mask).all()):
        raise ValueError("mask holds NaN or infinity; expected finite numbers")
    views = keys.shape[0] // batch
    rounds = anchors.shape[0] // batch
    sums = mask @ keys.view(views, batch, -1).sum(0)
    own = mask.diagonal().repeat(rounds)  # an anchor is no positive of itself
    score = (anchors * sums.repeat(rounds, 1)).sum(1) - own * anchors.square().sum(1)
    return score, mask.sum(1).repeat(rounds) * views - own

"""The loss of info-nce-pytorch (0.1) on fastcl's operators.

    from fastcl.compat.info_nce import InfoNCE      # was: from info_nce import InfoNCE

Same signatures, values and gradients; no N x M matrix is formed. What differs: the loss of 16-bit
features is fp32, and errors are fastcl's own sentences.
"""

from __future__ import annotations

from torch import Tensor

from .. import functional as f
from ..losses.inputs import check_reduction
from ..ops.checks import check_features
from ..ops.pairs import describe
from .common import CompatLoss

__all__ = ["InfoNCE", "info_nce"]

_MODES = {"paired": "[N, M, D]", "unpaired": "[M, D]"}


def _check_mode(negative_mode: str) -> None:
    if negative_mode not in _MODES:
        raise ValueError(f"negative_mode is {negative_mode!r}; expected one of {tuple(_MODES)}")


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """InfoNCE of each query among its positive key and negatives; everything is normalised.

    Args:
        query, positive_key: [N, D], row by row.
        negative_keys: ``None`` for the other positive keys; [M, D] shared by all queries
            (``"unpaired"``); [N, M, D] of each query's own (``"paired"``, whose [N, M] scores are
            formed, being smaller than the keys themselves).
        temperature: positive number or one-element tensor (differentiable).
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for [N] losses.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; NaN or
            infinity in features (looked at where that is free, on a CPU).
    """
    _check_mode(negative_mode)
    if negative_keys is not None:
        dims = _MODES[negative_mode]
        if isinstance(negative_keys, Tensor) and negative_keys.dim() != dims.count(",") + 1:
            raise ValueError(
                f"negative_keys {describe(negative_keys)}; expected {dims} with "
                f"negative_mode={negative_mode!r}"
            )
        check_features(negative_keys, "negative_keys", dims)
    return f.info_nce(query, positive_key, negative_keys, temperature, reduction=reduction)


class InfoNCE(CompatLoss):
    """:func:`info_nce` as a module: ``InfoNCE(0.1)(query, positive_key, negative_keys)``.

    Raises:
        ValueError: an unknown reduction or negative mode.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
    ):
        super().__init__()
        check_reduction(reduction)
        _check_mode(negative_mode)
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        return info_nce(
            query, positive_key, negative_keys, self.temperature, self.reduction,
            self.negative_mode,
        )  # fmt: skip

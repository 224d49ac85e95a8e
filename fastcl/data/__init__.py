"""Data sets and augmentations; needs the extra ``train`` once something is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcl.data.extras import require

if TYPE_CHECKING:
    from fastcl.data.batches import EpochShuffledBatches
    from fastcl.data.digits import DigitSplits, Split, load_digit_splits
    from fastcl.data.views import RECIPES, TwoViews

__all__ = [
    "RECIPES",
    "DigitSplits",
    "EpochShuffledBatches",
    "Split",
    "TwoViews",
    "load_digit_splits",
    "require",
]


def __getattr__(name: str) -> object:
    if name in ("RECIPES", "TwoViews"):
        require("kornia", user="fastcl.data")
        from fastcl.data import views

        return getattr(views, name)
    if name == "EpochShuffledBatches":
        from fastcl.data.batches import EpochShuffledBatches

        return EpochShuffledBatches
    if name in ("DigitSplits", "Split", "load_digit_splits"):
        require("sklearn", user="fastcl.data")
        from fastcl.data import digits

        return getattr(digits, name)
    raise AttributeError(f"module 'fastcl.data' has no attribute {name!r}")

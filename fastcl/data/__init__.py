"""Data sets and augmentations; needs the extra ``train`` once something is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastcl.data.extras import require

if TYPE_CHECKING:
    from fastcl.data.batches import EpochShuffledBatches
    from fastcl.data.digits import load_digit_splits
    from fastcl.data.files import DATA_SETS
    from fastcl.data.splits import Split, Splits
    from fastcl.data.views import RECIPES, Augment, TwoViews

__all__ = [
    "DATA_SETS",
    "RECIPES",
    "Augment",
    "EpochShuffledBatches",
    "Split",
    "Splits",
    "TwoViews",
    "load_digit_splits",
    "require",
]

_HOMES = {  # name -> its module here, and what that needs of the extra
    "Augment": ("views", "kornia"),
    "DATA_SETS": ("files", "sklearn"),
    "EpochShuffledBatches": ("batches", "numpy"),
    "RECIPES": ("views", "kornia"),
    "Split": ("splits", "numpy"),
    "Splits": ("splits", "numpy"),
    "TwoViews": ("views", "kornia"),
    "load_digit_splits": ("digits", "sklearn"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcl.data' has no attribute {name!r}")
    home, needed = _HOMES[name]
    require(needed, user="fastcl.data")
    return getattr(importlib.import_module(f"fastcl.data.{home}"), name)

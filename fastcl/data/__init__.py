"""Data sets and augmentations; needs the extra ``train`` once something is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastcl.data.extras import require

if TYPE_CHECKING:
    from fastcl.data.batches import EpochShuffledBatches
    from fastcl.data.digits import load_digit_splits
    from fastcl.data.files import DATA_SETS
    from fastcl.data.render import WORLDS
    from fastcl.data.sequences import digit_sequences
    from fastcl.data.splits import Split, Splits
    from fastcl.data.tones import random_tones
    from fastcl.data.views import RECIPES, Augment, TwoViews
    from fastcl.data.worlds import random_episodes

__all__ = [
    "DATA_SETS",
    "RECIPES",
    "WORLDS",
    "Augment",
    "EpochShuffledBatches",
    "Split",
    "Splits",
    "TwoViews",
    "digit_sequences",
    "load_digit_splits",
    "random_episodes",
    "random_tones",
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
    "WORLDS": ("render", "numpy"),
    "digit_sequences": ("sequences", "numpy"),
    "load_digit_splits": ("digits", "sklearn"),
    "random_episodes": ("worlds", "numpy"),
    "random_tones": ("tones", "numpy"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcl.data' has no attribute {name!r}")
    home, needed = _HOMES[name]
    require(needed, user="fastcl.data")
    return getattr(importlib.import_module(f"fastcl.data.{home}"), name)

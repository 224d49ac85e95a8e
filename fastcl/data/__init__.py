"""Data sets and augmentations; needs the extra ``train`` once something is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastcl.data.extras import require

if TYPE_CHECKING:
    from fastcl.data.batches import EpochShuffledBatches
    from fastcl.data.classes import ClassBalancedBatches
    from fastcl.data.code_search import load_code_search
    from fastcl.data.digits import load_digit_splits
    from fastcl.data.files import DATA_SETS
    from fastcl.data.pairs import PairBatches
    from fastcl.data.render import WORLDS
    from fastcl.data.scenes import load_scenes
    from fastcl.data.sequences import digit_sequences
    from fastcl.data.splits import Split, Splits
    from fastcl.data.tokens import WordTokenizer
    from fastcl.data.tones import random_tones
    from fastcl.data.views import RECIPES, Augment, TwoViews
    from fastcl.data.worlds import random_episodes

__all__ = [
    "DATA_SETS",
    "RECIPES",
    "WORLDS",
    "Augment",
    "ClassBalancedBatches",
    "EpochShuffledBatches",
    "PairBatches",
    "Split",
    "Splits",
    "TwoViews",
    "WordTokenizer",
    "digit_sequences",
    "load_code_search",
    "load_digit_splits",
    "load_scenes",
    "random_episodes",
    "random_tones",
    "require",
]

_HOMES = {  # name -> its module here, and what that needs of the extra
    "Augment": ("views", "kornia"),
    "ClassBalancedBatches": ("classes", "numpy"),
    "DATA_SETS": ("files", "sklearn"),
    "EpochShuffledBatches": ("batches", "numpy"),
    "PairBatches": ("pairs", "numpy"),
    "RECIPES": ("views", "kornia"),
    "Split": ("splits", "numpy"),
    "Splits": ("splits", "numpy"),
    "TwoViews": ("views", "kornia"),
    "WORLDS": ("render", "numpy"),
    "WordTokenizer": ("tokens", "torch"),
    "digit_sequences": ("sequences", "numpy"),
    "load_code_search": ("code_search", "torch"),
    "load_digit_splits": ("digits", "sklearn"),
    "load_scenes": ("scenes", "numpy"),
    "random_episodes": ("worlds", "numpy"),
    "random_tones": ("tones", "numpy"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastcl.data' has no attribute {name!r}")
    home, needed = _HOMES[name]
    require(needed, user="fastcl.data")
    return getattr(importlib.import_module(f"fastcl.data.{home}"), name)

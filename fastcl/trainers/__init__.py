"""Training: one Lightning module per method, and ``fastcl train``. Needs the extra ``train``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastcl.data.extras import require
from fastcl.trainers.command import main
from fastcl.trainers.methods import METHODS
from fastcl.trainers.options import Optimization

if TYPE_CHECKING:
    from fastcl.trainers.classifier import Classifier
    from fastcl.trainers.cmc import CMC
    from fastcl.trainers.experiment import Experiment
    from fastcl.trainers.instdisc import InstDisc
    from fastcl.trainers.jigsaw import Jigsaw
    from fastcl.trainers.moco import MoCo
    from fastcl.trainers.optim import LARS
    from fastcl.trainers.rotation import Rotation
    from fastcl.trainers.runner import run
    from fastcl.trainers.simclr import SimCLR
    from fastcl.trainers.supcon import SupCon

__all__ = [
    "CMC",
    "LARS",
    "METHODS",
    "Classifier",
    "Experiment",
    "InstDisc",
    "Jigsaw",
    "MoCo",
    "Optimization",
    "Rotation",
    "SimCLR",
    "SupCon",
    "main",
    "run",
]

_HOMES = {  # name -> its module here, imported with Lightning
    "CMC": "cmc",
    "Classifier": "classifier",
    "Experiment": "experiment",
    "InstDisc": "instdisc",
    "Jigsaw": "jigsaw",
    "LARS": "optim",
    "MoCo": "moco",
    "Rotation": "rotation",
    "SimCLR": "simclr",
    "SupCon": "supcon",
    "run": "runner",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        require("lightning", user=f"fastcl.trainers.{name}")
        return getattr(importlib.import_module(f"fastcl.trainers.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastcl.trainers' has no attribute {name!r}")

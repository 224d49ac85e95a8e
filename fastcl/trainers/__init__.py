"""Training: one Lightning module per method, and ``fastcl train``. Needs the extra ``train``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastcl.data.extras import require
from fastcl.trainers.command import main
from fastcl.trainers.methods import METHODS

if TYPE_CHECKING:
    from fastcl.trainers.experiment import Experiment
    from fastcl.trainers.runner import run
    from fastcl.trainers.simclr import SimCLR

__all__ = ["METHODS", "Experiment", "SimCLR", "main", "run"]

_MODULES = {"Experiment": "experiment", "SimCLR": "simclr", "run": "runner"}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        require("lightning", user=f"fastcl.trainers.{name}")
        module = importlib.import_module(f"fastcl.trainers.{_MODULES[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'fastcl.trainers' has no attribute {name!r}")

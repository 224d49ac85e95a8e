"""Training: one Lightning module per method, and ``fastcl train``. Needs the extra ``train``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcl.data.extras import require
from fastcl.trainers.command import main

if TYPE_CHECKING:
    from fastcl.trainers.simclr import SimCLR

__all__ = ["SimCLR", "main"]


def __getattr__(name: str) -> object:
    if name == "SimCLR":
        require("lightning", user="fastcl.trainers.SimCLR")
        from fastcl.trainers.simclr import SimCLR

        return SimCLR
    raise AttributeError(f"module 'fastcl.trainers' has no attribute {name!r}")

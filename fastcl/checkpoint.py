"""Checkpoints that are complete or absent, whenever the process dies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(state: Any, path: str | os.PathLike) -> None:
    """``torch.save`` that replaces ``path`` in one step, once every byte is on the disk.

    A process killed at any moment, or a machine that loses power, leaves the earlier checkpoint or
    this one. ``state_dict`` of a loss holds its queue or bank, pointer and all; a run that is to
    resume bit for bit also saves its optimizer, its generators (``torch.get_rng_state()``) and
    where it is in the data.

    Args:
        state: anything ``torch.save`` takes.
        path: the file; a hidden ``.partial`` one beside it is used meanwhile.

    Raises:
        OSError: the folder cannot be written; ``path`` is as before.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the new name itself must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

"""The folder of a run: what lies where, and files that are either complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

import torch

from fastcl.trainers.options import RunError, TrainOptions, UsageError

CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
LOG = "log.csv"
RESULTS = "results.json"
TENSORBOARD = "tensorboard"


@contextmanager
def write_atomically(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing that replaces ``path`` only once it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class RunFolder:
    """``path`` holds the report and, for each seed, a folder with its log and checkpoints."""

    path: Path

    def of_seed(self, seed: int) -> Path:
        """Folder of one seed."""
        return self.path / f"seed-{seed}"

    def checkpoints_to_resume(
        self, seeds: list[int], method: str, options: TrainOptions, resume: bool, overwrite: bool
    ) -> dict[int, Path]:
        """The last checkpoint of every seed that has one, if resuming.

        Raises:
            RunError: there are some but neither ``resume`` nor ``overwrite`` was asked for, or
                one cannot be read.
            UsageError: one was trained by another method or with other options.
        """
        last = {seed: self.of_seed(seed) / CHECKPOINTS / LAST for seed in seeds}
        found = {seed: path for seed, path in last.items() if path.exists()}
        if overwrite:
            return {}
        if found and not resume:
            raise RunError(
                f"out: {self.path} already holds a run; expected --resume to continue it, "
                "--overwrite to start anew, or another folder"
            )
        for path in found.values():
            _check_checkpoint(path, hyper_parameters(method, options))
        return found

    def prepare(self, seeds: list[int], overwrite: bool) -> None:
        """Make the folders; with ``overwrite``, remove what earlier runs of the seeds wrote.

        Raises:
            RunError: something there cannot be written.
        """
        try:
            for seed in seeds:
                checkpoints = self.of_seed(seed) / CHECKPOINTS
                checkpoints.mkdir(parents=True, exist_ok=True)
                with TemporaryFile(dir=checkpoints):
                    pass  # only the attempt tells whether the folder can be written
                if overwrite:
                    logs = (self.of_seed(seed) / TENSORBOARD).glob("events.*")
                    for stale in (*checkpoints.glob("*.ckpt"), self.of_seed(seed) / LOG, *logs):
                        stale.unlink(missing_ok=True)
            if overwrite:
                for name in (*self._pictures(), RESULTS):
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"out: cannot write to {self.path} ({error.strerror})") from error

    def _pictures(self) -> list[str]:
        """Names of the pictures that an earlier report lists."""
        try:
            names = json.loads((self.path / RESULTS).read_text(encoding="utf-8"))["pictures"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return []
        return [Path(name).name for name in names]


def hyper_parameters(method: str, options: TrainOptions) -> dict[str, Any]:
    """What checkpoints carry and a resumed run must repeat."""
    return {"method": method, **options.binding()}


def _check_checkpoint(path: Path, wanted: dict[str, Any]) -> None:
    try:
        trained_with = torch.load(path, map_location="cpu", weights_only=True)["hyper_parameters"]
    except Exception as error:
        # torch.load answers damaged files with many kinds of exception; all mean the same here.
        raise RunError(
            f"resume: {path} is not a complete checkpoint; replace it with one of the epoch-*.ckpt "
            "beside it, or start anew with --overwrite"
        ) from error
    for name, value in wanted.items():
        if trained_with.get(name) != value:
            raise UsageError(
                f"{name}: expected {trained_with.get(name)}, with which {path.parents[1]} was "
                f"trained, got {value}; a resumed run must repeat its options"
            )

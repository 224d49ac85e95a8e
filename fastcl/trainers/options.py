"""What a run can be told; importing this needs nothing but Python."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

OPTIMIZERS = ("adamw", "adam", "sgd", "lars")
SCHEDULES = ("cosine", "steps", "constant")


class UsageError(ValueError):
    """An argument that cannot be used; the command line answers with exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (files, interruption); the command line answers with exit code 1."""


@dataclass(frozen=True)
class Optimization:
    """How a module's parameters are updated: what every trainer takes as ``optimization``.

    Args:
        optimizer: adamw, adam, sgd (Nesterov) or lars.
        learning_rate: after the warm-up and before it decays.
        weight_decay: decoupled for adamw, added to the gradient for the others.
        sgd_momentum: of sgd and lars.
        warmup_epochs: epochs during which the learning rate rises linearly from near 0.
        schedule: what follows: cosine (to 0), steps (a tenth at 60 % and at 80 % of the epochs) or
            constant.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    sgd_momentum: float = 0.9
    warmup_epochs: int = 0
    schedule: str = "cosine"

    def check(self) -> None:
        """Raise UsageError for the first value out of range."""
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_positive("learning_rate", self.learning_rate)
        check_not_negative("weight_decay", self.weight_decay)
        check_fraction("sgd_momentum", self.sgd_momentum)
        check_at_least("warmup_epochs", self.warmup_epochs, 0)


@dataclass(frozen=True)
class TrainOptions(Optimization):
    """What every method can be told. A method inherits this, adds its own and sets defaults.

    A resumed run must repeat all of them but those named in ``FREE``, which do not change what is
    trained.

    Args:
        epochs: passes over the training data.
        batch_size: samples per step, over all devices.
        gradient_clip: largest norm of the gradient; 0 leaves it as it is.
        precision: Lightning's: 32-true, bf16-mixed, 16-mixed, 64-true.
        accelerator: Lightning's: auto, cpu, gpu.
        devices: how many, each taking its part of every batch.
        strategy: Lightning's: auto (one device), ddp.
        threads: of the processor. Steps of small models gain little from a second thread, and take
            several times as long with it when another process holds its core.
        report_on: held-out data on which the scores are measured: test or validation. Choose
            options with 'validation'; 'test' is for the final report.
        checkpoint_every: epochs between two checkpoints.
        tensorboard: also log for TensorBoard, into seed-*/tensorboard.
    """

    FREE: ClassVar[tuple[str, ...]] = (
        "accelerator",
        "threads",
        "report_on",
        "checkpoint_every",
        "tensorboard",
    )

    epochs: int = 100
    batch_size: int = 256
    gradient_clip: float = 0.0
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    threads: int = 1
    report_on: str = "test"
    checkpoint_every: int = 25
    tensorboard: bool = False

    def check(self) -> None:
        super().check()
        for name in ("epochs", "devices", "threads", "checkpoint_every"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("batch_size", self.batch_size, 2)
        check_not_negative("gradient_clip", self.gradient_clip)
        check_choice("precision", self.precision, ("32-true", "bf16-mixed", "16-mixed", "64-true"))
        check_choice("accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        check_choice("strategy", self.strategy, ("auto", "ddp"))
        if self.devices > 1 and self.batch_size % self.devices:
            raise UsageError(
                f"batch_size: expected a multiple of devices = {self.devices}, "
                f"got {self.batch_size}"
            )
        check_choice("report_on", self.report_on, ("test", "validation"))

    def binding(self) -> dict[str, Any]:
        """The options that a resumed run must repeat."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in self.FREE}


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = " or ".join([", ".join(choices[:-1]), choices[-1]] if choices[1:] else choices)
        raise UsageError(f"{name}: expected {listed}, got {value!r}")


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise UsageError for an integer below ``least``."""
    if value < least:
        raise UsageError(f"{name}: expected an integer >= {least}, got {value}")


def check_positive(name: str, value: float) -> None:
    """Raise UsageError unless 0 < value < infinity."""
    if not 0 < value < float("inf"):
        raise UsageError(f"{name}: expected a number > 0, got {value}")


def check_not_negative(name: str, value: float) -> None:
    """Raise UsageError unless 0 <= value < infinity."""
    if not 0 <= value < float("inf"):
        raise UsageError(f"{name}: expected a number >= 0, got {value}")


def check_fraction(name: str, value: float) -> None:
    """Raise UsageError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise UsageError(f"{name}: expected a number from 0 to 1, got {value}")

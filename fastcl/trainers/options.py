"""What a pretraining run can be told; importing this needs nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass


class UsageError(ValueError):
    """An argument that cannot be used; the command line answers with exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (files, interruption); the command line answers with exit code 1."""


@dataclass(frozen=True)
class SimCLROptions:
    """What determines the trained parameters; a resumed run must repeat it exactly.

    Learning rate, weight decay, schedule and augmentations were chosen on validation images (see
    fastcl.data.digits); temperature, batch size and widths were taken over from earlier trials.

    Args:
        epochs: passes over the training images.
        batch_size: images per step; each is compared with both views of all the others.
        temperature: divisor of the cosine similarities in NT-Xent.
        learning_rate: of AdamW, after the warm-up and before the cosine decay.
        weight_decay: of AdamW.
        warmup_epochs: epochs during which the learning rate rises linearly.
        recipe: augmentations that make the two views.
        width: channels of the encoder's first convolution.
        hidden_features: width of the projection head's hidden layer.
        out_features: dimension in which views are compared.
        knn_every: epochs between two measurements of the kNN monitor.
        knn_neighbours: k of the kNN monitor.
        threads: of the processor. Steps this short gain little from a second thread, and take
            several times as long with it when another process holds its core.
    """

    epochs: int = 125
    batch_size: int = 256
    temperature: float = 0.5
    learning_rate: float = 8e-3
    weight_decay: float = 1e-2
    warmup_epochs: int = 10
    recipe: str = "digits"
    width: int = 16
    hidden_features: int = 128
    out_features: int = 64
    knn_every: int = 5
    knn_neighbours: int = 200
    threads: int = 1

    def check(self) -> None:
        """Raise UsageError for the first value out of range."""
        for name in (
            "epochs",
            "width",
            "hidden_features",
            "out_features",
            "knn_every",
            "knn_neighbours",
            "threads",
        ):
            _at_least(name, getattr(self, name), 1)
        _at_least("batch_size", self.batch_size, 2)
        _at_least("warmup_epochs", self.warmup_epochs, 0)
        for name in ("temperature", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UsageError(f"weight_decay: expected a number >= 0, got {self.weight_decay}")


@dataclass(frozen=True)
class ReportOptions:
    """What is kept and reported; it does not change the trained parameters.

    Args:
        report_on: images on which the probes are scored. Choose options with 'validation';
            'test' is for the final report.
        label_draws: drawings of 1, 5 and 10 labels per class that are averaged.
        checkpoint_every: epochs between two checkpoints.
    """

    report_on: str = "test"
    label_draws: int = 10
    checkpoint_every: int = 25

    def check(self) -> None:
        """Raise UsageError for the first value out of range."""
        if self.report_on not in ("test", "validation"):
            raise UsageError(f"report_on: expected test or validation, got {self.report_on!r}")
        _at_least("label_draws", self.label_draws, 1)
        _at_least("checkpoint_every", self.checkpoint_every, 1)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{name}: expected an integer >= {least}, got {value}")

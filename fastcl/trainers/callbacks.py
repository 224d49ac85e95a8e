"""What happens around the training steps: kNN monitor, log, similarity snapshots, progress bar."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastcl.data.digits import Split
from fastcl.evaluation.features import extract_features
from fastcl.evaluation.knn import knn_accuracy
from fastcl.trainers.folder import write_atomically


class KNNMonitor(pl.Callback):
    """Log ``knn_accuracy`` of validation images in a bank of training images.

    Measured every ``every`` epochs and after the last; NaN is logged in between. Labels are used
    for this number only, never for training.
    """

    def __init__(self, bank: Split, queries: Split, every: int, k: int):
        self.bank = bank
        self.queries = queries
        self.every = every
        self.k = k

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        done = trainer.current_epoch + 1
        accuracy = math.nan
        if done % self.every == 0 or done == trainer.max_epochs:
            encoder = module.get_submodule("encoder")
            accuracy = knn_accuracy(
                extract_features(encoder, self.queries.images.to(module.device)),
                self.queries.labels.to(module.device),
                extract_features(encoder, self.bank.images.to(module.device)),
                self.bank.labels.to(module.device),
                k=self.k,
            )
        module.log("knn_accuracy", accuracy)


class EpochLog(pl.Callback):
    """One CSV row per epoch.

    The rows live in the checkpoint and the file is rewritten from them, so a resumed run neither
    repeats nor loses one. No clock is read: equal runs write equal files.
    """

    COLUMNS = (
        "epoch",
        "loss",
        "contrastive_accuracy",
        "positive_similarity",
        "negative_similarity",
        "learning_rate",
        "knn_accuracy",
    )

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        measured = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                **{name: measured[name] for name in self.COLUMNS if name in measured},
            }
        )
        self.write()

    def write(self) -> None:
        """Write the file anew; a NaN becomes an empty cell."""
        with write_atomically(self.path) as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            for row in self.rows:
                writer.writerow({k: "" if math.isnan(v) else v for k, v in row.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self.write()


class SimilaritySnapshots(pl.Callback):
    """Cosine similarities [2V, 2V] of the projections of V images' two fixed views.

    Taken before training, half-way and at the end, in evaluation mode; rows i and i + V show the
    same image. ``matrices`` maps the number of epochs done to the matrix.
    """

    def __init__(self, first: torch.Tensor, second: torch.Tensor):
        self.views = torch.cat([first, second])
        self.matrices: dict[int, torch.Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.matrices:
            self._take(0, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        done = trainer.current_epoch + 1
        epochs = trainer.max_epochs or 0
        if done in ((epochs + 1) // 2, epochs):
            self._take(done, module)

    def _take(self, epochs_done: int, module: pl.LightningModule) -> None:
        projections = extract_features(module, self.views.to(module.device))
        unit = F.normalize(projections, dim=1)
        self.matrices[epochs_done] = (unit @ unit.T).cpu()

    def state_dict(self) -> dict[str, Any]:
        return {"matrices": self.matrices}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.matrices = dict(state_dict["matrices"])


class RunProgressBar(pl.Callback):
    """One bar for a whole run; Lightning's own starts anew every epoch, here a tenth of a second.

    On something that is not a terminal only the finished bar is printed.
    """

    def __init__(self, description: str, console: Console):
        self.description = description
        self.console = console

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("epoch {task.completed:>3.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task(
            self.description,
            total=trainer.max_epochs,
            completed=trainer.current_epoch,
            numbers="",
        )
        self.knn = ""
        self.progress.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        if not math.isnan(knn := metrics["knn_accuracy"].item()):
            self.knn = f"kNN {100 * knn:.1f}%"
        self.progress.update(
            self.task,
            completed=trainer.current_epoch + 1,
            numbers=f"loss {metrics['loss'].item():.3f} "
            f"top-1 {100 * metrics['contrastive_accuracy'].item():.1f}% {self.knn}",
        )

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        # Also called when training was interrupted or failed: give the terminal back.
        if hasattr(self, "progress"):
            self.progress.stop()

"""What happens around the training steps: kNN monitor, log, similarity snapshots, progress bar."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastcl.data.splits import Split
from fastcl.evaluation.features import extract_features
from fastcl.evaluation.knn import knn_accuracy
from fastcl.losses.modules import TemperatureLoss
from fastcl.trainers.folder import write_atomically


def log_batch(
    module: pl.LightningModule,
    batch_size: int,
    loss: torch.Tensor,
    metrics: Mapping[str, torch.Tensor],
) -> None:
    """Log the means over an epoch of the loss and of a loss's metrics.

    The metric ``accuracy`` of fastcl's losses is logged as ``contrastive_accuracy``, beside which
    other accuracies cannot be mistaken for it.
    """
    names = {"accuracy": "contrastive_accuracy"}
    values = {names.get(name, name): value for name, value in metrics.items()}
    module.log_dict(
        {"loss": loss.detach(), **values},
        on_step=False,
        on_epoch=True,
        batch_size=batch_size,
        sync_dist=module.trainer.world_size > 1,
    )


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
                extract_features(encoder, self.queries.images),
                self.queries.labels.to(module.device),
                extract_features(encoder, self.bank.images),
                self.bank.labels.to(module.device),
                k=self.k,
            )
        module.log("knn_accuracy", accuracy, sync_dist=trainer.world_size > 1)


class EpochSeed(pl.Callback):
    """Seed PyTorch's global generator from (seed, epoch, rank) as every epoch begins.

    What an epoch draws (augmentations, dropout, sampled negatives) then does not depend on how
    many runs it took to get there: this is what makes resuming exact, for every method.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        torch.manual_seed(epoch_seed(self.seed, trainer.current_epoch, trainer.global_rank))


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """A seed for one epoch of one rank; distinct while ``epoch`` is below 2^20 and ``rank`` below
    2^11 (PyTorch takes 64 bits, seeds have 32)."""
    return (rank << 52) + (seed << 20) + epoch


class SharedNegatives(pl.Callback):
    """Let every loss of fastcl in the module take the rows of all devices as one batch."""

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        for loss in module.modules():
            if isinstance(loss, TemperatureLoss) and trainer.world_size > 1:
                loss.distributed = loss.distributed or "gather"


class EpochLog(pl.Callback):
    """One CSV row per epoch: everything logged, in the order of its first appearance.

    The rows live in the checkpoint and the file is rewritten from them, so a resumed run neither
    repeats nor loses one. No clock is read: equal runs write equal files.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.writes = True

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.writes = trainer.is_global_zero  # all ranks hold the rows, and share the file

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        measured = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                **measured,
                "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            }
        )
        self.write()

    def write(self) -> None:
        """Write the file anew, on one rank; a NaN becomes an empty cell."""
        if not self.writes:
            return
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with write_atomically(self.path) as file:
            writer = csv.DictWriter(file, columns, restval="")
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
        projections = extract_features(module, self.views)
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
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        shown = [f"loss {metrics['loss']:.3f}"]
        if "contrastive_accuracy" in metrics:
            shown.append(f"top-1 {100 * metrics['contrastive_accuracy']:.1f}%")
        if not math.isnan(knn := metrics.get("knn_accuracy", math.nan)):
            self.knn = f"kNN {100 * knn:.1f}%"
        numbers = " ".join([*shown, self.knn])
        self.progress.update(self.task, completed=trainer.current_epoch + 1, numbers=numbers)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        # Also called when training was interrupted or failed: give the terminal back.
        if hasattr(self, "progress"):
            self.progress.stop()

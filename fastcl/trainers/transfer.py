"""What pretraining is worth: classifiers from scratch, on the frozen encoder, and fine-tuned.

An encoder is pretrained by any method that learns from images, then four classifiers are trained
on the same few labels with the same settings: the encoder from fresh parameters, the pretrained one
frozen (twice, for batch norm in evaluation and in training mode differ and both are published), and
the pretrained one trained further.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.splits import Split, Splits
from fastcl.data.views import Augment
from fastcl.encoders import freeze
from fastcl.evaluation.features import extract_features
from fastcl.trainers import images
from fastcl.trainers.callbacks import EpochLog
from fastcl.trainers.classifier import Classifier
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.fit import fit
from fastcl.trainers.folder import CHECKPOINTS, LAST, RESULTS, RunFolder, write_atomically
from fastcl.trainers.methods import METHODS, Method
from fastcl.trainers.methods.images import ImageOptions
from fastcl.trainers.methods.transfer import METHODS_WITH_ENCODER, MODES, Amount, ClassifierOptions
from fastcl.trainers.options import RunError, TrainOptions, UsageError, check_choice
from fastcl.trainers.runner import run, threads
from fastcl.trainers.transfer_report import TransferReport, write_transfer_report

PRETRAINING = "pretraining"


@dataclass(frozen=True)
class Trained:
    """One classifier: by epoch the training and test loss and accuracy (in [0, 1]), and seconds."""

    rows: list[dict[str, float]]
    seconds: float

    @property
    def last(self) -> dict[str, float]:
        """The last epoch's."""
        return self.rows[-1]


def run_transfer(
    method: Method | str,
    options: ImageOptions,
    classifier: ClassifierOptions,
    *,
    labels: list[str],
    seeds: list[int],
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> TransferReport:
    """Pretrain, train every classifier, report; returns what was written to ``out``/results.json.

    Args:
        method: one of ``METHODS_WITH_ENCODER``.
        options: of the pretraining.
        classifier: of the supervised training.
        labels: amounts such as "1%", "100%" or, per class, "10".
        seeds: each gives its own pretraining, division of the data and labelled images.
        out: folder of the results; ``out``/pretraining is a run of ``fastcl train``.
        resume: continue what is found in ``out``: classifiers that are finished stay.
        overwrite: start anew over what ``out`` holds.
        console: where progress and the table go; standard output by default.

    Raises:
        UsageError: an argument out of range, or other options than those of the resumed run.
        RunError: ``out`` cannot be written or already holds a run.
    """
    start = time.perf_counter()
    if isinstance(method, str):
        check_choice("method", method, METHODS_WITH_ENCODER)
        method = METHODS[method]
    classifier.check()
    if not labels or len(set(labels)) < len(labels):
        raise UsageError(f"labels: expected distinct amounts, got {labels}")
    amounts = [Amount(text) for text in labels]
    for amount in amounts:
        amount.per_class(images.load(options, seeds[0]).train.labels.bincount().tolist())
    console = console or Console()
    done = _Finished(out / "classifiers", classifier, resume, overwrite)
    run(
        method, options, seeds=seeds, out=out / PRETRAINING, resume=resume, overwrite=overwrite,
        console=console,
    )  # fmt: skip
    results: dict[str, dict[str, dict[int, Trained]]] = {
        amount.text: {mode: {} for mode in MODES} for amount in amounts
    }
    with _progress(console) as progress, threads(options.threads):
        task = progress.add_task("classifiers", total=len(seeds) * len(amounts) * len(MODES))
        for seed in seeds:
            splits = images.load(options, seed)
            fresh, _ = images.build_parts(options, splits, seed)
            pretrained = _pretrained(fresh, out, seed)
            for amount in amounts:
                labelled = draw(splits.train, amount, seed)
                for mode in MODES:
                    encoder = fresh if mode == "scratch" else pretrained
                    name = f"seed-{seed}-{amount.slug}-{mode}"
                    if not done.has(name):
                        made = _train(encoder, mode, labelled, splits, options, classifier, seed)
                        done.put(name, *made)
                    results[amount.text][mode][seed] = done.get(name)
                    progress.advance(task)
            if seed == seeds[0]:
                scored = getattr(splits, options.report_on)
                most = f"seed-{seed}-{amounts[-1].slug}"
                features = {
                    "before training": extract_features(fresh, scored.images),
                    "pretrained": extract_features(pretrained, scored.images),
                    "from scratch": done.features(f"{most}-scratch"),
                    "fine-tuned": done.features(f"{most}-fine_tuned"),
                }
                drawn = (features, scored.labels, splits.classes)
    report = TransferReport(
        method, options, classifier, [a.text for a in amounts], seeds, splits.name, results,
        time.perf_counter() - start,
    )  # fmt: skip
    write_transfer_report(report, *drawn, out, console)
    return report


def draw(train: Split, amount: Amount, seed: int) -> Split:
    """The labelled images: ``amount`` of each class, a function of labels, amount and seed."""
    generator = np.random.default_rng(seed)
    numbers = train.labels.numpy()
    counts = np.bincount(numbers).tolist()
    chosen = np.concatenate(
        [
            generator.permutation(np.flatnonzero(numbers == label))[:wanted]
            for label, wanted in enumerate(amount.per_class(counts))
        ]
    )
    return Split(train.images[chosen], train.labels[chosen], train.indices[chosen])


def train_classifier(
    encoder: nn.Module,
    mode: str,
    labelled: Split,
    splits: Splits,
    options: ImageOptions,
    how: ClassifierOptions,
    seed: int,
) -> tuple[Trained, torch.Tensor]:
    """Train a copy of ``encoder`` with a linear classifier on ``labelled`` images.

    Returns:
        The classifier's record, and the features [N, D] that its encoder gives the scored images.

    Args:
        encoder: with the parameters to start from; left as it is.
        mode: a key of ``MODES``.
        labelled: training images with labels.
        splits: whose test (or validation) images are scored after each epoch.
        options: device, scored split, image sizes.
        how: optimizer, epochs, batch size, augmentation.
        seed: of the classifier's initial parameters, the order and the augmentations.
    """
    start = time.perf_counter()
    base: Any = copy.deepcopy(encoder)
    if mode.startswith("frozen"):
        base = freeze(base, bn="train" if mode == "frozen_bn_train" else "eval")
    torch.manual_seed(seed)
    model = Classifier(
        base,
        nn.Linear(base.feature_dim, len(splits.classes)),
        augment=None if how.recipe == "none" else Augment(how.recipe, splits.image_size),
        optimization=how,
    )
    size = min(how.batch_size, len(labelled))
    training = TrainOptions(
        epochs=how.epochs, batch_size=size, accelerator=options.accelerator,
        precision=options.precision, checkpoint_every=how.epochs,
    )  # fmt: skip
    scored: Split = getattr(splits, options.report_on)
    supervised = Experiment(
        module=model.train(),
        batches=EpochShuffledBatches((labelled.images, labelled.labels), size, seed),
        scores=lambda _: {},
        headline="",
        measured="",
        data="",
        callbacks=[Scored(scored)],
    )
    with tempfile.TemporaryDirectory() as folder:
        log = EpochLog(Path(folder, "log.csv"))
        fit(supervised, training, seed, folder=Path(folder), callbacks=[log])
    names = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    rows = [row | {"train_loss": row["loss"]} for row in log.rows]
    trained = Trained(
        [{name: row[name] for name in names} for row in rows], time.perf_counter() - start
    )
    return trained, extract_features(model.encoder, scored.images).cpu()


class Scored(pl.Callback):
    """Log loss and accuracy on held-out images after every epoch, in evaluation mode."""

    def __init__(self, split: Split):
        self.split = split

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        logits = extract_features(module, self.split.images).float()
        labels = self.split.labels.to(logits.device)
        module.log("test_loss", F.cross_entropy(logits, labels))
        module.log("test_accuracy", (logits.argmax(1) == labels).float().mean())


def _train(*arguments: Any) -> tuple[Trained, torch.Tensor]:
    try:
        return train_classifier(*arguments)
    except RunError as error:  # its checkpoint is of no use: classifiers take seconds
        raise RunError("interrupted; --resume trains the classifiers that are missing") from error


def _pretrained(fresh: nn.Module, out: Path, seed: int) -> nn.Module:
    """A copy of ``fresh`` with the parameters that pretraining left; its head is not taken."""
    path = RunFolder(out / PRETRAINING).of_seed(seed) / CHECKPOINTS / LAST
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    encoder = copy.deepcopy(fresh)
    prefix = "encoder."
    encoder.load_state_dict(
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    )
    return encoder.eval()


class _Finished:
    """Classifiers that are done, a file for each, so that a resumed run trains only the others."""

    def __init__(self, folder: Path, how: ClassifierOptions, resume: bool, overwrite: bool):
        self.folder = folder
        self.settings = asdict(how)
        found = sorted(folder.glob("*.json"))
        if found and not (resume or overwrite):
            raise RunError(
                f"out: {folder.parent} already holds a run; expected --resume to continue it, "
                "--overwrite to start anew, or another folder"
            )
        if overwrite:
            for path in (*found, *folder.glob("*.pt"), folder.parent / RESULTS):
                path.unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Whether ``name`` is stored."""
        return self._path(name, "json").exists()

    def get(self, name: str) -> Trained:
        """The record stored under ``name``.

        Raises:
            UsageError: trained with other settings. RunError: a damaged file.
        """
        path = self._path(name, "json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            settings, trained = content["settings"], Trained(content["rows"], content["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"resume: {path} is damaged; remove it to train it again") from error
        for key, value in self.settings.items():
            if settings.get(key) != value:
                raise UsageError(
                    f"classifier.{key}: expected {settings.get(key)}, with which {path} was "
                    f"trained, got {value}; a resumed run must repeat its options"
                )
        return trained

    def features(self, name: str) -> torch.Tensor:
        """The features stored under ``name``."""
        return torch.load(self._path(name, "pt"), weights_only=True)

    def put(self, name: str, trained: Trained, features: torch.Tensor) -> None:
        """Store under ``name``; the record comes last, for it says that all is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(features, self._path(name, "pt"))
        with write_atomically(self._path(name, "json")) as file:
            json.dump({"settings": self.settings, **asdict(trained)}, file)

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}.{suffix}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True), console=console,
    )  # fmt: skip

"""Pretrain on the digits for each seed, probe the frozen features, write the report."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from fastcl.data.digits import DigitSplits, EpochShuffledBatches, Split, load_digit_splits
from fastcl.data.views import RECIPES, TwoViews
from fastcl.encoders import MLPHead, SmallCNN
from fastcl.evaluation.features import calibrate_batch_norm, extract_features
from fastcl.evaluation.probe import linear_probe
from fastcl.trainers.callbacks import EpochLog, KNNMonitor, RunProgressBar, SimilaritySnapshots
from fastcl.trainers.folder import CHECKPOINTS, LOG, RunFolder
from fastcl.trainers.options import ReportOptions, SimCLROptions, UsageError
from fastcl.trainers.pretrain import pretrain
from fastcl.trainers.report import Report, write_report
from fastcl.trainers.simclr import SimCLR

LABELS_PER_CLASS: tuple[int | None, ...] = (1, 5, 10, None)
SNAPSHOT_DIGITS = range(8)


@dataclass
class SeedResult:
    """What one seed yields: probe accuracies by representation and labels per class, the log's
    rows, the similarity matrices by epochs done, eight images' two views, and seconds spent."""

    accuracy: dict[str, dict[str, float]]
    rows: list[dict[str, float]]
    similarity: dict[int, torch.Tensor]
    views: tuple[torch.Tensor, torch.Tensor]
    seconds: dict[str, float]


def run_simclr(
    options: SimCLROptions,
    report_options: ReportOptions,
    *,
    seeds: list[int],
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Report:
    """Pretrain, probe and report; returns what was written to ``out``/results.json.

    Args:
        options: what determines the trained parameters.
        report_options: what is kept and reported.
        seeds: each gives its own initial parameters, training/validation division, order and
            augmentations.
        out: folder of the results; made when absent.
        resume: continue runs found in ``out``; seeds not found there start anew.
        overwrite: start anew over what ``out`` holds.
        console: where progress and the table go; standard output by default.

    Raises:
        UsageError: an argument out of range, or other options than those of the resumed run.
        RunError: ``out`` cannot be written or already holds a run, a checkpoint cannot be read,
            or the run was interrupted.
    """
    start = time.perf_counter()
    console = console or Console()
    check_request(options, report_options, seeds, resume, overwrite)
    folder = RunFolder(out)
    checkpoints = folder.checkpoints_to_resume(seeds, options, resume, overwrite)
    folder.prepare(seeds, overwrite)
    console.print(
        f"SimCLR on handwritten digits without their labels: {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)}, {options.epochs} epochs each.\n"
        "loss: NT-Xent. top-1: how often a view finds its partner among "
        f"{2 * options.batch_size - 1}. kNN: on validation images.",
        highlight=False,
    )
    with _threads(options.threads):
        results = {
            seed: run_seed(
                options, report_options, seed, folder.of_seed(seed), checkpoints.get(seed), console
            )
            for seed in seeds
        }
    report = Report(options, report_options, results, seconds=time.perf_counter() - start)
    write_report(report, folder, console)
    return report


def check_request(
    options: SimCLROptions,
    report_options: ReportOptions,
    seeds: list[int],
    resume: bool,
    overwrite: bool,
) -> None:
    """Raise UsageError for the first argument that cannot be used."""
    options.check()
    report_options.check()
    if options.recipe not in RECIPES:
        raise UsageError(f"recipe: expected one of {', '.join(RECIPES)}, got {options.recipe!r}")
    if options.recipe == "simclr":
        raise UsageError(
            "recipe: 'simclr' jitters colour and the digits are grey; expected 'digits'"
        )
    images = len(load_digit_splits(0).train)
    if options.batch_size > images:
        raise UsageError(
            f"batch_size: expected at most {images} (the number of training images), "
            f"got {options.batch_size}"
        )
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= s < 2**32 for s in seeds):
        raise UsageError(f"seeds: expected distinct integers from 0 to 2^32 - 1, got {seeds}")
    if resume and overwrite:
        raise UsageError("resume and overwrite: expected at most one of them, got both")


def run_seed(
    options: SimCLROptions,
    report_options: ReportOptions,
    seed: int,
    folder: Path,
    checkpoint: Path | None,
    console: Console,
) -> SeedResult:
    """Pretrain with one seed (from ``checkpoint`` if given) and probe its features."""
    splits = load_digit_splits(seed)
    module = build_simclr(options, splits.train.images, seed)
    untrained = copy.deepcopy(module.encoder)
    views = _fixed_views(module.views, splits.validation, seed)
    log = EpochLog(folder / LOG)
    snapshots = SimilaritySnapshots(*views)
    callbacks = [
        KNNMonitor(splits.train, splits.validation, options.knn_every, options.knn_neighbours),
        log,
        snapshots,
        RunProgressBar(f"seed {seed}", console),
    ]
    start = time.perf_counter()
    pretrain(
        module,
        EpochShuffledBatches(splits.train.images, options.batch_size, seed),
        callbacks,
        epochs=options.epochs,
        checkpoint_every=report_options.checkpoint_every,
        folder=folder / CHECKPOINTS,
        checkpoint=checkpoint,
    )
    trained = time.perf_counter()
    accuracy = probe_all(module.encoder, untrained, splits, report_options, seed)
    seconds = {"training": trained - start, "probes": time.perf_counter() - trained}
    return SeedResult(accuracy, log.rows, snapshots.matrices, views, seconds)


def build_simclr(options: SimCLROptions, images: torch.Tensor, seed: int) -> SimCLR:
    """The module with its initial parameters, a function of ``options`` and ``seed``.

    Batch norm starts from the statistics of ``images`` [N, 1, H, W]: training replaces them, but
    the untrained encoder of the comparison shall not be weak for lack of them.
    """
    torch.manual_seed(seed)
    encoder = SmallCNN(in_channels=1, width=options.width)
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub
    head = MLPHead(encoder.feature_dim, options.hidden_features, options.out_features)
    module = SimCLR(
        encoder,
        head,
        TwoViews(options.recipe, (images.shape[2], images.shape[3])),
        temperature=options.temperature,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_epochs=options.warmup_epochs,
        seed=seed,
    )
    module.hparams.update(asdict(options))
    calibrate_batch_norm(module, images)
    return module


def _fixed_views(views: nn.Module, split: Split, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views [8, 1, H, W] of the first image of each of eight digits."""
    firsts = [int((split.labels == digit).nonzero()[0]) for digit in SNAPSHOT_DIGITS]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return views(split.images[firsts])


def probe_all(
    pretrained: nn.Module,
    untrained: nn.Module,
    splits: DigitSplits,
    report_options: ReportOptions,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Linear-probe accuracy in [0, 1] by representation and labels per class."""
    scored = getattr(splits, report_options.report_on)
    representations = {
        "pretrained": pretrained.cpu(),
        "untrained": untrained,
        "pixels": nn.Flatten(),
    }
    accuracy: dict[str, dict[str, float]] = {}
    for name, encoder in representations.items():
        train_features = extract_features(encoder, splits.train.images).numpy()
        scored_features = extract_features(encoder, scored.images).numpy()
        accuracy[name] = {
            str(count or "all"): linear_probe(
                train_features,
                splits.train.labels.numpy(),
                scored_features,
                scored.labels.numpy(),
                labels_per_class=count,
                draws=report_options.label_draws,
                seed=seed,
            )
            for count in LABELS_PER_CLASS
        }
    return accuracy


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Train a method with every seed, score it beside its untrained twin, write the report."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console

from fastcl.trainers.callbacks import EpochLog, RunProgressBar
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.fit import check_machine, fit
from fastcl.trainers.folder import CHECKPOINTS, LOG, TENSORBOARD, RunFolder, hyper_parameters
from fastcl.trainers.methods import METHODS, Method
from fastcl.trainers.options import TrainOptions, UsageError, check_choice
from fastcl.trainers.report import Report, write_report


@dataclass
class SeedResult:
    """What one seed yields: scores by who was scored ("trained", "untrained", references) and
    metric, the log's rows, further numbers, seconds spent, and the device that trained."""

    scores: dict[str, dict[str, float]]
    rows: list[dict[str, float]]
    details: dict[str, Any]
    seconds: dict[str, float]
    device: dict[str, Any] = field(default_factory=dict)


def run(
    method: Method | str,
    options: TrainOptions,
    *,
    seeds: list[int],
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Report:
    """Train, score and report; returns what was written to ``out``/results.json.

    Args:
        method: or its name in ``METHODS``.
        options: an instance of the method's options.
        seeds: each gives its own initial parameters, division of the data, order and draws.
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
    if isinstance(method, str):
        check_choice("method", method, tuple(METHODS))
        method = METHODS[method]
    options.check()
    _check_request(options, seeds, resume, overwrite)
    check_machine(options)
    main = _is_main_process()
    console = console or Console(quiet=not main)
    first = _experiment(method, options, seeds[0])  # before anything is written
    folder = RunFolder(out)
    checkpoints = folder.checkpoints_to_resume(seeds, method.name, options, resume, overwrite)
    folder.prepare(seeds, overwrite and main)
    console.print(
        f"{method.title}: {method.summary}.\n{first.data}; {len(seeds)} "
        f"seed{'s' * (len(seeds) > 1)}, {options.epochs} epochs each.",
        highlight=False,
    )
    results, pictures = {}, []
    with threads(options.threads):
        for seed in seeds:
            experiment = first if seed == seeds[0] else _experiment(method, options, seed)
            results[seed] = _run_seed(
                method, experiment, options, seed, folder.of_seed(seed), checkpoints.get(seed),
                console,
            )  # fmt: skip
            if experiment is first and first.figures is not None and main:
                pictures = first.figures(first.module, folder.path)
    report = Report(method, options, first, results, pictures, time.perf_counter() - start)
    if main:
        write_report(report, folder, console)
    return report


def _check_request(options: TrainOptions, seeds: list[int], resume: bool, overwrite: bool) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= s < 2**32 for s in seeds):
        raise UsageError(f"seeds: expected distinct integers from 0 to 2^32 - 1, got {seeds}")
    if resume and overwrite:
        raise UsageError("resume and overwrite: expected at most one of them, got both")
    if options.tensorboard and find_spec("tensorboard") is None:
        raise UsageError(
            "tensorboard: expected the package tensorboard to be installed: pip install tensorboard"
        )


def _experiment(method: Method, options: TrainOptions, seed: int) -> Experiment:
    try:
        experiment = method.experiment(options, seed)
    except ValueError as error:  # data and options meet here; what refuses names the argument
        raise UsageError(str(error)) from error
    experiment.module.hparams.update(hyper_parameters(method.name, options))
    return experiment


def _run_seed(
    method: Method,
    experiment: Experiment,
    options: TrainOptions,
    seed: int,
    folder: Path,
    checkpoint: Path | None,
    console: Console,
) -> SeedResult:
    """Train with one seed (from ``checkpoint`` if given) and score."""
    untrained = copy.deepcopy(experiment.module)
    log = EpochLog(folder / LOG)
    callbacks: list[pl.Callback] = [log, RunProgressBar(f"seed {seed}", console)]
    logger = None
    if options.tensorboard:
        logger = pl.loggers.TensorBoardLogger(
            folder, name=TENSORBOARD, version="", default_hp_metric=False
        )
        logger.log_hyperparams(hyper_parameters(method.name, options))
        callbacks.append(pl.callbacks.LearningRateMonitor("epoch"))
    if torch.cuda.is_initialized():  # by an earlier seed
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    device = fit(
        experiment,
        options,
        seed,
        folder=folder / CHECKPOINTS,
        callbacks=callbacks,
        checkpoint=checkpoint,
        logger=logger,
    )
    trained = time.perf_counter()
    if not _is_main_process():  # scored by rank 0 alone
        return SeedResult({}, log.rows, {}, {})
    trained_on = describe(device)
    scores = {
        "trained": experiment.scores(experiment.module.eval()),
        "untrained": experiment.scores(untrained.to(device).eval()),
        **{name: dict(known) for name, known in experiment.references.items()},
    }
    details = experiment.details(experiment.module) if experiment.details else {}
    seconds = {"training": trained - start, "scores": time.perf_counter() - trained}
    return SeedResult(scores, log.rows, details, seconds, trained_on)


def describe(device: torch.device) -> dict[str, Any]:
    """What ``device`` is called and, of a GPU, the most bytes that tensors took there."""
    if device.type != "cuda":
        return {"name": device.type}
    return {
        "name": torch.cuda.get_device_name(device),
        "peak_bytes": torch.cuda.max_memory_allocated(device),
    }


def _is_main_process() -> bool:
    """Whether this is rank 0, which scores and writes; what Lightning starts carries its rank."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of the processor within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""The training loop of every method: Lightning's, with checkpoints that resume exactly."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fastcl.trainers.callbacks import EpochSeed, SharedNegatives
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.folder import LAST
from fastcl.trainers.options import RunError, TrainOptions, UsageError


def check_machine(options: TrainOptions) -> None:
    """Raise UsageError where this machine lacks the devices asked for; only Lightning knows."""
    try:
        with _quiet_lightning():
            pl.Trainer(
                accelerator=options.accelerator,
                devices=options.devices,
                strategy=options.strategy,
                precision=options.precision,  # type: ignore[arg-type]  # checked by the options
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
            )
    except MisconfigurationException as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"accelerator: expected what this machine has, got {options.accelerator} with "
            f"devices = {options.devices} ({reason})"
        ) from error


def fit(
    experiment: Experiment,
    options: TrainOptions,
    seed: int,
    *,
    folder: Path,
    callbacks: list[pl.Callback] | None = None,
    checkpoint: Path | None = None,
    logger: pl.loggers.Logger | None = None,
) -> torch.device:
    """Train the experiment's module in place.

    Args:
        experiment: its module holds the parameters to start from; ``checkpoint`` replaces them.
        options: of the training.
        seed: of what the epochs draw.
        folder: receives last.ckpt and a checkpoint every ``options.checkpoint_every`` epochs.
        callbacks: beside the experiment's own; the state of all is part of the checkpoints.
        checkpoint: where an earlier run with the same arguments stopped.
        logger: a Lightning logger; none by default.

    Returns:
        The device that the module was trained on, and where it is left.

    Raises:
        RunError: interrupted from the keyboard.
    """
    saving = ModelCheckpoint(
        dirpath=folder,
        filename="epoch-{epoch:04d}",
        auto_insert_metric_name=False,
        every_n_epochs=options.checkpoint_every,
        save_top_k=-1,
        save_last=True,
        enable_version_counter=False,  # epochs done twice write the same file again
    )
    with _quiet_lightning():
        trainer = pl.Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            strategy=options.strategy,
            precision=options.precision,  # type: ignore[arg-type]  # checked by the options
            gradient_clip_val=options.gradient_clip or None,
            max_epochs=options.epochs,
            # logs come after what the experiment's own callbacks measure
            callbacks=[
                EpochSeed(seed),
                SharedNegatives(),
                *experiment.callbacks,
                *(callbacks or []),
                saving,
            ],
            default_root_dir=folder,
            logger=logger or False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        try:
            trainer.fit(
                experiment.module, experiment.batches, ckpt_path=checkpoint, weights_only=True
            )
        except SystemExit as exit_:  # how Lightning answers Ctrl-C
            raise RunError(
                f"interrupted; --resume continues from the last checkpoint in {folder}"
            ) from exit_
        if options.epochs % options.checkpoint_every:
            trainer.save_checkpoint(folder / LAST)
    device = trainer.strategy.root_device
    experiment.module.to(device)
    return device


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's start-up notices (which devices it found, tips) out of the console."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Resuming writes beside earlier checkpoints on purpose, and the folder may have moved.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")
            warnings.filterwarnings("ignore", message="The dirpath has changed")
            # Batches come from memory: there are no loading processes to advise on.
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            # What is frozen stays in evaluation mode on purpose.
            warnings.filterwarnings("ignore", message="Found .* module.* in eval mode")
            # An epoch of a small data set has fewer steps than a logger's usual interval.
            warnings.filterwarnings("ignore", message="The number of training batches")
            # Lightning 2.6 still makes tree leaves in the way that PyTorch 2.13 deprecates.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

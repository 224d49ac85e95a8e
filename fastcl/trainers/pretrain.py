"""The training loop of every method: Lightning's, with checkpoints that resume exactly."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from fastcl.data.digits import EpochShuffledBatches
from fastcl.trainers.folder import LAST
from fastcl.trainers.options import RunError
from fastcl.trainers.simclr import SimCLR


def pretrain(
    module: SimCLR,
    batches: EpochShuffledBatches,
    callbacks: list[pl.Callback],
    *,
    epochs: int,
    checkpoint_every: int,
    folder: Path,
    checkpoint: Path | None = None,
) -> None:
    """Train ``module`` in place; ``folder`` receives last.ckpt and a checkpoint every n epochs.

    Args:
        module: with the parameters to start from; ``checkpoint`` replaces them.
        batches: training images.
        callbacks: their state is part of the checkpoints.
        epochs: in all, those before ``checkpoint`` included.
        checkpoint_every: n.
        folder: of the checkpoints.
        checkpoint: where an earlier run with the same arguments stopped.

    Raises:
        RunError: interrupted from the keyboard.
    """
    saving = ModelCheckpoint(
        dirpath=folder,
        filename="epoch-{epoch:04d}",
        auto_insert_metric_name=False,
        every_n_epochs=checkpoint_every,
        save_top_k=-1,
        save_last=True,
        enable_version_counter=False,  # epochs done twice write the same file again
    )
    with _quiet_lightning():
        trainer = pl.Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=epochs,
            callbacks=[*callbacks, saving],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        try:
            trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as exit_:  # how Lightning answers Ctrl-C
            raise RunError(
                f"interrupted; --resume continues from the last checkpoint in {folder}"
            ) from exit_
        if epochs % checkpoint_every:
            trainer.save_checkpoint(folder / LAST)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's start-up notices (which devices it found, tips) out of the console."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Resuming writes beside earlier checkpoints on purpose, and the folder may have moved.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")
            warnings.filterwarnings("ignore", message="The dirpath has changed")
            # Lightning 2.6 still makes tree leaves in the way that PyTorch 2.13 deprecates.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)

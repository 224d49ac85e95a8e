"""Rotation pretext: which way up is the image?"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.splits import unit_range
from fastcl.data.views import Augment
from fastcl.evaluation.features import calibrate_batch_norm
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.images import RotationOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


def four_rotations(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All four rotations of square images, and which is which.

    A quarter turn is counter-clockwise: [[0, 1], [2, 3]] becomes [[1, 3], [0, 2]].

    Args:
        images: [B, C, H, H].

    Returns:
        [4 B, C, H, H], rotation by rotation, and their classes [4 B] in 0 to 3.

    Raises:
        ValueError: images that are not square.
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images: expected square [B, C, H, H], got {list(images.shape)}")
    turned = torch.cat([torch.rot90(images, quarters, (2, 3)) for quarters in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


class Rotation(pl.LightningModule):
    """Encoder and linear classifier tell the four rotations of an image apart.

    Batches are square images [B, C, H, H], floating point in [0, 1] or uint8.

    Args:
        encoder: images to features [B, D], with ``feature_dim`` D.
        augment: images to images of the same shape, before they are turned.
        optimization: optimizer and schedule.

    Source: Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting Image
    Rotations", section 2 (all four copies of an image in one batch).
    """

    def __init__(
        self,
        encoder: nn.Module,
        augment: nn.Module,
        *,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.encoder = encoder
        self.augment = augment
        self.classifier = nn.Linear(encoder.feature_dim, 4)  # type: ignore[arg-type]
        self.optimization = optimization

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, 4] of images [B, C, H, W]."""
        return self.classifier(self.encoder(images))

    def training_step(self, images: torch.Tensor, batch_index: int) -> torch.Tensor:
        turned, classes = four_rotations(self.augment(images))
        logits = self(turned)
        loss = F.cross_entropy(logits, classes)
        accuracy = (logits.argmax(1) == classes).float().mean()
        log_batch(self, len(turned), loss, {"rotation_accuracy": accuracy})
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


@torch.no_grad()
def rotation_accuracy(module: Rotation, pictures: torch.Tensor) -> float:
    """Share of the rotations of images [N, C, H, H] that the module recognises."""
    right = 0
    for part in pictures.split(1024):
        turned, classes = four_rotations(unit_range(part.to(module.device)))
        right += int((module(turned).argmax(1) == classes).sum())
    return right / (4 * len(pictures))


def experiment(options: RotationOptions, seed: int) -> Experiment:
    """Rotation on images without labels: held-out rotations, and what frozen features are worth."""
    splits = images.load(options, seed)
    torch.manual_seed(seed)
    encoder = images.build_encoder(options, splits.channels)
    module = Rotation(encoder, images.views(options, splits, Augment), optimization=options)
    calibrate_batch_norm(module, four_rotations(unit_range(splits.train.images[:512]))[0])
    held_out = getattr(splits, options.report_on).images

    def scores(trained: Any) -> dict[str, float]:
        return {
            **images.image_scores(trained.encoder, splits, options, seed),
            "rotations": rotation_accuracy(trained, held_out),
        }

    return images.image_experiment(
        module,
        options,
        splits,
        seed,
        scores=scores,
        measured=f"{images.MEASURED}; rotations told apart",
        batches=EpochShuffledBatches(splits.pretraining, options.batch_size, seed),
        levels={"loss": math.log(4), "rotation_accuracy": 0.25},
    )

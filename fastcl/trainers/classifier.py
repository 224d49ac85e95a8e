"""Supervised training of an encoder with a linear classifier: fine-tuning, or from scratch."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl.data.splits import unit_range
from fastcl.encoders import check_fit
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


class Classifier(pl.LightningModule):
    """Encoder and linear layer, trained by cross-entropy.

    Batches are images [B, C, H, W], floating point in [0, 1] or uint8, and labels [B].

    Args:
        encoder: images to features [B, D]; frozen (see :func:`fastcl.encoders.freeze`) or not.
        classifier: features to logits [B, classes].
        augment: images to images of the same shape; none by default.
        optimization: optimizer and schedule.

    Raises:
        ValueError: a classifier for features of another width than the encoder's.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classifier: nn.Linear,
        *,
        augment: nn.Module | None = None,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        check_fit(encoder, classifier)
        self.encoder = encoder
        self.classifier = classifier
        self.augment = augment
        self.optimization = optimization

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        return self.classifier(self.encoder(unit_range(images)))

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        images, labels = batch
        logits = self(images if self.augment is None else self.augment(images))
        loss = F.cross_entropy(logits, labels)
        log_batch(
            self, len(images), loss, {"train_accuracy": (logits.argmax(1) == labels).float().mean()}
        )
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)

"""SimCLR: two augmented views of an image shall be closer than views of different images."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import NTXentLoss


class SimCLR(pl.LightningModule):
    """Encoder and projection head trained with NT-Xent.

    Batches are images [B, C, H, W], floating point in [0, 1]. Every epoch begins by seeding
    PyTorch's global generator from (seed, epoch), so the augmentations of an epoch do not depend
    on how many runs it took to get there: this is what makes resuming exact.

    Args:
        encoder: images [B, C, H, W] to features [B, D].
        head: features [B, D] to projections [B, P].
        views: images to two augmented batches of the same shape.
        temperature: of NT-Xent.
        learning_rate: peak, for AdamW.
        weight_decay: of AdamW.
        warmup_epochs: linear rise of the learning rate, followed by a cosine to zero.
        seed: of the augmentations.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
    Representations", algorithm 1.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        views: nn.Module,
        *,
        temperature: float = 0.5,
        learning_rate: float = 8e-3,
        weight_decay: float = 1e-2,
        warmup_epochs: int = 10,
        seed: int = 0,
    ):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.views = views
        self.loss = NTXentLoss(temperature=temperature, return_metrics=True)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.seed = seed

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Projections [B, P] of images [B, C, H, W]."""
        return self.head(self.encoder(images))

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(epoch_seed(self.seed, self.current_epoch))

    def training_step(self, images: torch.Tensor, batch_index: int) -> torch.Tensor:
        first, second = self(torch.cat(self.views(images))).chunk(2)
        loss, metrics = self.loss(first, second)
        self.log_dict(
            {
                "loss": loss.detach(),
                "contrastive_accuracy": metrics["accuracy"],
                "positive_similarity": metrics["positive_similarity"],
                "negative_similarity": metrics["negative_similarity"],
            },
            on_step=False,
            on_epoch=True,
            batch_size=len(images),
        )
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        total = int(self.trainer.estimated_stepping_batches)
        warmup = self.warmup_epochs * int(self.trainer.num_training_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, warmup, total)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor of the learning rate at ``step`` of ``total``: linear to 1, then cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for one epoch; distinct for distinct pairs while ``epoch`` is below 2^20."""
    return (seed << 20) + epoch

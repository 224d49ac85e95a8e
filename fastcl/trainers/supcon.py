"""Supervised contrastive learning: all images of a label are each other's positives."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import SupConLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.encoders import check_fit
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.images import SupConOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


class SupCon(pl.LightningModule):
    """Two views of every image, attracted by all views of its label.

    Batches are images [B, C, H, W], floating point in [0, 1] or uint8, and labels [B].

    Args:
        encoder: images [B, C, H, W] to features [B, D].
        head: features [B, D] to projections [B, P].
        views: images to two augmented batches of the same shape.
        temperature: of the softmax.
        form: "out" or "in", where the mean over positives stands.
        optimization: optimizer and schedule.

    Raises:
        ValueError: a head for features of another width than the encoder's.

    Source: Khosla et al. 2020, "Supervised Contrastive Learning", eqs. 2 and 3.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        views: nn.Module,
        *,
        temperature: float = 0.1,
        form: str = "out",
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        check_fit(encoder, head)
        self.encoder = encoder
        self.head = head
        self.views = views
        self.loss = SupConLoss(temperature, form=form, return_metrics=True)
        self.optimization = optimization

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Projections [B, P] of images [B, C, H, W]."""
        return self.head(self.encoder(images))

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        images, labels = batch
        projections = self(torch.cat(self.views(images))).unflatten(0, (2, -1)).transpose(0, 1)
        loss, metrics = self.loss(projections, labels)
        log_batch(self, len(images), loss, metrics)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def experiment(options: SupConOptions, seed: int) -> Experiment:
    """SupCon on labelled images, judged by what its frozen features are worth."""
    splits = images.load(options, seed)
    encoder, head = images.build_parts(options, splits, seed)
    module = SupCon(
        encoder,
        head,
        images.views(options, splits),
        temperature=options.temperature,
        form=options.form,
        optimization=options,
    )
    labels = with_noise(splits.train.labels, options.label_noise, len(splits.classes), seed)
    data = (splits.train.images, labels)
    return images.image_experiment(
        module,
        options,
        splits,
        seed,
        batches=EpochShuffledBatches(data, options.batch_size, seed),
        data=f"{splits.name}, with labels",
    )


def with_noise(labels: torch.Tensor, share: float, classes: int, seed: int) -> torch.Tensor:
    """A copy of ``labels`` [N] in which a share is replaced by another class, drawn evenly."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, max(2, classes), (len(wrong),), generator=generator)
    noisy = labels.clone()
    noisy[wrong] = (labels[wrong] + shift) % classes
    return noisy

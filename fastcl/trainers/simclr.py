"""SimCLR: two augmented views of an image shall be closer than views of different images."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import NTXentLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.views import TwoViews
from fastcl.encoders import MLPHead
from fastcl.evaluation.features import calibrate_batch_norm
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.images import SimCLROptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


class SimCLR(pl.LightningModule):
    """Encoder and projection head trained with NT-Xent.

    Batches are images [B, C, H, W], floating point in [0, 1].

    Args:
        encoder: images [B, C, H, W] to features [B, D].
        head: features [B, D] to projections [B, P].
        views: images to two augmented batches of the same shape.
        temperature: of NT-Xent.
        optimization: optimizer and schedule.

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
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.views = views
        self.loss = NTXentLoss(temperature=temperature, return_metrics=True)
        self.optimization = optimization

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Projections [B, P] of images [B, C, H, W]."""
        return self.head(self.encoder(images))

    def training_step(self, images: torch.Tensor, batch_index: int) -> torch.Tensor:
        first, second = self(torch.cat(self.views(images))).chunk(2)
        loss, metrics = self.loss(first, second)
        log_batch(self, len(images), loss, metrics)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def experiment(options: SimCLROptions, seed: int) -> Experiment:
    """SimCLR on images without labels, judged by what its frozen features are worth."""
    splits = images.load(options, seed)
    batches = EpochShuffledBatches(splits.train.images, options.batch_size, seed)
    module = build_simclr(options, splits.train.images, seed)
    pictures = images.ViewPictures(module.views, splits.validation, seed)
    candidates = 2 * options.batch_size - 1
    return Experiment(
        module=module,
        batches=batches,
        scores=lambda module: images.image_scores(module.encoder, splits, options, seed),
        headline="probe@10",
        measured=images.MEASURED,
        data=images.DATA,
        references={"raw pixels": images.pixel_scores(splits, options, seed)},
        callbacks=[images.knn_monitor(splits, options), pictures.snapshots],
        levels={"loss": math.log(candidates), "contrastive_accuracy": 1 / candidates},
        figures=pictures.figures,
        details=pictures.details,
    )


def build_simclr(options: SimCLROptions, images_: torch.Tensor, seed: int) -> SimCLR:
    """The module with its initial parameters, a function of ``options`` and ``seed``.

    Batch norm starts from the statistics of ``images_`` [N, 1, H, W]: training replaces them, but
    the untrained encoder of the comparison shall not be weak for lack of them.
    """
    torch.manual_seed(seed)
    encoder = images.build_encoder(options)
    module = SimCLR(
        encoder,
        MLPHead(encoder.feature_dim, options.hidden_features, options.out_features),
        TwoViews(options.recipe, (images_.shape[2], images_.shape[3])),
        temperature=options.temperature,
        optimization=options,
    )
    calibrate_batch_norm(module, images_)
    return module

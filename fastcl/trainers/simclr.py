"""SimCLR: two augmented views of an image shall be closer than views of different images."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import DCLLoss, DCLWLoss, DebiasedLoss, HardNegativeLoss, NTXentLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.encoders import check_fit
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.images import SimCLROptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization

LOSSES = {
    "nt_xent": NTXentLoss,
    "dcl": DCLLoss,
    "dclw": DCLWLoss,
    "debiased": DebiasedLoss,
    "hard_negative": HardNegativeLoss,
}


class SimCLR(pl.LightningModule):
    """Encoder and projection head trained with NT-Xent, or another loss of two views.

    Batches are images [B, C, H, W], floating point in [0, 1] or uint8.

    Args:
        encoder: images [B, C, H, W] to features [B, D].
        head: features [B, D] to projections [B, P].
        views: images to two augmented batches of the same shape.
        temperature: of the loss.
        loss: a name in ``LOSSES``.
        normalize: compare directions; otherwise dot products.
        view_noise: share of the pairs whose second view shows another image.
        optimization: optimizer and schedule.

    Raises:
        ValueError: a head for features of another width than the encoder's.

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
        loss: str = "nt_xent",
        normalize: bool = True,
        view_noise: float = 0.0,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        check_fit(encoder, head)
        self.encoder = encoder
        self.head = head
        self.views = views
        self.loss = LOSSES[loss](temperature, normalize=normalize, return_metrics=True)
        self.view_noise = view_noise
        self.optimization = optimization

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Projections [B, P] of images [B, C, H, W]."""
        return self.head(self.encoder(images))

    def training_step(self, images: torch.Tensor, batch_index: int) -> torch.Tensor:
        first, second = self.views(images)
        if self.view_noise:
            wrong = torch.rand(len(images), 1, 1, 1, device=second.device) < self.view_noise
            second = torch.where(wrong, second.roll(1, 0), second)
        first, second = self(torch.cat([first, second])).chunk(2)
        loss, metrics = self.loss(first, second)
        log_batch(self, len(images), loss, metrics)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def experiment(options: SimCLROptions, seed: int) -> Experiment:
    """SimCLR on images without labels, judged by what its frozen features are worth."""
    splits = images.load(options, seed)
    encoder, head = images.build_parts(options, splits, seed)
    module = SimCLR(
        encoder,
        head,
        images.views(options, splits),
        temperature=options.temperature,
        loss=options.loss,
        normalize=options.normalize,
        view_noise=options.view_noise,
        optimization=options,
    )
    candidates = 2 * options.batch_size - 1
    return images.image_experiment(
        module,
        options,
        splits,
        seed,
        batches=EpochShuffledBatches(splits.pretraining, options.batch_size, seed),
        levels={
            "contrastive_accuracy": 1 / candidates,
            # the other losses' chance is another
            **({"loss": math.log(candidates)} if options.loss == "nt_xent" else {}),
        },
    )

"""Instance discrimination: every image is a class, its stored feature the class's weight."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import MemoryBankLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.views import Augment
from fastcl.encoders import check_fit
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.images import InstDiscOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


class InstDisc(pl.LightningModule):
    """One view of an image finds the image's own row of the memory bank among those of all.

    Batches are images [B, C, H, W], floating point in [0, 1] or uint8, and sample numbers [B].

    Args:
        encoder: images [B, C, H, W] to features [B, D].
        head: features [B, D] to projections [B, P].
        views: images to one augmented batch of the same shape.
        num_samples: n, of the data set.
        out_features: P.
        temperature: of the softmax.
        bank_momentum: how much of a stored feature stays when its sample is seen.
        form: "softmax" over all n, "sampled_softmax", or "nce" (the paper's).
        negatives: drawn for each sample by the sampled forms.
        optimization: optimizer and schedule.

    Raises:
        ValueError: a head for features of another width than the encoder's.

    Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination", section 3.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        views: nn.Module,
        num_samples: int,
        *,
        out_features: int = 128,
        temperature: float = 0.07,
        bank_momentum: float = 0.5,
        form: str = "softmax",
        negatives: int = 4096,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        check_fit(encoder, head)
        self.encoder = encoder
        self.head = head
        self.views = views
        self.loss = MemoryBankLoss(
            num_samples,
            out_features,
            temperature,
            momentum=bank_momentum,
            form=form,
            negatives=negatives,
            return_metrics=form == "softmax",
        )
        self.optimization = optimization

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Projections [B, P] of images [B, C, H, W]."""
        return self.head(self.encoder(images))

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        images, numbers = batch
        result = self.loss(self(self.views(images)), numbers)
        loss, metrics = result if self.loss.return_metrics else (result, {})
        log_batch(self, len(images), loss, metrics)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def experiment(options: InstDiscOptions, seed: int) -> Experiment:
    """Instance discrimination without labels, judged by what its frozen features are worth."""
    splits = images.load(options, seed)
    encoder, head = images.build_parts(options, splits, seed)
    count = len(splits.pretraining)
    module = InstDisc(
        encoder,
        head,
        images.views(options, splits, Augment),
        count,
        out_features=options.out_features,
        temperature=options.temperature,
        bank_momentum=options.bank_momentum,
        form=options.form,
        negatives=options.negatives,
        optimization=options,
    )
    data = (splits.pretraining, torch.arange(count))
    exact = {"loss": math.log(count), "contrastive_accuracy": 1 / count}
    return images.image_experiment(
        module,
        options,
        splits,
        seed,
        batches=EpochShuffledBatches(data, options.batch_size, seed),
        levels=exact if options.form == "softmax" else {},
    )

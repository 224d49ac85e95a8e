"""MoCo v1 and v2: negatives from a queue of keys that a slowly moving encoder made."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import InfoNCELoss, MomentumEncoder, NegativeQueue
from fastcl.data.batches import EpochShuffledBatches
from fastcl.encoders import check_fit
from fastcl.memory import shuffle_batch, split_batch_norm
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.images import MoCoOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


class MoCo(pl.LightningModule):
    """Queries of one view find the key of the other among those of earlier batches.

    A step moves the key encoder, makes keys of shuffled samples (ShuffleBN; across devices a
    sample's key is normalised beside other samples than its query), takes the loss against the
    queue as it was and then enqueues the keys, with their samples' numbers: a key that an image
    left in the queue an epoch ago is not its negative.

    Batches are images [B, C, H, W], floating point in [0, 1] or uint8, and sample numbers [B].

    Args:
        encoder: images [B, C, H, W] to features [B, D].
        head: features [B, D] to projections [B, P].
        views: images to two augmented batches of the same shape.
        out_features: P.
        queue_size: keys held.
        momentum: of the key encoder; parameters only, batch norm keeps its own statistics.
        temperature: of InfoNCE.
        bn_splits: groups with batch-norm statistics of their own, on one device what ShuffleBN
            needs to be more than a permutation. B must be a multiple.
        symmetric: each view is query once and key once.
        optimization: optimizer and schedule.

    Raises:
        ValueError: a head for features of another width than the encoder's.

    Source: He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning",
    algorithm 1 and section 3.3.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        views: nn.Module,
        *,
        out_features: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        bn_splits: int = 1,
        symmetric: bool = False,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        check_fit(encoder, head)
        self.encoder = split_batch_norm(encoder, bn_splits)
        self.head = split_batch_norm(head, bn_splits)
        self.views = views
        self.key_encoder = MomentumEncoder(nn.Sequential(self.encoder, self.head), momentum)
        queue = NegativeQueue(out_features, queue_size)
        self.loss = InfoNCELoss(temperature, queue=queue, return_metrics=True)
        self.symmetric = symmetric
        self.optimization = optimization

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Projections [B, P] of images [B, C, H, W]."""
        return self.head(self.encoder(images))

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        images, numbers = batch
        first, second = self.views(images)
        self.key_encoder.update(nn.Sequential(self.encoder, self.head))
        shuffled, shuffle = shuffle_batch(second)
        keys = shuffle.restore(self.key_encoder(shuffled))
        if self.symmetric:
            shuffled, shuffle = shuffle_batch(first)
            first, second = torch.cat([first, second]), shuffle.restore(self.key_encoder(shuffled))
            keys, numbers = torch.cat([keys, second]), numbers.repeat(2)
        loss, metrics = self.loss(self(first), keys, ids=numbers)
        log_batch(self, len(images), loss, metrics)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def experiment(options: MoCoOptions, seed: int) -> Experiment:
    """MoCo on images without labels, judged by what its frozen features are worth."""
    splits = images.load(options, seed)
    encoder, head = images.build_parts(options, splits, seed)
    module = MoCo(
        encoder,
        head,
        images.views(options, splits),
        out_features=options.out_features,
        queue_size=options.queue_size,
        momentum=options.momentum,
        temperature=options.temperature,
        bn_splits=options.bn_splits,
        symmetric=options.symmetric,
        optimization=options,
    )
    data = (splits.pretraining, torch.arange(len(splits.pretraining)))
    candidates = options.queue_size + 1
    return images.image_experiment(
        module,
        options,
        splits,
        seed,
        batches=EpochShuffledBatches(data, options.batch_size, seed),
        levels={"loss": math.log(candidates), "contrastive_accuracy": 1 / candidates},
    )

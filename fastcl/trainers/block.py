"""Block contrastive learning: nearer to the mean of similar samples than to that of others."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import BlockContrastiveLoss
from fastcl.data.classes import ClassBalancedBatches
from fastcl.data.splits import Split, Splits, unit_range
from fastcl.encoders import SmallCNN
from fastcl.evaluation.features import extract_features
from fastcl.evaluation.mean_classifier import mean_classifier_accuracy
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.metric import BlockOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


class Block(pl.LightningModule):
    """An encoder trained on blocks of b similar samples, its features not normalised.

    Batches are (images [P (b + 1), C, H, W], labels) sorted by latent class, b + 1 of each. The
    first of a class is an anchor, the others are its positive block; its negative block is that of
    the next class of the batch.

    Args:
        encoder: images to features [B, D].
        block: b.
        loss: ``"hinge"`` or ``"logistic"``.
        optimization: optimizer and schedule.

    Source: Arora et al. 2019, "A Theoretical Analysis of Contrastive Unsupervised Representation
    Learning", section 6.2.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        block: int = 5,
        loss: str = "logistic",
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.encoder = encoder
        self.block = block
        self.loss = BlockContrastiveLoss(form=loss)
        self.optimization = optimization

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [B, D] of images [B, C, H, W]."""
        return self.encoder(unit_range(images))

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        features = self(batch[0]).unflatten(0, (-1, self.block + 1))
        anchors, blocks = features[:, 0], features[:, 1:]
        loss = self.loss(anchors, blocks, blocks.roll(1, 0))
        log_batch(self, len(batch[0]), loss, {})
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def experiment(options: BlockOptions, seed: int) -> Experiment:
    """Labels as latent classes, judged by the classifier whose weights are class means."""
    splits = images.load(options, seed)
    torch.manual_seed(seed)
    module = Block(
        SmallCNN(splits.channels, options.width),
        block=options.block,
        loss=options.loss,
        optimization=options,
    )
    images.calibrate(module, splits.train.images)
    return Experiment(
        module=module,
        batches=ClassBalancedBatches(
            splits.train.images,
            splits.train.labels,
            options.batch_size // (options.block + 1),
            options.block + 1,
            seed,
        ),
        scores=lambda module: _scores(module, splits, options),
        headline="mean classifier",
        measured="Images classified right by class means; the same, of two classes at a time",
        data=f"{splits.name}, their labels as latent classes",
        references={"raw pixels": _scores(nn.Flatten(), splits, options)},
    )


def _scores(encoder: nn.Module, splits: Splits, options: BlockOptions) -> dict[str, float]:
    scored: Split = getattr(splits, options.report_on)
    train, test = (extract_features(encoder, part.images) for part in (splits.train, scored))
    labels = splits.train.labels.to(train.device), scored.labels.to(test.device)
    return {
        "mean classifier": mean_classifier_accuracy(train, labels[0], test, labels[1]),
        "of two classes": mean_classifier_accuracy(train, labels[0], test, labels[1], pairs=True),
    }

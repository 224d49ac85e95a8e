"""Contrastive multiview coding: an encoder for each view, each view's features find the others'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_lab
from kornia.filters import sobel
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import CMCLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.splits import Splits
from fastcl.data.views import Augment
from fastcl.encoders import check_fit
from fastcl.ops import similarity_topk
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.images import CMCOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization, UsageError

Images = torch.Tensor


def lab(images: Images) -> tuple[Images, ...]:
    """Luminance L [B, 1, H, W] and colour ab [B, 2, H, W] of colour images, each of order 1."""
    values = rgb_to_lab(images.clamp(0, 1))
    return values[:, :1] / 100, values[:, 1:] / 110


def halves(images: Images) -> tuple[Images, ...]:
    """Upper and lower half, each brought back to full height."""
    size = images.shape[2:]
    parts = images.chunk(2, dim=2)
    return tuple(F.interpolate(part, size, mode="bilinear") for part in parts)


def edges(images: Images) -> tuple[Images, ...]:
    """The image and its Sobel edges."""
    return images, sobel(images)


SPLITS: dict[str, tuple[Callable[[Images], tuple[Images, ...]], Callable[[int], tuple[int, ...]]]]
SPLITS = {
    "edges": (edges, lambda channels: (channels, channels)),
    "halves": (halves, lambda channels: (channels, channels)),
    "lab": (lab, lambda channels: (1, 2)),
}
"""By name, what makes views of images, and how many channels each has."""


class MultiviewEncoder(nn.Module):
    """One encoder per view; features of all views side by side."""

    def __init__(self, split: Callable[[Images], tuple[Images, ...]], encoders: list[nn.Module]):
        super().__init__()
        self.split = split
        self.encoders = nn.ModuleList(encoders)
        self.feature_dim = sum(encoder.feature_dim for encoder in encoders)  # type: ignore[misc]

    def each(self, images: Images) -> list[torch.Tensor]:
        """Features [B, D_v] of every view of images [B, C, H, W]."""
        views = self.split(images)
        return [encoder(view) for encoder, view in zip(self.encoders, views, strict=True)]

    def forward(self, images: Images) -> torch.Tensor:
        """Features [B, sum of D_v]."""
        return torch.cat(self.each(images), dim=1)


class CMC(pl.LightningModule):
    """Each view of an image finds the image's row in the memory bank of every other view.

    Batches are images [B, C, H, W], floating point in [0, 1] or uint8, and sample numbers [B].

    Args:
        encoder: of all views.
        heads: features of a view to projections [B, P], one for each.
        augment: images to images of the same shape, before they are split into views.
        num_samples: n, of the data set.
        out_features: P.
        temperature: of the softmax.
        bank_momentum: how much of a stored feature stays when its sample is seen.
        form: "softmax" over all n, "sampled_softmax", or "nce".
        negatives: drawn for each sample by the sampled forms.
        optimization: optimizer and schedule.

    Raises:
        ValueError: a head for features of another width than its encoder's.

    Source: Tian et al. 2020, "Contrastive Multiview Coding", section 3 (full graph).
    """

    def __init__(
        self,
        encoder: MultiviewEncoder,
        heads: list[nn.Module],
        augment: nn.Module,
        num_samples: int,
        *,
        out_features: int = 128,
        temperature: float = 0.07,
        bank_momentum: float = 0.5,
        form: str = "softmax",
        negatives: int = 16384,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        for one, head in zip(encoder.encoders, heads, strict=True):
            check_fit(one, head)
        self.encoder = encoder
        self.heads = nn.ModuleList(heads)
        self.augment = augment
        self.loss = CMCLoss(
            num_samples,
            out_features,
            temperature,
            views=len(heads),
            momentum=bank_momentum,
            form=form,
            negatives=negatives,
        )
        self.optimization = optimization

    def forward(self, images: Images) -> list[torch.Tensor]:
        """Projections [B, P] of every view of images [B, C, H, W]."""
        features = self.encoder.each(images)
        return [head(rows) for head, rows in zip(self.heads, features, strict=True)]

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        images, numbers = batch
        projections = self(self.augment(images))
        loss = self.loss(*projections, indices=numbers)
        log_batch(self, len(images), loss, cross_view_metrics(*projections[:2]))
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


@torch.no_grad()
def cross_view_metrics(first: torch.Tensor, second: torch.Tensor) -> dict[str, torch.Tensor]:
    """How often a row of the first view is nearest to its own of the second, within the batch."""
    queries, keys = F.normalize(first, dim=1), F.normalize(second, dim=1)
    nearest = similarity_topk(queries, keys, 1.0, k=1).indices[:, 0]
    own = torch.arange(len(first), device=first.device)
    return {"accuracy": (nearest == own).float().mean()}


def build_encoder(options: CMCOptions, splits: Splits) -> MultiviewEncoder:
    """An encoder for each view that ``options`` name.

    Raises:
        UsageError: Lab of images without colour.
    """
    if options.split == "lab" and splits.channels != 3:
        raise UsageError(
            f"split: lab needs colour images and those of {splits.name} have "
            f"{splits.channels} channel; expected edges or halves"
        )
    split, channels = SPLITS[options.split]
    return MultiviewEncoder(
        split, [images.build_encoder(options, count) for count in channels(splits.channels)]
    )


def experiment(options: CMCOptions, seed: int) -> Experiment:
    """CMC on images without labels, judged by what frozen features of all views are worth."""
    splits = images.load(options, seed)
    torch.manual_seed(seed)
    encoder = build_encoder(options, splits)
    count = len(splits.pretraining)
    module: Any = CMC(
        encoder,
        [images.build_head(options, one) for one in encoder.encoders],
        images.views(options, splits, Augment),
        count,
        out_features=options.out_features,
        temperature=options.temperature,
        bank_momentum=options.bank_momentum,
        form=options.form,
        negatives=options.negatives,
        optimization=options,
    )
    images.calibrate(module, splits.train.images)
    data = (splits.pretraining, torch.arange(count))
    return images.image_experiment(
        module,
        options,
        splits,
        seed,
        batches=EpochShuffledBatches(data, options.batch_size, seed),
        levels={"contrastive_accuracy": options.devices / options.batch_size},
    )

"""Jigsaw pretext: in which order were the tiles of an image shuffled?"""

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
from fastcl.data.tiles import cut_tiles, select_permutations
from fastcl.evaluation.features import calibrate_batch_norm
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.images import JigsawOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


class Jigsaw(pl.LightningModule):
    """One encoder for all tiles (the siamese context-free network), then which permutation it was.

    Batches are images [B, C, H, W], floating point in [0, 1] or uint8, enlarged to a side of
    ``side``. With probability ``grey`` an image loses its colour, which would give tiles away.

    Args:
        encoder: tiles [B, C, tile, tile] to features [B, D], with ``feature_dim`` D.
        permutations: [P, grid * grid], the classes.
        side: to which images are resized before they are cut; an own encoder of whole images
            sees them at this size.
        tile: side of the tiles.
        tile_features: a tile's share of the classifier's first layer.
        hidden_features: of its second.
        grey: probability.
        optimization: optimizer and schedule.

    Source: Noroozi and Favaro 2016, "Unsupervised Learning of Visual Representations by Solving
    Jigsaw Puzzles", section 3 and figure 3.
    """

    def __init__(
        self,
        encoder: nn.Module,
        permutations: torch.Tensor,
        *,
        side: int,
        tile: int,
        tile_features: int = 128,
        hidden_features: int = 256,
        grey: float = 0.3,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.permutations: torch.Tensor
        self.register_buffer("permutations", permutations)
        self.grid = math.isqrt(permutations.shape[1])
        self.encoder = encoder
        self.side = side
        self.tile = tile
        self.grey = grey
        self.tile_head = nn.Linear(encoder.feature_dim, tile_features)  # type: ignore[arg-type]
        self.classifier = nn.Sequential(
            nn.ReLU(),
            nn.Linear(permutations.shape[1] * tile_features, hidden_features),
            nn.ReLU(),
            nn.Linear(hidden_features, len(permutations)),
        )
        self.optimization = optimization

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Logits [B, P] of tiles [B, grid * grid, C, tile, tile] in the order they came."""
        features = self.tile_head(self.encoder(tiles.flatten(0, 1)))
        return self.classifier(features.view(len(tiles), -1))

    def enlarge(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] at the size in which tiles are cut from them."""
        return F.interpolate(unit_range(images), (self.side, self.side), mode="bilinear")

    def puzzles(
        self, images: torch.Tensor, jitter: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Shuffled tiles of images, and the permutations' numbers [B]."""
        tiles = cut_tiles(self.enlarge(images), self.grid, self.tile, jitter=jitter)
        classes = torch.randint(len(self.permutations), (len(tiles),), device=tiles.device)
        rows = torch.arange(len(tiles), device=tiles.device)[:, None]
        return tiles[rows, self.permutations[classes]], classes

    def training_step(self, images: torch.Tensor, batch_index: int) -> torch.Tensor:
        images = unit_range(images)
        greyed = torch.rand(len(images), 1, 1, 1, device=images.device) < self.grey
        tiles, classes = self.puzzles(torch.where(greyed, images.mean(1, keepdim=True), images))
        logits = self(tiles)
        loss = F.cross_entropy(logits, classes)
        accuracy = (logits.argmax(1) == classes).float().mean()
        log_batch(self, len(images), loss, {"puzzle_accuracy": accuracy})
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


class Tiles(nn.Module):
    """Images to the features of their tiles, side by side: what the encoder was trained to see."""

    def __init__(self, module: Jigsaw):
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.module.enlarge(images)
        tiles = cut_tiles(images, self.module.grid, self.module.tile, jitter=False)
        return self.module.encoder(tiles.flatten(0, 1)).view(len(images), -1)


def experiment(options: JigsawOptions, seed: int) -> Experiment:
    """Jigsaw on images without labels: held-out puzzles, and what frozen features are worth."""
    splits = images.load(options, seed)
    torch.manual_seed(seed)
    module = Jigsaw(
        images.build_encoder(options, splits.channels),
        select_permutations(options.grid**2, options.permutations, seed),
        side=options.side,
        tile=options.tile,
        hidden_features=options.hidden_features,
        optimization=options,
    )
    calibrate_batch_norm(module, module.puzzles(splits.train.images[:512])[0])
    held_out = getattr(splits, options.report_on).images
    classes = options.permutations

    @torch.no_grad()
    def solved(trained: Jigsaw) -> float:
        right = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same puzzles for trained and untrained
            for part in held_out.split(1024):
                tiles, classes = trained.puzzles(part.to(trained.device), jitter=False)
                right += int((trained(tiles).argmax(1) == classes).sum())
        return right / len(held_out)

    def scores(trained: Any) -> dict[str, float]:
        return {
            **images.image_scores(Tiles(trained).eval(), splits, options, seed),
            "puzzles": solved(trained),
        }

    return images.image_experiment(
        module,
        options,
        splits,
        seed,
        scores=scores,
        measured=f"{images.MEASURED}, from an image's tiles; puzzles solved",
        batches=EpochShuffledBatches(splits.pretraining, options.batch_size, seed),
        callbacks=[],  # the monitor looks at images at their own size
        levels={"loss": math.log(classes), "puzzle_accuracy": 1 / classes},
    )

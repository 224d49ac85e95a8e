"""Siamese network: one encoder for both images of a pair, near where they show the same class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import PairwiseContrastiveLoss
from fastcl.data.pairs import PairBatches, draw_pairs
from fastcl.data.splits import Split, unit_range
from fastcl.encoders import MNISTCNN
from fastcl.evaluation.features import extract_features
from fastcl.evaluation.figures import pair_distances
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.images import ImageOptions
from fastcl.trainers.methods.metric import SiameseOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization

_PAIRS = 2000  # held-out pairs, at least, whose distances are looked at


class Siamese(pl.LightningModule):
    """An encoder trained with the contrastive loss of labelled pairs.

    Batches are (first [B, C, H, W], second [B, C, H, W], similar [B] bools).

    Args:
        encoder: images to embeddings [B, P], compared by their Euclidean distance.
        margin: distance beyond which different images push each other no more.
        form: hadsell or squared; see :func:`fastcl.functional.pairwise_contrastive`.
        optimization: optimizer and schedule.

    Source: Hadsell et al. 2006, "Dimensionality Reduction by Learning an Invariant Mapping".
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        margin: float = 1.0,
        form: str = "hadsell",
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.encoder = encoder
        self.loss = PairwiseContrastiveLoss(margin, form=form)
        self.optimization = optimization

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, P] of images [B, C, H, W]."""
        return self.encoder(unit_range(images))

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        first, second, similar = batch
        a, b = self(torch.cat([first, second])).chunk(2)
        loss = self.loss(a, b, similar)
        distances = (a - b).detach().norm(dim=1)
        log_batch(self, len(first), loss, {
            "positive_distance": distances[similar].mean(),
            "negative_distance": distances[~similar].mean(),
        })  # fmt: skip
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


class PairDistances(pl.Callback):
    """Distances of fixed pairs before training and after every epoch; part of the checkpoints.

    ``distances`` maps the number of epochs done to a distance [N] for each of ``pairs``, which are
    (first [N], second [N], similar [N]): rows of ``split`` and whether they have one class.
    """

    def __init__(self, split: Split):
        self.split = split
        self.pairs = held_out_pairs(split.labels)
        self.distances: dict[int, torch.Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.distances:
            self._measure(0, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._measure(trainer.current_epoch + 1, module)

    def _measure(self, epochs_done: int, module: pl.LightningModule) -> None:
        features = extract_features(module, self.split.images).cpu()
        self.distances[epochs_done] = _distances(features, self.pairs)

    def figures(self, module: nn.Module, folder: Path) -> list[str]:
        """Draw distances.png."""
        similar = self.pairs[2]
        pair_distances(
            {epochs: (d[similar], d[~similar]) for epochs, d in self.distances.items()},
            path=folder / "distances.png",
        )
        return ["distances.png"]

    def state_dict(self) -> dict[str, Any]:
        return {"distances": self.distances}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.distances = dict(state_dict["distances"])


def experiment(options: SiameseOptions, seed: int) -> Experiment:
    """Pairs of labelled digits, judged by nearest neighbours and by pairs told apart."""
    files = ImageOptions(data=options.data, data_root=options.data_root)
    splits = images.load(files, seed)
    scored: Split = getattr(splits, options.report_on)
    torch.manual_seed(seed)
    module = Siamese(MNISTCNN(), margin=options.margin, form=options.form, optimization=options)
    distances = PairDistances(splits.validation)

    def scores(encoder: nn.Module) -> dict[str, float]:
        bank, rows = (extract_features(encoder, s.images).cpu() for s in (splits.train, scored))
        return pair_scores(rows, scored.labels, bank, splits.train.labels)

    return Experiment(
        module=module,
        batches=PairBatches(splits.train.images, splits.train.labels, options.batch_size, seed),
        scores=scores,
        headline="pair AUC",
        measured="Nearest training image has the label (1-NN); area under the ROC of pairs",
        data=f"{splits.name}, with labels",
        references={"raw pixels": scores(nn.Flatten())},
        callbacks=[distances],
        figures=distances.figures,
    )


def pair_scores(
    features: torch.Tensor, labels: torch.Tensor, bank: torch.Tensor, bank_labels: torch.Tensor
) -> dict[str, float]:
    """By Euclidean distance: share of rows [N, D] whose nearest row of the bank [M, D] has their
    label, and the area under the ROC of "a pair nearer than a threshold" for "one class"."""
    from sklearn.metrics import roc_auc_score

    nearest = torch.cat([torch.cdist(part, bank).argmin(1) for part in features.split(1024)])
    pairs = held_out_pairs(labels)
    auc = roc_auc_score(pairs[2].numpy(), -_distances(features, pairs).numpy())
    return {
        "1-NN": (bank_labels[nearest] == labels).double().mean().item(),
        "pair AUC": float(auc),
    }


def held_out_pairs(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`draw_pairs`, of at least 2000 pairs and the same ones every time."""
    generator = np.random.default_rng(0)
    rounds = [draw_pairs(labels, generator) for _ in range(-(-_PAIRS // len(labels)))]
    return tuple(torch.cat(parts) for parts in zip(*rounds, strict=True))  # type: ignore[return-value]


def _distances(
    features: torch.Tensor, pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    return (features[pairs[0]] - features[pairs[1]]).norm(dim=1)

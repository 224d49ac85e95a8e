"""Triplet loss with mining: samples of one class nearer than samples of different classes."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import MinedTripletLoss
from fastcl.data.classes import ClassBalancedBatches
from fastcl.data.splits import Split, unit_range
from fastcl.encoders import SmallCNN
from fastcl.evaluation.features import extract_features
from fastcl.evaluation.figures import roc_curves
from fastcl.evaluation.retrieval import retrieval_scores, verification_auc, verification_roc
from fastcl.trainers import images
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.metric import TripletOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


class Triplet(pl.LightningModule):
    """An encoder whose embeddings are trained on triplets mined from each batch.

    Batches are (images [B, C, H, W], labels [B]) with several samples of each label.

    Args:
        encoder: images to embeddings [B, P], compared by their cosine.
        mining: which triplets of a batch count; see :func:`fastcl.functional.mined_triplet`.
        margin: of the squared distances of unit rows.
        optimization: optimizer and schedule.

    Source: Schroff et al. 2015, "FaceNet"; Hermans et al. 2017, "In Defense of the Triplet Loss
    for Person Re-Identification".
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        mining: str = "batch_hard",
        margin: float = 0.2,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.encoder = encoder
        self.loss = MinedTripletLoss(margin, mining=mining, return_metrics=True)
        self.optimization = optimization

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, P] of images [B, C, H, W]."""
        return self.encoder(unit_range(images))

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        images, labels = batch
        features = self(images)
        loss, metrics = self.loss(features, labels)
        log_batch(self, len(images), loss, {**metrics, **mean_distances(features, labels)})
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def experiment(options: TripletOptions, seed: int) -> Experiment:
    """Images with labels, judged by nearest neighbours and by verification of pairs."""
    splits = images.load(options, seed)
    scored: Split = getattr(splits, options.report_on)
    torch.manual_seed(seed)
    cnn = SmallCNN(splits.channels, options.width)
    module = Triplet(
        nn.Sequential(cnn, nn.Linear(cnn.feature_dim, options.out_features)),
        mining=options.mining,
        margin=options.margin,
        optimization=options,
    )
    images.calibrate(module, splits.train.images)

    raw = unit_range(scored.images).flatten(1)

    def figures(module: Triplet, folder: Path) -> list[str]:
        embeddings = {
            "trained": extract_features(module, scored.images),
            "raw pixels": raw,
        }
        curves = {name: verification_roc(x, scored.labels) for name, x in embeddings.items()}
        roc_curves(curves, path=folder / "roc.png")
        return ["roc.png"]

    return Experiment(
        module=module,
        batches=ClassBalancedBatches(
            splits.train.images,
            splits.train.labels,
            options.batch_size // options.per_class,
            options.per_class,
            seed,
        ),
        scores=lambda module: metric_scores(extract_features(module, scored.images), scored.labels),
        headline="verification AUC",
        measured="Images whose nearest neighbour has their label; area under the ROC of pairs",
        data=f"{splits.name}, with labels",
        references={"raw pixels": metric_scores(raw, scored.labels)},
        figures=figures,
    )


@torch.no_grad()
def mean_distances(features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean squared distances of unit rows [N, D], over pairs of one label and of two.

    Dot products of all pairs sum to squared lengths of sums of rows, so no pair is visited.
    """
    unit = F.normalize(features, dim=1)
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = unit.new_zeros(len(counts), unit.shape[1]).index_add(0, place, unit)
    within, n = sums.square().sum(), len(unit)
    same = counts.square().sum()
    return {
        "positive_distance": 2 - 2 * (within - n) / (same - n),
        "negative_distance": 2 - 2 * (unit.sum(0).square().sum() - within) / (n * n - same),
    }


def metric_scores(features: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Recall@1 of each row [N, D] among the others, and the area under the verification ROC."""
    labels = labels.to(features.device)
    recall = retrieval_scores(features, query_ids=labels, ks=(1,))["recall@1"]
    return {"recall@1": recall, "verification AUC": verification_auc(features, labels)}

"""What the experiments of methods that learn from images have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcl.data.digits import DigitSplits, Split, load_digit_splits
from fastcl.data.views import RECIPES
from fastcl.encoders import SmallCNN
from fastcl.evaluation import figures
from fastcl.evaluation.features import extract_features
from fastcl.evaluation.knn import knn_accuracy
from fastcl.evaluation.probe import linear_probe
from fastcl.trainers.callbacks import KNNMonitor, SimilaritySnapshots
from fastcl.trainers.methods.images import ImageOptions
from fastcl.trainers.options import UsageError, check_choice

LABELS_PER_CLASS: tuple[int | None, ...] = (1, 5, 10, None)
MEASURED = "Images classified right: nearest neighbours; linear probe of n labels per class"
DATA = "handwritten digits of scikit-learn, without their labels"
_SHOWN = 8


def load(options: ImageOptions, seed: int) -> DigitSplits:
    """The images that ``options`` name, divided by ``seed``.

    Raises:
        UsageError: augmentations that do not fit the images.
    """
    check_choice("recipe", options.recipe, tuple(RECIPES))
    if options.recipe == "simclr":
        raise UsageError(
            "recipe: 'simclr' jitters colour and the digits are grey; expected 'digits'"
        )
    return load_digit_splits(seed)


def build_encoder(options: ImageOptions) -> SmallCNN:
    """The encoder that ``options`` describe, with fresh parameters."""
    encoder = SmallCNN(in_channels=1, width=options.width)
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub
    return encoder


def knn_monitor(splits: DigitSplits, options: ImageOptions) -> KNNMonitor:
    """The monitor of validation images among training images."""
    return KNNMonitor(splits.train, splits.validation, options.knn_every, options.knn_neighbours)


def image_scores(
    encoder: nn.Module, splits: DigitSplits, options: ImageOptions, seed: int
) -> dict[str, float]:
    """Accuracy of kNN and of linear probes on frozen features, in [0, 1].

    "probe@n" has n labels per class; the kNN and "probe@all" have those of every training image.
    """
    scored: Split = getattr(splits, options.report_on)
    train_features = extract_features(encoder, splits.train.images).cpu()
    scored_features = extract_features(encoder, scored.images).cpu()
    knn = knn_accuracy(
        scored_features, scored.labels, train_features, splits.train.labels,
        k=options.knn_neighbours,
    )  # fmt: skip
    return {"kNN": knn} | {
        f"probe@{count or 'all'}": linear_probe(
            train_features.numpy(),
            splits.train.labels.numpy(),
            scored_features.numpy(),
            scored.labels.numpy(),
            labels_per_class=count,
            draws=options.label_draws,
            seed=seed,
        )
        for count in LABELS_PER_CLASS
    }


def pixel_scores(splits: DigitSplits, options: ImageOptions, seed: int) -> dict[str, float]:
    """:func:`image_scores` of the pixels themselves."""
    return image_scores(nn.Flatten(), splits, options, seed)


class ViewPictures:
    """Two fixed views of eight classes' first validation images, and how alike a module finds them
    before, half-way and at the end.

    ``snapshots`` is the callback that measures; ``figures`` and ``details`` are an experiment's.
    """

    def __init__(self, views: nn.Module, split: Split, seed: int):
        classes = split.labels.unique()[:_SHOWN]
        firsts = [int((split.labels == label).nonzero()[0]) for label in classes]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.pair = views(split.images[firsts])
        self.names = [str(int(label)) for label in classes]
        self.snapshots = SimilaritySnapshots(*self.pair)

    def figures(self, module: nn.Module, folder: Path) -> list[str]:
        """Draw similarity.png and views.png."""
        matrices = self.snapshots.matrices
        figures.similarity_matrices(matrices, self.names, path=folder / "similarity.png")
        figures.view_grid(*self.pair, path=folder / "views.png")
        return ["similarity.png", "views.png"]

    def details(self, module: nn.Module) -> dict[str, Any]:
        """By epochs done, mean similarity of two views of an image minus that of two images."""
        matrices = self.snapshots.matrices
        gaps = {str(epochs): similarity_gap(matrix) for epochs, matrix in matrices.items()}
        return {"similarity_gap": gaps}


def similarity_gap(matrix: torch.Tensor) -> float:
    """Mean similarity of the two views of an image minus that of views of different images."""
    count = len(matrix)
    positive = matrix.diagonal(count // 2).mean()
    others = ~torch.eye(count, dtype=torch.bool)
    others &= ~torch.eye(count, dtype=torch.bool).roll(count // 2, dims=1)
    return (positive - matrix[others].mean()).item()

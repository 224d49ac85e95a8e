"""What the experiments of methods that learn from images have in common."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcl.data.digits import load_digit_splits
from fastcl.data.files import DATA_SETS, image_folder
from fastcl.data.splits import Split, Splits, unit_range
from fastcl.data.views import Augment, TwoViews
from fastcl.encoders import MNISTCNN, RESNETS, SmallCNN, projection_head
from fastcl.evaluation import figures
from fastcl.evaluation.features import calibrate_batch_norm, extract_features
from fastcl.evaluation.knn import knn_accuracy
from fastcl.evaluation.probe import linear_probe
from fastcl.trainers.callbacks import KNNMonitor, SimilaritySnapshots
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.images import ImageOptions
from fastcl.trainers.methods.metric import MetricOptions
from fastcl.trainers.options import UsageError

LABELS_PER_CLASS: tuple[int | None, ...] = (1, 5, 10, None)
MEASURED = "Images classified right: nearest neighbours; linear probe of n labels per class"
_SHOWN = 8
_CALIBRATION = 2048  # images are enough for statistics to start from


def load(options: ImageOptions | MetricOptions, seed: int) -> Splits:
    """The images that ``options`` name, divided by ``seed``.

    Raises:
        UsageError: their files are missing or damaged.
    """
    if options.data == "digits":
        return load_digit_splits(seed)
    root = Path(options.data_root)
    try:
        if options.data == "folder":
            return image_folder(root, seed, options.image_size)
        return DATA_SETS[options.data](root, seed)
    except FileNotFoundError as error:
        raise UsageError(
            f"data: {options.data} needs {error.filename}, which is absent ({error.strerror}); "
            "set --data_root to the folder that holds it"
        ) from error


def build_encoder(options: ImageOptions, in_channels: int) -> nn.Module:
    """The encoder that ``options`` describe, with fresh parameters.

    Raises:
        UsageError: an encoder for grey images and images of colour.
    """
    if options.encoder == "small_cnn":
        encoder: nn.Module = SmallCNN(in_channels, options.width)
    elif options.encoder == "mnist_cnn":
        if in_channels != 1:
            raise UsageError(f"encoder: mnist_cnn expects grey images, got {in_channels} channels")
        encoder = MNISTCNN()
    else:
        encoder = RESNETS[options.encoder](stem=options.stem, in_channels=in_channels)
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub


def build_head(options: ImageOptions, encoder: nn.Module) -> nn.Module:
    """The projection head that ``options`` describe, on top of ``encoder``."""
    width = encoder.feature_dim
    assert isinstance(width, int)
    return projection_head(
        options.head, width, options.out_features, hidden_features=options.hidden_features
    )


def build_parts(options: ImageOptions, splits: Splits, seed: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and head with their initial parameters, a function of ``options`` and ``seed``.

    Batch norm starts from the statistics of training images: training replaces them, but the
    untrained encoder of the comparison shall not be weak for lack of them.
    """
    torch.manual_seed(seed)
    encoder = build_encoder(options, splits.channels)
    head = build_head(options, encoder)
    calibrate(nn.Sequential(encoder, head), splits.train.images)
    return encoder, head


def calibrate(module: nn.Module, images: torch.Tensor) -> None:
    """Batch norm of ``module`` starts from the statistics of ``images``."""
    calibrate_batch_norm(module, unit_range(images[:_CALIBRATION]))


def views(options: ImageOptions, splits: Splits, kind: type[Augment] = TwoViews) -> Augment:
    """The augmentations that ``options`` name for these images."""
    without = [name.strip() for name in options.without.split(",") if name.strip()]
    return kind(options.recipe, splits.image_size, without)


def image_experiment(
    module: Any, options: ImageOptions, splits: Splits, seed: int, **others: Any
) -> Experiment:
    """An experiment judged by what ``module.encoder``'s frozen features are worth.

    Args:
        module: with an ``encoder``; those with ``views`` that give pairs get pictures of them.
        others: what else :class:`Experiment` takes; ``batches`` at least.
    """
    score = partial(image_scores, splits=splits, options=options, seed=seed)
    callbacks = [
        KNNMonitor(splits.train, splits.validation, options.knn_every, options.knn_neighbours)
    ]
    if isinstance(getattr(module, "views", None), TwoViews):
        pictures = ViewPictures(module.views, splits.validation, seed)
        callbacks.append(pictures.snapshots)  # type: ignore[arg-type]
        others = {"figures": pictures.figures, "details": pictures.details} | others
    return Experiment(
        **{
            "module": module,
            "scores": lambda trained: score(trained.encoder),
            "headline": "probe@1",
            "measured": MEASURED,
            "data": f"{splits.name}, without labels",
            "references": {"raw pixels": score(nn.Flatten())},
            "callbacks": callbacks,
        }
        | others
    )


def image_scores(
    encoder: nn.Module, splits: Splits, options: ImageOptions, seed: int
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
    fewest = int(splits.train.labels.bincount().min())
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
        if count is None or count <= fewest
    }


class ViewPictures:
    """Two fixed views of eight classes' first validation images, and how alike a module finds them
    before, half-way and at the end.

    ``snapshots`` is the callback that measures; ``figures`` and ``details`` are an experiment's.
    """

    def __init__(self, views: nn.Module, split: Split, seed: int):
        classes = split.labels.unique()[:_SHOWN]
        firsts = [int((split.labels == label).nonzero()[0]) for label in classes]
        with torch.random.fork_rng(devices=[]):
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

"""What every image data set is once it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Split:
    """Part of a data set: ``images`` [N, C, H, W], float32 in [0, 1] or uint8, ``labels`` [N]
    int64, and ``indices`` [N], the images' positions in the whole data set."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """Disjoint training, validation and test images; ``unlabelled`` [N, C, H, W] where the data set
    has more images without labels; ``classes`` by label; ``name`` for reports."""

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    name: str
    unlabelled: torch.Tensor | None = None

    @property
    def channels(self) -> int:
        """C of the images."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.train.images.shape[2], self.train.images.shape[3]

    @property
    def pretraining(self) -> torch.Tensor:
        """Images to learn from without labels: the unlabelled ones, else those of training."""
        return self.train.images if self.unlabelled is None else self.unlabelled


def divide(
    images: torch.Tensor, labels: torch.Tensor, held_out: int, seed: int, start: int = 0
) -> tuple[Split, Split]:
    """Training and ``held_out`` validation images, stratified by class as far as that goes.

    Args:
        images: [N, C, H, W].
        labels: [N].
        held_out: number of validation images.
        seed: of the division.
        start: index of the first image in the whole data set.
    """
    from sklearn.model_selection import train_test_split

    numbers = labels.numpy()
    stratify = numbers if np.bincount(numbers).min(initial=2) >= 2 else None
    if stratify is not None and held_out < len(np.unique(numbers)):
        stratify = None
    train, validation = train_test_split(
        np.arange(len(labels)), test_size=held_out, random_state=seed, stratify=stratify
    )

    def part(indices: np.ndarray) -> Split:
        return Split(images[indices], labels[indices], indices + start)

    return part(train), part(validation)


def unit_range(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1]: uint8 ones divided by 255 into float32, others as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images

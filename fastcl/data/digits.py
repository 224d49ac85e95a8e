"""Scikit-learn's handwritten digits: 1797 grey images of 8 x 8, ten classes, no download.

Discipline of the splits. The test images are the same for every seed: were they drawn anew for
each seed, the validation images of one seed would be test images of another, and a choice made
on validation would have seen the test set after all. Only the remaining pool is divided by seed
into training and validation images. Pretraining sees training images without labels; every
choice (augmentation strength, temperature, epochs, the probe's form) is made on validation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_IMAGES = 360
VALIDATION_IMAGES = 180
_TEST_SEED = 0


@dataclass(frozen=True)
class Split:
    """Part of a data set: ``images`` [N, 1, 8, 8] float32 in [0, 1], ``labels`` [N] int64, and
    ``indices`` [N], the images' positions in the whole data set."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DigitSplits:
    """Disjoint training (1257), validation (180) and test (360) images, stratified by class."""

    train: Split
    validation: Split
    test: Split


def load_digit_splits(seed: int) -> DigitSplits:
    """Load the digits; ``seed`` divides training from validation, the test images never change."""
    digits = load_digits()
    images = torch.from_numpy((digits.images / 16.0).astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))

    def part(indices: np.ndarray) -> Split:
        return Split(images[indices], labels[indices], indices)

    pool, test = train_test_split(
        np.arange(len(labels)),
        test_size=TEST_IMAGES,
        random_state=_TEST_SEED,
        stratify=digits.target,
    )
    train, validation = train_test_split(
        pool, test_size=VALIDATION_IMAGES, random_state=seed, stratify=digits.target[pool]
    )
    return DigitSplits(part(train), part(validation), part(test))

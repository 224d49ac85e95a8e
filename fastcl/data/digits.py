"""Scikit-learn's handwritten digits: 1797 grey images of 8 x 8, ten classes, no download.

Discipline of the splits. The test images are the same for every seed: were they drawn anew for
each seed, the validation images of one seed would be test images of another, and a choice made
on validation would have seen the test set after all. Only the remaining pool is divided by seed
into training and validation images. Pretraining sees training images without labels; every
choice (augmentation strength, temperature, epochs, the probe's form) is made on validation.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fastcl.data.splits import Split, Splits

TEST_IMAGES = 360
VALIDATION_IMAGES = 180
_TEST_SEED = 0


def load_digit_splits(seed: int) -> Splits:
    """Load the digits; ``seed`` divides training (1257) from validation (180), the 360 test images
    never change. All are stratified by class."""
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
    names = tuple(str(digit) for digit in range(10))
    return Splits(part(train), part(validation), part(test), names, "scikit-learn digits")

"""Sequences of digits that count upwards: what follows can be told from what came before.

The images are scikit-learn's (:mod:`fastcl.data.digits`); labels say which image may follow which
and are not seen by the method otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastcl.data.splits import Split

_CLASSES = 10


@dataclass(frozen=True)
class DigitSequences:
    """N sequences of T images.

    ``images`` [N, T, 1, 8, 8] float32 in [0, 1]; ``labels`` [N, T] int64, the digits shown;
    ``follows`` [N] bool, whether the sequence counts to its end or breaks off. Sequence i
    begins with the digit i mod 10.
    """

    images: torch.Tensor
    labels: torch.Tensor
    follows: torch.Tensor

    def __len__(self) -> int:
        return len(self.follows)


def digit_sequences(
    split: Split, count: int, seed: int, *, context: int, steps: int, broken: float = 0.0
) -> DigitSequences:
    """Sequences of ``context`` + ``steps`` images whose digits count up, 0 after 9.

    Args:
        split: the images to draw from; every digit must occur.
        count: N.
        seed: of the drawing.
        context, steps: images that are shown, and images that are to be predicted.
        broken: share of sequences whose last ``steps`` digits are drawn at random instead, so that
            at least one differs from what would follow.

    Raises:
        ValueError: ``count``, ``context`` or ``steps`` below 1, or ``broken`` outside [0, 1].
    """
    if min(count, context, steps) < 1 or not 0.0 <= broken <= 1.0:
        raise ValueError(
            "count, context, steps, broken: expected integers >= 1 and a share in [0, 1], "
            f"got {count}, {context}, {steps}, {broken}"
        )
    generator = np.random.default_rng(seed)
    labels = (np.arange(count)[:, None] + np.arange(context + steps)) % _CLASSES
    breaks = generator.permutation(count) < round(broken * count)
    drawn = generator.integers(0, _CLASSES, (count, steps))
    # a drawing that happens to count up is moved on by one
    drawn = (drawn + (drawn == labels[:, context:]).all(axis=1, keepdims=True)) % _CLASSES
    labels[breaks, context:] = drawn[breaks]
    chosen = np.empty_like(labels)
    for digit in range(_CLASSES):
        where = labels == digit
        chosen[where] = generator.choice(np.flatnonzero(split.labels.numpy() == digit), where.sum())
    return DigitSequences(
        split.images[torch.from_numpy(chosen)],
        torch.from_numpy(labels),
        torch.from_numpy(~breaks),
    )

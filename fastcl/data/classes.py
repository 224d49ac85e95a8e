"""Batches of a few classes with equally many samples each, for losses that need positives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastcl.data.batches import rank_of_ranks


class ClassBalancedBatches:
    """Batches of P classes x K samples (FaceNet's sampler), in an order of (seed, epoch) only.

    Rows are sorted by class: rows [p K, (p + 1) K) have one label, and no two of a batch are the
    same sample. Every batch draws its classes without replacement and takes the next K samples of
    each from a shuffled round of that class. In a process group every rank yields its own classes
    of each batch.

    Args:
        data: [N, ...].
        labels: [N] integers.
        classes: P, at most the number of classes, over all ranks.
        per_class: K, at most the size of the smallest class.
        seed: of the drawing.

    Raises:
        ValueError: ``classes`` or ``per_class`` out of range, or labels that do not fit.

    Yields:
        (data [P K, ...], labels [P K]), N // (P K) times.
    """

    def __init__(
        self, data: torch.Tensor, labels: torch.Tensor, classes: int, per_class: int, seed: int
    ):
        if labels.shape != data.shape[:1]:
            raise ValueError(
                f"labels: expected shape [{len(data)}], one per sample, got {list(labels.shape)}"
            )
        self.members = [np.flatnonzero(labels.numpy() == label) for label in labels.unique()]
        fewest = min(len(member) for member in self.members)
        if not 2 <= classes <= len(self.members):
            raise ValueError(f"classes: expected from 2 to {len(self.members)}, got {classes}")
        if not 2 <= per_class <= fewest:
            raise ValueError(
                f"per_class: expected from 2 to {fewest} (samples of the rarest class), "
                f"got {per_class}"
            )
        self.data = data
        self.labels = labels
        self.classes = classes
        self.per_class = per_class
        self.seed = seed
        self.epoch = 0

    @property
    def sampler(self) -> ClassBalancedBatches:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels) // (self.classes * self.per_class)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        rank, ranks = rank_of_ranks()
        rounds = [np.empty(0, dtype=int) for _ in self.members]
        for _ in range(len(self)):
            chosen = []
            for label in generator.choice(len(self.members), self.classes, replace=False):
                if len(rounds[label]) < self.per_class:  # the rest of a round is left out
                    rounds[label] = generator.permutation(self.members[label])
                taken, rounds[label] = np.split(rounds[label], [self.per_class])
                chosen.append(taken)
            rows = torch.from_numpy(np.concatenate(chosen[rank::ranks]))
            yield self.data[rows], self.labels[rows]

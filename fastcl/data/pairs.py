"""Labelled pairs of samples, half of them of one class, for losses of pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastcl.data.batches import rank_of_ranks


def draw_pairs(
    labels: torch.Tensor, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pair for every sample: with another of its class for one half, of another class else.

    Args:
        labels: [N] integers, two or more samples of each of two or more classes.
        generator: what draws.

    Returns:
        (first [N], second [N], similar [N]): rows in random order, each once as the first of a
        pair, and whether a pair is of one class.

    Raises:
        ValueError: a class of one sample, or a single class.
    """
    numbers = labels.numpy()
    classes, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        raise ValueError(
            "labels: expected two or more samples of each of two or more classes, "
            f"got {len(classes)} classes, the rarest with {counts.min(initial=len(numbers))}"
        )
    # by class; a partner is some steps further on the ring of the own class, or of all others
    ring = np.argsort(numbers, kind="stable")
    position = np.empty_like(ring)
    position[ring] = np.arange(len(ring))
    first = generator.permutation(len(numbers))
    similar = np.arange(len(first)) < len(first) // 2
    count = counts[place[first]]
    start = (np.cumsum(counts) - counts)[place[first]]
    own = (position[first] - start + generator.integers(1, count)) % count
    other = count + generator.integers(len(ring) - count)
    second = ring[(start + np.where(similar, own, other)) % len(ring)]
    mixed = generator.permutation(len(first))
    return tuple(torch.from_numpy(part[mixed]) for part in (first, second, similar))  # type: ignore[return-value]


class PairBatches:
    """Batches of labelled pairs, drawn by :func:`draw_pairs` in an order of (seed, epoch) only.

    Every epoch pairs every sample anew. The incomplete last batch is dropped. In a process group
    every rank yields its own part of each batch.

    Args:
        data: [N, ...].
        labels: [N] integers.
        batch_size: B pairs, at most N, over all ranks.
        seed: of the drawing.

    Raises:
        ValueError: ``batch_size`` out of range, or labels that do not fit.

    Yields:
        (first [B, ...], second [B, ...], similar [B] bools), N // B times.
    """

    def __init__(self, data: torch.Tensor, labels: torch.Tensor, batch_size: int, seed: int):
        if labels.shape != data.shape[:1]:
            raise ValueError(
                f"labels: expected shape [{len(data)}], one per sample, got {list(labels.shape)}"
            )
        if not 1 <= batch_size <= len(data):
            raise ValueError(
                f"batch_size: expected from 1 to {len(data)} (the number of training samples), "
                f"got {batch_size}"
            )
        draw_pairs(labels, np.random.default_rng(seed))  # refuses labels before anything is trained
        self.data = data
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    @property
    def sampler(self) -> PairBatches:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        parts = draw_pairs(self.labels, np.random.default_rng((self.seed, self.epoch)))
        rank, ranks = rank_of_ranks()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            first, second, similar = (
                part[start : start + self.batch_size][rank::ranks] for part in parts
            )
            yield self.data[first], self.data[second], similar

"""Batches of data held in memory, in an order that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


class EpochShuffledBatches:
    """Batches [B, ...] of tensors held in memory, in an order that depends on (seed, epoch) only.

    A data loader that fetches single samples costs more than a training step on samples this
    small. Because the order is a function of the epoch, a resumed run meets the same batches as
    one that was never interrupted. The incomplete last batch is dropped: the number of
    negatives, and with it the loss, would differ there. In a process group every rank yields its
    own part of each batch.

    Args:
        data: [N, ...], or several such tensors (images, labels, indices), which give batches that
            are tuples.
        batch_size: B, at most N, over all ranks.
        seed: of the shuffling.

    Raises:
        ValueError: ``batch_size`` is below 2 (no negatives) or above N; tensors of unequal length.
    """

    def __init__(self, data: torch.Tensor | tuple[torch.Tensor, ...], batch_size: int, seed: int):
        self.data = data
        lengths = [len(part) for part in data] if isinstance(data, tuple) else [len(data)]
        if len(set(lengths)) > 1:
            raise ValueError(f"data: expected tensors of one length, got {lengths}")
        self.length = lengths[0]
        if not 2 <= batch_size <= self.length:
            raise ValueError(
                f"batch_size: expected from 2 to {self.length} (the number of training samples), "
                f"got {batch_size}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    @property
    def sampler(self) -> EpochShuffledBatches:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[torch.Tensor | tuple[torch.Tensor, ...]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        rank, ranks = rank_of_ranks()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = torch.from_numpy(order[start : start + self.batch_size][rank::ranks])
            if isinstance(self.data, tuple):
                yield tuple(part[chosen] for part in self.data)
            else:
                yield self.data[chosen]


def rank_of_ranks() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) outside a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()

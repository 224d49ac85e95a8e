"""Negatives that outlive their batch: queue, memory bank, and the encoder that fills them."""

from .bank import MemoryBank
from .batchnorm import Shuffle, SplitBatchNorm, shuffle_batch, split_batch_norm
from .momentum import MomentumEncoder, cosine_momentum, update_momentum
from .queue import NegativeQueue

__all__ = [
    "MemoryBank",
    "MomentumEncoder",
    "NegativeQueue",
    "Shuffle",
    "SplitBatchNorm",
    "cosine_momentum",
    "shuffle_batch",
    "split_batch_norm",
    "update_momentum",
]

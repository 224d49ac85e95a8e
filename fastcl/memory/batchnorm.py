"""Keeping batch statistics from betraying the positive (He et al. 2020, section 3.3).

Queries and keys of one sample must not be normalised with statistics of the same group of
samples. Across ranks the keys' batch is shuffled; on one device, where a permutation alone changes
nothing, statistics are split over groups as if there were several.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed import rows_of
from .store import check_size


class Shuffle(NamedTuple):
    """A permutation of the samples of all ranks, as :func:`shuffle_batch` drew it."""

    order: Tensor  # [N] position in the shuffled batch -> sample
    rows: Any  # whose they are: a fastcl.distributed.rows.Rows, or None on one rank

    def restore(self, x: Tensor) -> Tensor:
        """Rows [n, ...] made from the shuffled samples, back in the samples' own order."""
        return _permuted(x, torch.argsort(self.order), self.rows)


@torch.no_grad()
def shuffle_batch(x: Tensor, *, group=None) -> tuple[Tensor, Shuffle]:
    """ShuffleBN: exchange the samples of all ranks at random; a permutation on one rank alone.

        shuffled, shuffle = shuffle_batch(images)
        keys = shuffle.restore(keys_of(shuffled))

    Undifferentiated, as keys are. Each rank keeps its number of samples, unequal ones included.
    Rank 0 draws from the CPU's generator, so a run that restores its generators repeats.

    Args:
        x: [n, ...].
        group: process group; ``None`` for the default one.
    """
    rows = rows_of(group, x, "a shuffle", shape=list(x.shape[1:]), dtype=x.dtype)
    n = len(x) if rows is None else sum(rows.sizes)
    first = rows is None or rows.group.rank == 0
    order = (torch.randperm(n) if first else torch.zeros(n, dtype=torch.int64)).to(x.device)
    if rows is not None:
        order = rows.group.all_reduce(order, rows.operation)
    return _permuted(x, order, rows), Shuffle(order, rows)


def _permuted(x: Tensor, order: Tensor, rows) -> Tensor:
    return x[order] if rows is None else rows.gather(x)[order[rows.own]]


class SplitBatchNorm(_BatchNorm):
    """Batch normalisation whose training statistics are those of ``splits`` groups of samples.

    Sample i belongs to group i mod ``splits``; running statistics take the groups' mean. In
    evaluation mode it is the ordinary layer, whose keys in ``state_dict`` it shares. For inputs
    [N, C, ...] with N a multiple of ``splits``.

    Raises:
        ValueError: in training, a batch that does not divide.
    """

    def __init__(self, num_features: int, splits: int, **options):
        super().__init__(num_features, **options)
        self.splits = check_size(splits, "splits")

    def _check_input_dim(self, input):
        if input.dim() < 2:
            raise ValueError(f"expected [N, C, ...] input, got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.splits == 1:
            return super().forward(input)
        self._check_input_dim(input)
        n, c, *rest = input.shape
        if n % self.splits:
            raise ValueError(f"batch is {n}; expected a multiple of splits = {self.splits}")

        def repeated(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat(self.splits)

        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        mean, variance = repeated(self.running_mean), repeated(self.running_var)
        output = F.batch_norm(
            input.reshape(n // self.splits, self.splits * c, *rest), mean, variance,
            repeated(self.weight), repeated(self.bias), True, momentum or 0.0, self.eps,
        )  # fmt: skip
        with torch.no_grad():
            for own, split in ((self.running_mean, mean), (self.running_var, variance)):
                if own is not None and split is not None:
                    own.copy_(split.view(self.splits, c).mean(0))
        return output.view(input.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}"


def split_batch_norm(module: nn.Module, splits: int) -> nn.Module:
    """Replace every BatchNorm1d, 2d and 3d layer by a :class:`SplitBatchNorm`, state kept.

    Returns:
        ``module``, changed in place, or the new layer where ``module`` is one.
    """
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        layer = SplitBatchNorm(
            module.num_features, splits, eps=module.eps, momentum=module.momentum,
            affine=module.affine, track_running_stats=module.track_running_stats,
        )  # fmt: skip
        layer._parameters, layer._buffers = module._parameters, module._buffers
        layer.training = module.training
        return layer
    for name, child in module.named_children():
        setattr(module, name, split_batch_norm(child, splits))
    return module

"""Reductions over the keys of all ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import LogSumExp
from ..ops.pair_sums import pair_count, pair_sums
from . import Ranks
from .group import Group
from .sweeps import spread_logsumexp, spread_pair_sums, spread_sum
from .transport import TRANSPORTS


class SharedRanks(Ranks):
    """Reductions over the keys of all ranks of a group."""

    def __init__(self, group: Group, mode: str, sizes: list[int]):
        self.group = group
        self.sizes = sizes
        self.start = sum(sizes[: group.rank])
        self.transport = TRANSPORTS[mode](group, sizes)

    @torch.compiler.disable
    def logsumexp(
        self, queries, keys, scale, *, pairs, columns=False, maxima=False, precision
    ) -> LogSumExp:
        return spread_logsumexp(
            self.transport, queries, keys, scale, pairs, columns, maxima, precision
        )

    @torch.compiler.disable
    def sum(self, queries, keys, scale, *, phi, row_bias, pairs, precision) -> Tensor:
        return spread_sum(self.transport, queries, keys, scale, phi, row_bias, pairs, precision)

    @torch.compiler.disable
    def pair_sums(self, queries, keys, pairs):
        if pairs.relation == "any":  # offsets only concern a rank's own keys
            sums, _ = pair_sums(queries, keys, pairs)
            mine = keys.sum(0)
            elsewhere = _AllReduce.apply(mine, self.group) - mine
            return sums + queries @ elsewhere, self.pair_count(queries, len(keys), pairs)
        return spread_pair_sums(self.transport, queries, keys, pairs)

    @torch.compiler.disable
    def pair_count(self, queries, m, pairs):
        if pairs.relation == "any":  # offsets only concern a rank's own keys
            return pair_count(queries, m, pairs) + (sum(self.sizes) - m)
        return spread_pair_sums(
            self.transport, queries.detach()[:, :1], queries.new_zeros(m, 1), pairs
        )[1]

    @torch.compiler.disable
    def relative_softmax(self, x):
        x = x.detach()
        mine = torch.stack([torch.logsumexp(x, 0), x.new_tensor(len(x))])
        sums, batches = (
            self.group.all_gather(mine, "all-gather of a normaliser").wait()[0].unbind(1)
        )
        return torch.exp(x - torch.logsumexp(sums, 0)) * batches.sum()

    @torch.compiler.disable
    def totals(self, *values):
        return _Total.apply(torch.stack(values), self.group)


class _AllReduce(torch.autograd.Function):
    """A sum over ranks that each rank uses in its own way."""

    @staticmethod
    def forward(ctx, x, group: Group):
        ctx.group = group
        return group.all_reduce(x, "all-reduce of a sum over keys")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.group.all_reduce(grad, "all-reduce of a sum's gradient"), None


class _Total(torch.autograd.Function):
    """A sum over ranks that becomes the loss, of which every rank holds a copy.

    Their gradients are equal, so the sum of them, which is what differentiating all copies at once
    gives, needs no exchange.
    """

    @staticmethod
    def forward(ctx, x, group: Group):
        ctx.copies = group.size
        return group.all_reduce(x, "all-reduce of the loss")

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.copies, None


@torch.compiler.disable
def share(mode: str, group: Group, keys: Tensor, facts: dict[str, Any]) -> Ranks:
    """The ranks of ``group``, once they agree; see :func:`~fastcl.distributed.meet`.

    Raises:
        ValueError: the ranks disagree.
    """
    own = {"width": keys.shape[1], "dtype": keys.dtype, "gradient of keys": keys.requires_grad}
    sizes = group.agree(len(keys), keys.device, f"a {mode!r} loss", own | facts)
    return SharedRanks(group, mode, sizes)

"""Rows of all ranks as one batch, rank after rank, whatever number each holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from .group import Group, padded


class Rows:
    """Which rows of the batch of all ranks are whose.

    Args:
        group: the ranks; all of them come.
        like: [n, ...], this rank's rows.
        operation: what for, in the words of an error.
        facts: see :meth:`Group.agree`.

    Raises:
        ValueError: the ranks disagree.
        RuntimeError: a rank that ended or does not answer.
    """

    @torch.compiler.disable
    def __init__(self, group: Group, like: Tensor, operation: str, **facts: Any):
        self.group = group
        self.operation = operation
        self.sizes = group.agree(len(like), like.device, operation, facts)
        begin = sum(self.sizes[: group.rank])
        self.own = slice(begin, begin + len(like))

    @torch.compiler.disable
    def gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks [N, ...]; undifferentiated."""
        whole = padded(x.detach(), max(self.sizes))
        parts = self.group.all_gather(whole, self.operation).wait()[0]
        return torch.cat([part[:n] for part, n in zip(parts, self.sizes, strict=True)])

    @torch.compiler.disable
    def spread(self, x: Tensor) -> Tensor:
        """:meth:`gather` with the gradient: the sum over ranks, each its own rows."""
        return _Spread.apply(x, self)

    @torch.compiler.disable
    def collect(self, values: Tensor) -> Tensor:
        """Of every rank's numbers for all rows [N], those for this rank's: [W, n]."""
        return _Collect.apply(values, self)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows: Rows):
        ctx.rows = rows
        return rows.gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows: Rows = ctx.rows
        parts = pad_sequence(list(grad.split(rows.sizes)), batch_first=True)
        mine = rows.group.reduce_scatter(parts, f"gradient of {rows.operation}")
        return mine[: rows.sizes[rows.group.rank]], None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, rows: Rows):
        ctx.rows = rows
        group, sizes = rows.group, rows.sizes
        mine = [sizes[group.rank]] * group.size
        return torch.stack(group.all_to_all(list(values.split(sizes)), mine, rows.operation))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows: Rows = ctx.rows
        operation = f"gradient of {rows.operation}"
        return torch.cat(rows.group.all_to_all(list(grad), rows.sizes, operation)), None

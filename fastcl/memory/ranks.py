"""What a queue needs of torch.distributed: rows of all ranks, whatever number each holds."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def rank_and_size(group) -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def row_counts(n: int, like: Tensor, group) -> list[int]:
    """The number of rows of each rank."""
    _, size = rank_and_size(group)
    counts = torch.empty(size, dtype=torch.int64, device=like.device)
    own = torch.tensor([n], device=like.device)
    dist.all_gather(list(counts.split(1)), own, group=group)
    return counts.tolist()


def gather_rows(x: Tensor, counts: list[int], group) -> Tensor:
    """The rows of all ranks, rank after rank; undifferentiated."""
    longest = max(counts)
    padded = x.detach().contiguous()
    if x.shape[0] < longest:
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


def own_rows(counts: list[int], group) -> slice:
    """Where this rank's rows lie among the gathered ones."""
    rank, _ = rank_and_size(group)
    begin = sum(counts[:rank])
    return slice(begin, begin + counts[rank])


class GatherRows(torch.autograd.Function):
    """:func:`gather_rows` with the gradient: the sum over ranks, each its own rows."""

    @staticmethod
    def forward(ctx, x, counts, group):
        ctx.static = (counts, group)
        return gather_rows(x, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        counts, group = ctx.static
        total = grad.contiguous()
        dist.all_reduce(total, group=group)
        return total[own_rows(counts, group)], None, None


class ExchangeParts(torch.autograd.Function):
    """Every rank's numbers for all rows [N] become all ranks' numbers for the own rows [W, n]."""

    @staticmethod
    def forward(ctx, values, counts, group):
        ctx.static = (counts, group)
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in counts]
        dist.all_gather(parts, values, group=group)
        return torch.stack(parts)[:, own_rows(counts, group)].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        counts, group = ctx.static
        rank, _ = rank_and_size(group)
        return gather_rows(grad.t(), counts, group)[:, rank].contiguous(), None, None

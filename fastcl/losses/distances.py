"""Distances between aligned rows, and sweeps over all pairs for what no operator reduces.

Losses that need the order of distances (every triplet, say) take them for a few anchors at a time:
O(N) memory for a fixed block, recomputed for the backward. These blocks are float64 where the
device has it, so that neither the expansion |a|^2 + |b|^2 - 2ab nor prefix sums cancel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .inputs import check_choice, is_transformed

DISTANCES = ("squared", "euclidean")
# Numbers in a block, of which about ten arrays exist at a time. On a CPU they
# should stay in cache; accelerators want few launches.
_BLOCK = {"cpu": 2**17}
_BLOCK_ELSEWHERE = 2**22


def root(squares: Tensor) -> Tensor:
    """Square root with gradient 0 at 0."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def row_distance(a: Tensor, b: Tensor, distance: str) -> Tensor:
    """Distance of each row of ``a`` [..., D] from that of ``b``, from their difference."""
    squares = (a - b).square().sum(-1)
    return squares if distance == "squared" else root(squares)


def check_distance(distance) -> None:
    """One of :data:`DISTANCES`.

    Raises:
        ValueError: it is not.
    """
    check_choice(distance, "distance", DISTANCES)


def widened(rows: Tensor) -> Tensor:
    """Rows in float64, or in float32 on the one device that lacks it."""
    return rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)


def block_distances(rows: Tensor, block: range, distance: str) -> Tensor:
    """Distances [len(block), N] of the rows of a block from all ``rows`` [N, D]."""
    part = rows[block.start : block.stop]
    squares = torch.addmm(rows.square().sum(1), part, rows.mT, alpha=-2.0)
    squares = (squares + part.square().sum(1, keepdim=True)).clamp_min(0.0)
    return squares if distance == "squared" else root(squares)


def block_same(labels: Tensor, block: range) -> tuple[Tensor, Tensor]:
    """Which pairs [len(block), N] have equal labels, and which of them are not a row and itself."""
    index = torch.arange(labels.shape[0], device=labels.device)
    part = slice(block.start, block.stop)
    same = labels[part, None] == labels
    return same, same & (index[part, None] != index)


def masked_logsumexp(scores: Tensor, keep: Tensor) -> Tensor:
    """Log-sum-exp of each row's kept scores; -inf with zero gradient where there are none."""
    empty = ~keep.any(1)
    safe = torch.where(empty[:, None], 0.0, torch.where(keep, scores, float("-inf")))
    return torch.where(empty, float("-inf"), torch.logsumexp(safe, 1))


def by_blocks(
    function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, columns: int | None = None
) -> tuple[Tensor, ...]:
    """Per-row results of ``function(block, *inputs)`` over blocks of the N rows of the first input.

    A block has ``columns`` columns, N by default. What it holds is dropped after it and computed
    again for the backward, unless one block is all there is. Second derivatives take N x N memory.
    """
    n = inputs[0].shape[0]
    size = max(1, _BLOCK.get(inputs[0].device.type, _BLOCK_ELSEWHERE) // (columns or n))
    if size >= n:
        return function(range(n), *inputs)
    blocks = [range(i, min(i + size, n)) for i in range(0, n, size)]
    if torch.compiler.is_compiling():
        # Dynamo traces no backward that itself differentiates. (In eager mode the graph of
        # checkpoints pins freed blocks, many times the memory that is alive.)
        parts = [
            checkpoint(function, block, *inputs, use_reentrant=False, preserve_rng_state=False)
            for block in blocks
        ]
    elif is_transformed():  # torch.func differentiates in its own way, and keeps every block
        parts = [function(block, *inputs) for block in blocks]
    else:
        return _Blocks.apply(function, blocks, *inputs)
    return tuple(torch.cat(several) for several in zip(*parts, strict=True))


class _Blocks(torch.autograd.Function):
    """A function of blocks of rows that keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx, function, blocks, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.static = function, blocks
        ctx.set_materialize_grads(False)
        results: list[Tensor] = []
        for block in blocks:
            parts = function(block, *inputs)
            if not results:
                results = [part.new_empty(inputs[0].shape[0]) for part in parts]
            for result, part in zip(results, parts, strict=True):
                result[block.start : block.stop] = part
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        function, blocks = ctx.static
        again = torch.is_grad_enabled()  # for second derivatives
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        inputs = ctx.saved_tensors
        if not again:
            inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        totals: list = [None] * len(inputs)
        for block in blocks:
            with torch.enable_grad():
                parts = function(block, *inputs)
            pairs = [
                (part, grad[block.start : block.stop])
                for part, grad in zip(parts, grads, strict=True)
                if grad is not None and part.requires_grad
            ]
            if not pairs:
                continue
            found = torch.autograd.grad(
                [part for part, _ in pairs], [inputs[i] for i in wanted], [g for _, g in pairs],
                create_graph=again, allow_unused=True,
            )  # fmt: skip
            for i, one in zip(wanted, found, strict=True):
                if one is not None:
                    totals[i] = one if totals[i] is None else totals[i] + one
        return None, None, *totals

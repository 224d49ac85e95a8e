"""The reductions over similarity tiles when the keys are spread over ranks.

A rank holds some queries and a shard of the keys. Each block (my queries, one shard) is a problem
for the ordinary operators; blocks are merged by logaddexp or addition. A gradient is another
sweep, in which the operators' backward takes the log-sum-exps of the *whole* problem in place of
the block's own: w_ij = g_i exp(s_ij - row_i) + h_j exp(s_ij - column_j), so no block needs to know
of another.

All of it is differentiated as a function on all ranks at once: what keys collect abroad is summed
at their owner. Positives and the rows themselves are skipped by offsets, which only concern a
rank's own shard; ids travel with the keys they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import LogSumExp, Pairs, similarity_logsumexp, similarity_sum
from ..ops.checks import as_scalar, as_vector
from ..ops.pair_sums import pair_sums
from ..ops.registry import accumulator
from .transport import Transport, add


@dataclass
class _Block:
    """My queries (or some of them) against the keys (or some of them) of one visit."""

    queries: Tensor
    keys: Tensor | None  # None: the queries themselves
    pairs: Pairs
    rows: slice  # which of my queries
    columns: slice  # which of the visited keys


@dataclass
class _Reduction:
    """A reduction in blocks. Results are packs [N, c], a row per query (or key), of which the
    first column is differentiable."""

    pairs: Pairs
    precision: torch.dtype
    symmetric: bool = False  # the keys are the queries, and each pair counts for both
    columns: bool = False  # keys receive results of their own

    empty = 0.0  # what a pack holds where there is nothing to reduce

    @property
    def travelling_dtype(self) -> torch.dtype:
        """Keys travel as the products read them: in 16 bits where those are formed in 16."""
        return self.precision

    @property
    def width(self) -> int:
        """Columns of a pack."""
        return 1

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Two packs of the same queries."""
        return a + b

    def reduce(self, block: _Block, parameters: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Packs of the block's queries and, where they receive any, of its keys."""
        raise NotImplementedError

    def gradients(
        self, block: _Block, parameters, needs: list[bool], rows, grad_rows, columns, grad_columns
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Gradients of the block's queries, keys and the parameters, from the whole problem's
        results and their gradients."""
        raise NotImplementedError


@dataclass
class _LogSumExp(_Reduction):
    """Log-sum-exp and, if ``maxima``, the largest score."""

    maxima: bool = False

    empty = float("-inf")

    @property
    def width(self) -> int:
        return 2 if self.maxima else 1

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        sums = torch.logaddexp(a[:, :1], b[:, :1])
        return torch.cat([sums, torch.maximum(a[:, 1:], b[:, 1:])], 1)

    def reduce(self, block, parameters):
        both = self.columns or (self.symmetric and block.keys is not None)
        result = similarity_logsumexp(
            block.queries, block.keys, *parameters, pairs=block.pairs, columns=both,
            maxima=self.maxima, precision=self.precision,
        )  # fmt: skip
        columns = self.pack(result.columns, result.column_max) if both else None
        return self.pack(result.rows, result.row_max), columns

    def pack(self, sums: Tensor, largest: Tensor) -> Tensor:
        return torch.stack([sums, largest] if self.maxima else [sums], 1)

    def gradients(self, block, parameters, needs, rows, grad_rows, columns, grad_columns):
        none = rows.new_empty(0)
        queries, keys, scale = torch.ops.fastcl.similarity_logsumexp_backward(
            grad_rows, grad_columns, block.queries, block.keys, *parameters, None,
            *_rule(block), rows, none if columns is None else columns, none,
            rows.new_full((), float("nan")),  # no exponentials were kept
            "nothing", [*needs, False], self.precision,
        )[:3]  # fmt: skip
        return queries, keys, [scale]


@dataclass
class _MeanKeys(_LogSumExp):
    """Log-sum-exp over keys without a gradient: packs end in the keys' softmax-weighted mean [D],
    which is the gradient, so that the backward sweeps nothing."""

    dim: int = 0

    @property
    def width(self) -> int:
        return super().width + self.dim

    def merge(self, a, b):
        c = super().width
        merged = super().merge(a[:, :c], b[:, :c])
        sums = torch.where(torch.isneginf(merged[:, :1]), 0.0, merged[:, :1])
        means = [
            torch.where(torch.isneginf(x[:, :1]), 0.0, torch.exp(x[:, :1] - sums) * x[:, c:])
            for x in (a, b)
        ]
        return torch.cat([merged, means[0] + means[1]], 1)

    def reduce(self, block, parameters):
        result = torch.ops.fastcl.similarity_logsumexp(
            block.queries, block.keys, *parameters, None, *_rule(block), False, self.maxima,
            "mean_keys", self.precision,
        )  # fmt: skip
        sums, _, largest, _, means, _ = result
        return torch.cat([self.pack(sums, largest), means], 1), None


@dataclass
class _Sum(_Reduction):
    """Sum of phi(score + row bias)."""

    phi: str = ""

    def reduce(self, block, parameters):
        scale, row_bias = parameters
        sums = similarity_sum(
            block.queries, block.keys, scale, phi=self.phi, row_bias=row_bias, pairs=block.pairs,
            precision=self.precision,
        )  # fmt: skip
        return sums[:, None], None

    def gradients(self, block, parameters, needs, rows, grad_rows, columns, grad_columns):
        scale, row_bias = parameters
        need_queries, need_keys, need_scale, need_bias = needs
        queries, keys, scale, _, row_bias = torch.ops.fastcl.similarity_sum_backward(
            grad_rows, block.queries, block.keys, scale, None, row_bias, *_rule(block), self.phi,
            [need_queries, need_keys, need_scale, False, need_bias], self.precision,
        )  # fmt: skip
        return queries, keys, [scale, row_bias]


@dataclass
class _PairSums(_Reduction):
    """Sum of cosines and number of pairs, see :func:`~fastcl.ops.pair_sums.pair_sums`."""

    @property
    def travelling_dtype(self) -> torch.dtype:
        return accumulator(self.precision)  # formed in full precision everywhere

    @property
    def width(self) -> int:
        return 2

    def reduce(self, block, parameters):
        return torch.stack(pair_sums(block.queries, block.keys, block.pairs), 1), None

    def gradients(self, block, parameters, needs, rows, grad_rows, columns, grad_columns):
        with torch.enable_grad():
            queries, keys = (x.detach().requires_grad_() for x in (block.queries, block.keys))
            sums, _ = pair_sums(queries, keys, block.pairs)
        return (*torch.autograd.grad(sums, (queries, keys), grad_rows), [])


def _rule(block: _Block) -> tuple:
    n = block.queries.shape[0]
    ids = block.pairs.ids(n, n if block.keys is None else block.keys.shape[0])
    key_ids = None if block.keys is None else ids[1]
    return ids[0], key_ids, block.pairs.relation, list(block.pairs.skip)


class _Sweep(torch.autograd.Function):
    """One reduction over all ranks' keys, and its gradient."""

    @staticmethod
    def forward(ctx, reduction: _Reduction, transport: Transport, queries, keys, *parameters):
        shared = _Shared(reduction, transport, queries, keys)
        results = queries.new_full(
            (len(queries), reduction.width), reduction.empty, dtype=shared.acc
        )
        receives = reduction.symmetric or reduction.columns

        def visit(owners, shard, halved):
            block = shared.block(owners, shard, halved)
            given = None
            if receives and not (reduction.symmetric and block and block.keys is None):
                given = results.new_full((len(shard[0]), reduction.width), reduction.empty)
            if block is not None:
                rows, columns = reduction.reduce(block, list(parameters))
                results[block.rows] = reduction.merge(results[block.rows], rows)
                if given is not None:
                    given[block.columns] = columns
            return given

        merge = reduction.merge if receives else None
        kept: list = []
        home = transport.sweep(shared.shard(), visit, merge, reduction.symmetric, kept)
        columns = results.new_empty(0, reduction.width)
        if home is not None and reduction.symmetric:
            results = reduction.merge(results, home)
        elif home is not None:
            columns = home
        ctx.static = reduction, transport, kept
        ctx.save_for_backward(queries, keys, results, columns, *parameters)
        return results, columns

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_results, grad_columns):
        queries, keys, results, columns, *parameters = ctx.saved_tensors
        reduction, transport, kept = ctx.static
        if isinstance(reduction, _MeanKeys):
            weighted = results[:, reduction.width - reduction.dim :] * grad_results[:, :1]
            scale = parameters[0]
            return None, None, weighted * scale, None, (queries * weighted).sum()
        shared = _Shared(reduction, transport, queries, keys)
        needs = list(ctx.needs_input_grad[2:])
        rows, grad_rows = (x[:, 0].contiguous() for x in (results, grad_results))
        travelling = shared.shard()
        if reduction.symmetric:
            travelling += [rows, grad_rows]
            needs[1] = True
        elif reduction.columns:
            travelling += [x[:, 0].contiguous() for x in (columns, grad_columns)]
        count = len(shared.shard())
        grad_queries = torch.zeros_like(queries, dtype=shared.acc)
        grad_parameters = [torch.zeros_like(p) for p in parameters]

        def visit(owners, shard, halved):
            block = shared.block(owners, shard, halved)
            if block is None:
                return grad_queries.new_zeros(shard[0].shape) if needs[1] else None
            alone = reduction.symmetric and block.keys is None
            theirs: list = [x[block.columns] for x in shard[count:]] or [None, None]
            wanted = [needs[0], needs[1] and not alone, *needs[2:]]
            to_queries, to_keys, to_parameters = reduction.gradients(
                block, parameters, wanted, rows[block.rows], grad_rows[block.rows],
                *((None, None) if alone else theirs),
            )  # fmt: skip
            if needs[0]:
                grad_queries[block.rows] += to_queries
            for total, part, needed in zip(grad_parameters, to_parameters, needs[2:], strict=True):
                if needed:
                    total += part
            if not needs[1] or alone:
                return None
            if len(to_keys) < len(shard[0]):  # half of a shared block
                whole = to_keys.new_zeros(shard[0].shape)
                whole[block.columns] = to_keys
                return whole
            return to_keys

        merge = add if needs[1] else None
        home = transport.sweep(travelling, visit, merge, reduction.symmetric, kept)
        if reduction.symmetric:
            grad_queries, home = grad_queries + home, None
        gradients = [grad_queries, home, *grad_parameters]
        return (None, None, *(g if n else None for g, n in zip(gradients, needs, strict=True)))


class _Shared:
    """A problem spread over ranks: what this one holds, and the blocks it meets."""

    def __init__(self, reduction: _Reduction, transport: Transport, queries, keys):
        self.reduction, self.transport = reduction, transport
        self.queries, self.keys = queries, queries if keys is None else keys
        self.acc = accumulator(reduction.precision)
        self.query_ids, self.key_ids = reduction.pairs.ids(len(self.queries), len(self.keys))

    def shard(self) -> list[Tensor]:
        """This rank's keys and their ids, as they travel."""
        dtype = self.reduction.travelling_dtype
        keys = self.keys.to(dtype if dtype.itemsize == 2 else self.acc)
        return [keys] if self.key_ids is None else [keys, self.key_ids]

    def block(self, owners: list[int], shard: list[Tensor], halved: bool) -> _Block | None:
        """What to compute on a visit; ``None`` where the other side computes everything."""
        transport, pairs = self.transport, self.reduction.pairs
        rank = transport.group.rank
        own = owners == [rank]
        rows = columns = slice(None)
        if halved:  # the lower rank takes its first half against all of the higher's
            lower = min(rank, owners[0])
            cut = (transport.sizes[lower] + 1) // 2
            rows, columns = (slice(0, cut), columns) if rank == lower else (rows, slice(cut, None))
        queries, keys = self.queries[rows], shard[0][columns]
        if not len(queries) or not len(keys):
            return None
        ids = None if self.query_ids is None else self.query_ids[rows]
        if own and self.reduction.symmetric:
            return _Block(
                queries, None, Pairs(pairs.relation, ids, None, pairs.skip), rows, columns
            )
        key_ids = None if self.key_ids is None else shard[1][columns]
        if own:
            keys = self.keys
        rule = Pairs(pairs.relation, ids, key_ids, pairs.skip if own else ())
        return _Block(queries, keys, rule, rows, columns)


def _learns(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def spread_logsumexp(
    transport: Transport, queries, keys, scale, pairs: Pairs, columns: bool, maxima: bool, precision
) -> LogSumExp:
    """:func:`~fastcl.ops.similarity_logsumexp` over the keys of all ranks; ``keys`` of ``None``
    for the queries themselves, which must be a symmetric problem."""
    scale = as_scalar(scale, "scale", queries, precision)
    reduction: _LogSumExp
    if keys is None or columns or keys.requires_grad or not _learns(queries, scale):
        reduction = _LogSumExp(
            pairs, precision, symmetric=keys is None, columns=columns and keys is not None,
            maxima=maxima,
        )  # fmt: skip
    else:
        reduction = _MeanKeys(pairs, precision, maxima=maxima, dim=keys.shape[1])
    rows, both = _Sweep.apply(reduction, transport, queries, keys, scale)
    if keys is None and columns:
        both = rows
    none = rows.new_empty(0)
    largest = (rows[:, 1].detach(), both[:, 1].detach()) if maxima else (none, none)
    return LogSumExp(rows[:, 0], both[:, 0], *largest)


def spread_sum(transport: Transport, queries, keys, scale, phi, row_bias, pairs, precision):
    """:func:`~fastcl.ops.similarity_sum` over the keys of all ranks."""
    scale = as_scalar(scale, "scale", queries, precision)
    row_bias = as_vector(row_bias, "row_bias", len(queries), queries, precision)
    reduction = _Sum(pairs, precision, phi=phi)
    return _Sweep.apply(reduction, transport, queries, keys, scale, row_bias)[0][:, 0]


def spread_pair_sums(transport: Transport, queries, keys, pairs) -> tuple[Tensor, Tensor]:
    """:func:`~fastcl.ops.pair_sums.pair_sums` over the keys of all ranks."""
    reduction = _PairSums(pairs, queries.dtype)
    sums, count = _Sweep.apply(reduction, transport, queries, keys)[0].unbind(1)
    return sums, count.detach()

"""A first-in first-out queue of keys, the negatives of MoCo and of cross-batch memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import group_of, rows_of
from ..ops import (
    LogSumExp,
    Pairs,
    enqueue,
    fuses_enqueue,
    l2_normalize,
    similarity_logsumexp,
)
from ..ops.checks import precision_of
from ..ops.pairs import describe
from ..ops.registry import accumulator
from .store import Store, check_dtype, check_finite, check_integers, check_rows, check_size

UNKNOWN_ID = -(2**63)  # of keys that came without one: equal to no sample's
NO_ID = UNKNOWN_ID + 1  # of queries from which no key is to be kept
_BLOCK = 8192  # keys cast at a time when class sums are wider than the storage


class NegativeQueue(Store):
    """The last ``size`` keys (He et al. 2020, section 3.2) with an id beside each.

    A loss that is given the queue reads the keys where they lie, without a copy, and enqueues the
    batch's own afterwards. Keys are constants: they get no gradient and pass none back. In
    evaluation mode the queue is frozen. Its tensors are in ``state_dict`` (``keys``, ``ids``,
    ``pointer``, ``fill``) and follow ``.to()``, but are not buffers, so that DDP leaves them alone.

    With a process group every rank's keys enter in the order of ranks, unequal batches included:

    - ``distributed="gather"``: each rank stores them all; losses then need no communication.
    - ``distributed="shard"``: slot s is stored by rank s mod W, a W-th of the memory. A loss sends
      its queries to all ranks and merges the partial log-sum-exps; value, gradient and work per
      rank are those of ``"gather"``. Each rank has a state of its own to save.

    All ranks enqueue together and, sharded, take the loss and its backward together. A loss is
    the mean over the rank's own queries, or with its own ``distributed=`` the global mean.

    Args:
        dim: width D of the keys.
        size: how many keys to hold, over all ranks.
        dtype: of the storage: float32, bfloat16, float16 or float64.
        normalize: store rows divided by their length, as losses with ``normalize=True`` need.
        distributed: ``"gather"`` or ``"shard"``; without a process group the same.
        group: process group; ``None`` for the default one.
        device: where to begin.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
    """

    stored = ("_keys", "_ids", "_pointer", "_fill", "_held")

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        normalize: bool = True,
        distributed: str = "gather",
        group=None,
        device=None,
    ):
        super().__init__()
        check_size(dim, "dim")
        self.size = check_size(size, "size")
        if distributed not in ("gather", "shard"):
            raise ValueError(f"distributed is {distributed!r}; expected 'gather' or 'shard'")
        self.normalize = normalize
        self.distributed = distributed
        self.group = group
        sharing = group_of(group) if distributed == "shard" else None
        self._shard = (0, 1) if sharing is None else (sharing.rank, sharing.size)
        rank, ranks = self._shard
        self._slots = len(range(rank, size, ranks))
        # a shard ends in one more row, which takes what belongs to others
        rows = self._slots + (ranks > 1)
        self._keys = torch.zeros(rows, dim, dtype=check_dtype(dtype), device=device)
        self._ids = torch.full((rows,), UNKNOWN_ID, device=device)
        self._pointer = torch.zeros((), dtype=torch.int64, device=device)
        self._fill = torch.zeros_like(self._pointer)
        # How many keys are held is also the length of an empty tensor: known without waiting for a
        # device, and torch.compile, which specialises on a module's integers, lets it vary.
        self._held = self._pointer.new_empty(0, 0)

    @property
    def fill(self) -> int:
        """How many keys are held, over all ranks."""
        return self._held.shape[0]

    @property
    def pointer(self) -> int:
        """The slot that the next key takes (on an accelerator this waits for it)."""
        return int(self._pointer)

    @property
    def keys(self) -> Tensor:
        """The keys held here, a view [valid, D] of the storage: slot order, not age."""
        return self._keys[: self._valid()]

    @property
    def ids(self) -> Tensor:
        """The ids of :attr:`keys` [valid]; the smallest int64 where none came with the key."""
        return self._ids[: self._valid()]

    def _valid(self) -> int:
        rank, ranks = self._shard
        return (self.fill - rank + ranks - 1) // ranks

    def extra_repr(self) -> str:
        dtype = str(self._keys.dtype).removeprefix("torch.")
        return (
            f"dim={self._keys.shape[1]}, size={self.size}, dtype={dtype}, "
            f"normalize={self.normalize}, distributed={self.distributed!r}"
        )

    # ------------------------------------------------------------------------------- writing

    def enqueue(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Store ``keys`` over the oldest ones; does nothing in evaluation mode.

        The result is that of storing them one by one: any number fits, past the end it goes on at
        the beginning, and of more than ``size`` the last ``size`` stay.

        Args:
            keys: [B, D], any float dtype, without a gradient.
            ids: [B] integers: sample numbers, to exclude false negatives and stale copies of the
                same sample, or labels.

        Raises:
            TypeError, ValueError: the wrong dtype, shape or device; NaN or infinity (looked at
                where that is free, on a CPU); keys that require a gradient.
        """
        if not self.training:
            return
        check_rows(keys, "keys", self._keys, "the queue")
        if keys.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "keys require a gradient, which stored keys cannot pass back; expected "
                "keys.detach(), or keys made under torch.no_grad()"
            )
        if ids is not None:
            ids = check_integers(ids, "ids", keys.shape[0], keys)
        with torch.no_grad():
            self._store(keys, ids)

    def _store(self, keys: Tensor, ids: Tensor | None) -> None:
        n = keys.shape[0]
        group = group_of(self.group)
        if group is None and self._shard[1] == 1 and fuses_enqueue(keys, self._keys):
            enqueue(
                keys, ids, UNKNOWN_ID, self._keys, self._ids, self._pointer, self._fill,
                normalize=self.normalize,
            )  # fmt: skip
        else:
            n = self._compose(keys, ids, group)
        self._held = self._held.new_empty(min(self.fill + n, self.size), 0)

    def _compose(self, keys: Tensor, ids: Tensor | None, group) -> int:
        """The step in PyTorch; returns how many keys came from all ranks."""
        rows = (l2_normalize(keys)[0] if self.normalize else keys).to(self._keys.dtype)
        check_finite(rows, "keys")
        if ids is None:
            ids = self._ids.new_full((rows.shape[0],), UNKNOWN_ID)
        ranks = 1 if group is None else group.size
        if self.distributed == "shard" and ranks != self._shard[1]:
            raise RuntimeError(
                f"queue was sharded over {self._shard[1]} ranks and the process group has {ranks}; "
                "expected a queue made after the process group"
            )
        everyone = self._rows(rows, "keys that enter a queue")
        if everyone is not None:
            rows, ids = everyone.gather(rows), everyone.gather(ids)
        n = rows.shape[0]
        dropped = max(0, n - self.size)
        slots = torch.arange(dropped, n, device=rows.device).add_(self._pointer)
        slots.remainder_(self.size)
        rank, ranks = self._shard
        if ranks > 1:
            here = slots.remainder(ranks) == rank
            slots = torch.where(here, slots.div(ranks, rounding_mode="floor"), self._slots)
        self._keys.index_copy_(0, slots, rows[dropped:])
        self._ids.index_copy_(0, slots, ids[dropped:])
        self._pointer.add_(n).remainder_(self.size)
        self._fill.add_(n).clamp_(max=self.size)
        return n

    def _rows(self, like: Tensor, operation: str, **facts):
        """The rows of all ranks, which must have come for one thing to queues of one kind."""
        facts |= {"width": self._keys.shape[1], "dtype": self._keys.dtype, "fill": self.fill}
        return rows_of(self.group, like, operation, size=self.size, **facts)

    # ------------------------------------------------------------------------------- reading

    def logsumexp(
        self,
        queries: Tensor,
        scale: float | Tensor,
        *,
        relation: str = "any",
        ids: Tensor | None = None,
        maxima: bool = False,
        precision: torch.dtype | None = None,
    ) -> LogSumExp:
        """:func:`~fastcl.ops.similarity_logsumexp` of queries over the keys held, by all ranks.

        Where queries or the scale need a gradient, this forward pass yields it, and the backward
        reads no keys: they may be overwritten in between.

        Args:
            queries: [N, D], any float dtype, of unit length if ``normalize``.
            scale: a number or 0-dim tensor (differentiable).
            relation, ids: which keys count for a query, by its id [N]; see :class:`~fastcl.Pairs`.
            maxima, precision: as there.

        Returns:
            Rows [N], -inf with zero gradient where no key counts.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, width or device.
        """
        check_rows(queries, "queries", self._keys, "the queue")
        if self._shard[1] == 1:
            return self._partial(queries, scale, relation, ids, maxima, precision)
        rows = self._rows(
            queries, "queries that meet a queue's shards", queries=queries.dtype, relation=relation,
            maxima=maxima, precision=precision, gradient=queries.requires_grad,
        )  # fmt: skip
        everyone = rows.spread(queries)
        if ids is not None:
            ids = rows.gather(ids)
        part = self._partial(everyone, scale, relation, ids, maxima, precision)
        parts = rows.collect(part.rows)
        none = part.rows.new_empty(0)
        largest = none
        if maxima:
            largest = rows.collect(part.row_max).amax(0)
        return LogSumExp(_logsumexp(parts), none, largest, none)

    def _partial(self, queries, scale, relation, ids, maxima, precision) -> LogSumExp:
        """Over the keys stored on this rank."""
        if self._valid() == 0:
            acc = accumulator(torch.promote_types(queries.dtype, self._keys.dtype))
            # part of the graph, so that every rank takes part in the backward's collectives
            rows = (queries.sum(1).to(acc) * scale).masked_fill(
                torch.ones_like(queries[:, 0], dtype=torch.bool), float("-inf")
            )
            none = rows.new_empty(0)
            return LogSumExp(rows, none, rows.detach() if maxima else none, none)
        pairs = Pairs() if relation == "any" else Pairs(relation, ids, self.ids)
        return similarity_logsumexp(
            queries, self.keys, scale, pairs=pairs, maxima=maxima, precision=precision
        )

    @torch.no_grad()
    def class_sums(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For each id the sum of the keys that carry it [N, D], and their number [N], as floats.

        In O(N D + K D) and, beyond a block, without a copy of the keys.
        """
        wanted = ids
        if self._shard[1] > 1:
            rows = self._rows(ids, "class sums of a queue's shards")
            wanted = rows.gather(ids)
        keys, n = self.keys, wanted.shape[0]
        ordered = wanted.sort().values
        place = torch.searchsorted(ordered, self.ids)
        slots = torch.where(ordered[place.clamp(max=n - 1)] == self.ids, place, n)
        acc = accumulator(keys.dtype)
        sums = keys.new_zeros(n + 1, keys.shape[1], dtype=acc)
        # a compiled graph casts on the fly, and must not depend on the number of blocks
        one_block = keys.dtype == acc or torch.compiler.is_compiling()
        blocks = [(slots, keys)] if one_block else zip(slots.split(_BLOCK), keys.split(_BLOCK))  # noqa: B905
        for slot, part in blocks:
            sums.index_add_(0, slot, part.to(acc))
        number = sums.new_zeros(n + 1).index_add_(0, slots, sums.new_ones(()).expand(len(slots)))
        if self._shard[1] > 1:
            sums = rows.group.all_reduce(sums, rows.operation)
            number = rows.group.all_reduce(number, rows.operation)
        back = torch.searchsorted(ordered, ids)
        return sums[back], number[back]

    def negative_sums(self, queries: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sum of <q_i, k_j> over the keys of another id than ``ids`` [N], and their number [N]."""
        with torch.no_grad():
            sums = self.keys.sum(0, dtype=accumulator(self._keys.dtype))
            group = group_of(self.group) if self._shard[1] > 1 else None
            if group is not None:
                sums = group.all_reduce(sums, "sum of a queue's shards")
            count = queries.new_full((queries.shape[0],), self.fill)
            if ids is not None:
                same, number = self.class_sums(ids)
                sums, count = sums - same, count - number
        return (queries * sums).sum(1), count

    # --------------------------------------------------------------------------------- state

    def tensors(self) -> dict[str, Tensor]:
        return {
            "keys": self._keys[: self._slots],
            "ids": self._ids[: self._slots],
            "pointer": self._pointer,
            "fill": self._fill,
            "shard": torch.tensor(self._shard),
        }

    def refusal(self, state: dict[str, Tensor]) -> str:
        reason = super().refusal(state)
        shard = () if reason else tuple(state["shard"].tolist())
        if reason or shard == self._shard:
            return reason
        return (
            f"shard is rank {shard[0]} of {shard[1]}; expected rank {self._shard[0]} of "
            f"{self._shard[1]}: a sharded queue is resumed by as many ranks, each its own"
        )

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self._held = self._held.new_empty(int(state["fill"]), 0)


def _logsumexp(parts: Tensor) -> Tensor:
    """Log-sum-exp over the first dimension; -inf with zero gradient where every part is."""
    empty = torch.isneginf(parts).all(0)
    merged = torch.logsumexp(torch.where(empty, 0.0, parts), 0)
    return torch.where(empty, float("-inf"), merged)


def merge(a: LogSumExp, b: LogSumExp) -> LogSumExp:
    """Row sums over two sets of keys as those over their union; columns are not merged.

    Maxima are merged where both have them.
    """
    none = a.rows.new_empty(0)
    both = a.row_max.shape == b.row_max.shape
    largest = torch.maximum(a.row_max, b.row_max) if both else none
    return LogSumExp(_logsumexp(torch.stack([a.rows, b.rows])), none, largest, none)


def stored_precision(precision: torch.dtype, queue: NegativeQueue) -> torch.dtype:
    """The dtype for products of a batch, in ``precision``, with the keys of a queue."""
    return torch.promote_types(precision, precision_of(queue.keys, None, None))


def check_queue(queue, normalize: bool) -> NegativeQueue:
    """A queue whose keys are scaled as the rows of a loss.

    Raises:
        TypeError: something else. ValueError: they are not.
    """
    if not isinstance(queue, NegativeQueue):
        raise TypeError(f"queue {describe(queue)}; expected a fastcl.NegativeQueue")
    if queue.normalize != normalize:
        raise ValueError(
            f"queue has normalize={queue.normalize}; expected {normalize}, like the loss"
        )
    return queue

"""Losses whose negatives are spread over ranks: ``distributed="gather"`` or ``"ring"``.

The contract: every rank returns the mean over the *global* batch, however unequally it is spread,
and after the averaging of DDP or FSDP each weight and each learnable scale has the gradient that a
single process would compute for that mean. (So a rank's own gradients are W times its share.)

A learnable temperature must be among the parameters that are averaged: make the loss a submodule
of what DDP wraps. ``process_group`` must be the ranks over which the gradients are averaged.

Losses ask :class:`Ranks` for sums over all keys, and for the mean; :class:`~.shared.SharedRanks`
answers for a process group, :data:`ALONE` for one process.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import LogSumExp, Pairs, similarity_logsumexp, similarity_sum
from ..ops.pair_sums import pair_count, pair_sums

if TYPE_CHECKING:
    from .group import Group
    from .rows import Rows

MODES = ("gather", "ring")


class Ranks:
    """Reductions over the keys of all ranks, when there is one rank."""

    start = 0  # index of this rank's first row in the global batch

    def logsumexp(
        self,
        queries: Tensor,
        keys: Tensor | None,
        scale: float | Tensor,
        *,
        pairs: Pairs,
        columns: bool = False,
        maxima: bool = False,
        precision: torch.dtype,
    ) -> LogSumExp:
        """:func:`~fastcl.ops.similarity_logsumexp` of this rank's queries over all keys (and of
        its keys over all queries); ``keys`` of ``None`` for the queries themselves."""
        return similarity_logsumexp(
            queries, keys, scale, pairs=pairs, columns=columns, maxima=maxima, precision=precision
        )

    def sum(
        self, queries: Tensor, keys: Tensor, scale, *, phi: str, row_bias, pairs: Pairs, precision
    ) -> Tensor:
        """:func:`~fastcl.ops.similarity_sum` of this rank's queries over all keys."""
        return similarity_sum(
            queries, keys, scale, phi=phi, row_bias=row_bias, pairs=pairs, precision=precision
        )

    def pair_sums(self, queries: Tensor, keys: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """:func:`~fastcl.ops.pair_sums.pair_sums` of this rank's queries over all keys."""
        return pair_sums(queries, keys, pairs)

    def pair_count(self, queries: Tensor, m: int, pairs: Pairs) -> Tensor:
        """:func:`~fastcl.ops.pair_sums.pair_count` over all keys, of which ``m`` are here."""
        return pair_count(queries, m, pairs)

    def relative_softmax(self, x: Tensor) -> Tensor:
        """Softmax of ``x`` [B] over the global batch, times that batch's size; no gradient."""
        return torch.softmax(x.detach(), 0) * x.shape[0]

    def totals(self, *values: Tensor) -> Tensor:
        """Sums over ranks of 0-dim tensors, [len(values)]."""
        return torch.stack(values)


ALONE = Ranks()


def meet(
    distributed: str | None,
    process_group: dist.ProcessGroup | None,
    keys: Tensor,
    reduction: str,
    **facts: Any,
) -> Ranks:
    """The ranks that share a loss, once they agree on what they compute.

    Args:
        distributed: ``None`` for this process alone, ``"gather"`` or ``"ring"``.
        process_group: whose ranks; ``None`` for all.
        keys: [M, D], this rank's.
        reduction: the loss's; ``"none"`` is refused, see below.
        facts: whatever else must be the same on all ranks, for the error message.

    Raises:
        ValueError: unknown mode; a group without mode; ``reduction="none"``, since a mean taken
            afterwards on each rank weighs unequal batches wrongly; ranks that disagree.
        RuntimeError: no process group; a rank that ended or does not answer.
    """
    if distributed is None:
        if process_group is not None:
            raise ValueError(f"process_group came without distributed; expected one of {MODES}")
        return ALONE
    if distributed not in MODES:
        raise ValueError(f"distributed is {distributed!r}; expected None or one of {MODES}")
    if reduction == "none":
        raise ValueError(
            f"reduction is 'none' with distributed={distributed!r}; expected 'mean' or 'sum', "
            "because a mean taken later on each rank weighs unequal batches wrongly"
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"distributed is {distributed!r}, but there is no process group; call "
            "torch.distributed.init_process_group first"
        )
    group = group_of(process_group)
    if group is None:
        return ALONE
    from .shared import share  # only where torch.distributed exists

    return share(distributed, group, keys, {"reduction": reduction, **facts})


def group_of(process_group: dist.ProcessGroup | None) -> Group | None:
    """The ranks of a process group (``None``: of the default one), or ``None`` where this process
    is alone: without torch.distributed, before ``init_process_group``, in a group of one.

    Raises:
        ValueError: this rank is not of the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_world_size(process_group) == 1:
        return None
    from .group import Group  # only where torch.distributed exists

    return Group(process_group)


class KeepsGroup:
    """A module with a process group, which copies share and which cannot be pickled."""

    group_name = "process_group"  # the attribute that holds it

    def __deepcopy__(self, memo: dict) -> Any:
        group = getattr(self, self.group_name)
        memo[id(group)] = group
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __copy__(self) -> Any:
        twin = self.__new__(type(self))
        twin.__dict__ = dict(self.__dict__)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """
        Raises:
            TypeError: the module has a group of its own.
        """
        if getattr(self, self.group_name) is not None:
            raise TypeError(
                f"{type(self).__name__} cannot be pickled with its {self.group_name}, which is "
                "this process's own; expected None, which is the default group, or its state_dict()"
            )
        return self.__dict__


def rows_of(
    process_group: dist.ProcessGroup | None, like: Tensor, operation: str, **facts: Any
) -> Rows | None:
    """The rows that all ranks bring, or ``None`` where this process is alone; see
    :class:`~.rows.Rows`."""
    group = group_of(process_group)
    if group is None:
        return None
    from .rows import Rows  # only where torch.distributed exists

    return Rows(group, like, operation, **facts)

"""How key shards reach every rank, and how what they collect there gets home.

A *sweep* shows each rank the shards that it must meet, its own first, and merges at each owner
what the others give back for its keys (column sums, gradients). Whole sweeps meet every shard.
Sweeps of a symmetric problem go half way round: each pair of ranks meets at one of them, and where
W is even the two that stand opposite each other share their block.

Every rank posts the same exchanges in the same order, in forward and backward alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .group import Group, Pending, padded

# (ranks whose keys these are, one below the other; the shard's tensors; shared block?) -> given
Visit = Callable[[list[int], list[Tensor], bool], Tensor | None]
Merge = Callable[[Tensor, Tensor], Tensor]


def add(a: Tensor, b: Tensor) -> Tensor:
    """Gifts that are summed, such as gradients."""
    return a.add_(b)


class Transport:
    """Args: ``group``; ``sizes``, the number of keys on each rank."""

    def __init__(self, group: Group, sizes: list[int]):
        self.group = group
        self.sizes = sizes

    def owners(self, symmetric: bool) -> list[int]:
        """Whose shards this rank meets, in order."""
        group = self.group
        hops = group.size // 2 if symmetric else group.size - 1
        return [(group.rank - hop) % group.size for hop in range(hops + 1)]

    def is_shared(self, owner: int, symmetric: bool) -> bool:
        """Whether the block with ``owner`` is one that both ranks take half of."""
        return symmetric and 2 * ((self.group.rank - owner) % self.group.size) == self.group.size

    def sweep(
        self,
        shard: list[Tensor],
        visit: Visit,
        merge: Merge | None = None,
        symmetric: bool = False,
        kept: list | None = None,
    ) -> Tensor | None:
        """Show every shard to ``visit``.

        Args:
            shard: this rank's tensors, their first dimension its keys.
            visit: called with one or more ranks' shards; returns what it gives their keys.
            merge: how two gifts for the same keys become one, which may overwrite the first;
                ``None``: nothing is given.
            symmetric: go half way round.
            kept: filled by a first sweep with what need not be sent again by a later one, whose
                shard begins with the same tensors.

        Returns:
            The merged gifts for this rank's keys.
        """
        raise NotImplementedError


class Ring(Transport):
    """Shards travel from rank to rank while the present one is computed with, and what they are
    given travels one step behind them. Memory does not depend on the number of ranks."""

    def sweep(self, shard, visit, merge=None, symmetric=False, kept=None):
        owners = self.owners(symmetric)
        last = len(owners) - 1
        home: Tensor | None = None
        gift: Pending | None = None
        for hop, owner in enumerate(owners):
            following = None if hop == last else self._send_on(shard, owners[hop + 1])
            given = visit([owner], shard, self.is_shared(owner, symmetric))
            if merge is not None and hop == 0:
                home = given
            elif merge is not None:
                if gift is not None:
                    given = merge(given, gift.wait()[0])
                gift = (
                    self._send_home(given, last)
                    if hop == last
                    else self._pass_on(given, owners[hop + 1])
                )
            if following is not None:
                shard = following.wait()
        if gift is not None:
            arrived = gift.wait()[0]
            home = arrived if home is None else merge(home, arrived)
        return home

    def _like(self, x: Tensor, owner: int) -> Tensor:
        return x.new_empty((self.sizes[owner], *x.shape[1:]))

    def _send_on(self, shard: list[Tensor], owner: int) -> Pending:
        arriving = [self._like(x, owner) for x in shard]
        return self.group.shift(shard, arriving, 1, "ring exchange of key shards")

    def _pass_on(self, given: Tensor, owner: int) -> Pending:
        arriving = [self._like(given, owner)]
        return self.group.shift([given], arriving, 1, "ring exchange of what keys were given")

    def _send_home(self, given: Tensor, hops: int) -> Pending:
        arriving = [self._like(given, self.group.rank)]
        return self.group.shift([given], arriving, -hops, "return of what keys were given")


class Gather(Transport):
    """All shards are gathered, while the own block is computed, and met in one go."""

    def sweep(self, shard, visit, merge=None, symmetric=False, kept=None):
        own, *others = self.owners(symmetric)
        shared = [owner for owner in others if self.is_shared(owner, symmetric)]
        parties = [[owner for owner in others if owner not in shared], shared]
        ready = [] if kept is None else list(kept)
        pending = [
            self.group.all_gather(padded(x, max(self.sizes)), "all-gather of keys")
            for x in shard[len(ready) :]
        ]
        home = visit([own], shard, False)
        ready += [self._by_party(p.wait()[0], parties) for p in pending]
        if kept is not None and not kept:
            kept.extend(ready)
        given: dict[int, Tensor] = {}
        for number, owners in enumerate(parties):
            if owners:
                gifts = visit(owners, [x[number] for x in ready], owners is shared)
                if merge is not None:
                    sizes = [self.sizes[owner] for owner in owners]
                    given.update(zip(owners, gifts.split(sizes), strict=True))
        if merge is None:
            return None
        arrived = self._reduced(given) if merge is add else self._merged(given, merge)
        return arrived if home is None else merge(home, arrived)

    def _by_party(self, gathered: Tensor, parties: list[list[int]]) -> list[Tensor]:
        """Of [W, longest shard, ...] the rows that each party of owners really has."""
        return [
            torch.cat(
                [gathered[:0, 0], *(gathered[owner, : self.sizes[owner]] for owner in owners)]
            )
            for owners in parties
        ]

    def _reduced(self, given: dict[int, Tensor]) -> Tensor:
        like = next(iter(given.values()))
        all_gifts = like.new_zeros(self.group.size, max(self.sizes), *like.shape[1:])
        for owner, gift in given.items():
            all_gifts[owner, : len(gift)] = gift
        mine = self.group.reduce_scatter(all_gifts, "reduce-scatter of the keys' gradient")
        return mine[: self.sizes[self.group.rank]]

    def _merged(self, given: dict[int, Tensor], merge: Merge) -> Tensor:
        like = next(iter(given.values()))
        parts = [given.get(rank, like[:0]) for rank in range(self.group.size)]
        rank, mine = self.group.rank, self.sizes[self.group.rank]
        # whom I meet at a distance of d hops is met by me as whoever stands d hops the other way
        meets_me = {(2 * rank - owner) % self.group.size for owner in given}
        sizes = [mine if other in meets_me else 0 for other in range(self.group.size)]
        arrived = self.group.all_to_all(parts, sizes, "exchange of what keys were given")
        merged, *more = [part for part in arrived if len(part)]
        for part in more:
            merged = merge(merged, part)
        return merged


TRANSPORTS = {"gather": Gather, "ring": Ring}

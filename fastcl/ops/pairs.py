"""Which (query, key) pairs a reduction keeps: a rule on integers, never an N x M mask.

A pair ``(i, j)`` is kept when its ids satisfy ``relation`` and ``j - i`` is not a skipped offset.
Ids express labels, duplicates and false negatives; offsets express what is known from the layout
alone (an anchor itself, its other view, a rank's block). Both cost O(N + M) memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def describe(value) -> str:
    """What came, for an error message."""
    if isinstance(value, Tensor):
        if value.is_nested:  # has no one shape
            return "is a nested tensor"
        dtype = str(value.dtype).removeprefix("torch.")
        kind = "" if value.layout == torch.strided else f" and layout {value.layout}"
        return f"has shape {tuple(value.shape)}, dtype {dtype}{kind} on {value.device}"
    text = repr(value)
    if len(text) > 60 or "\n" in text:
        return f"is a {type(value).__name__}"
    return f"is {text} ({type(value).__name__})"


RELATIONS = ("any", "same", "different")
MAX_OFFSETS = 3


@dataclass(frozen=True)
class Pairs:
    """A rule saying which pairs count.

    Args:
        relation: ``"any"`` keeps every pair, ``"same"`` those with equal ids, ``"different"``
            those with unequal ids.
        query_ids: integer ids [N]; needed unless the relation is ``"any"``.
        key_ids: integer ids [M]; ``None`` means the keys carry the queries' ids.
        skip: at most three offsets ``j - i`` whose pairs are dropped whatever their ids.

    Raises:
        ValueError: unknown relation, missing or superfluous ids, more than three offsets.
        TypeError: ids that are not integer tensors.
    """

    relation: str = "any"
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    skip: tuple[int, ...] = ()

    def __post_init__(self):
        if self.relation not in RELATIONS:
            raise ValueError(f"relation is {self.relation!r}; expected one of {RELATIONS}")
        if (self.relation == "any") != (self.query_ids is None):
            need = "takes no ids" if self.relation == "any" else "needs query_ids"
            raise ValueError(f"relation {self.relation!r} {need}")
        if self.query_ids is None and self.key_ids is not None:
            raise ValueError("key_ids came without query_ids; expected both or neither")
        if not isinstance(self.skip, (tuple, list)) or not all(
            isinstance(offset, (int, torch.SymInt)) for offset in self.skip
        ):
            raise TypeError(f"skip is {self.skip!r}; expected a tuple of integer offsets")
        if len(self.skip) > MAX_OFFSETS:
            raise ValueError(f"skip has {len(self.skip)} offsets; expected at most {MAX_OFFSETS}")
        for name, ids in (("query_ids", self.query_ids), ("key_ids", self.key_ids)):
            if ids is None:
                continue
            dense = isinstance(ids, Tensor) and ids.layout == torch.strided and not ids.is_nested
            if not dense or ids.is_floating_point() or ids.is_complex() or ids.dim() != 1:
                raise TypeError(f"{name} {describe(ids)}; expected a 1-D tensor of integers")

    @property
    def symmetric(self) -> bool:
        """Whether (i, j) is kept exactly when (j, i) is, for keys that are the queries."""
        # compared, not hashed: an offset may be the symbolic batch size of a compiled graph
        closed = all(any(other == -offset for other in self.skip) for offset in self.skip)
        return self.key_ids is None and closed

    def ids(self, n: int, m: int) -> tuple[Tensor | None, Tensor | None]:
        """The ids as int64 for ``n`` queries and ``m`` keys, lengths checked.

        Raises:
            ValueError: a length that does not fit.
        """
        if self.query_ids is None:
            return None, None
        query_ids = self.query_ids
        key_ids = query_ids if self.key_ids is None else self.key_ids
        for name, ids, length in (("query_ids", query_ids, n), ("key_ids", key_ids, m)):
            if ids.shape[0] != length:
                raise ValueError(
                    f"{name} has {ids.shape[0]} entries; expected {length}, one per "
                    f"{name.split('_')[0]}"
                )
        return query_ids.to(torch.int64), key_ids.to(torch.int64)


ALL = Pairs()


def keep_mask(
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    relation: str,
    skip: list[int],
    rows: range,
    columns: range,
    device: torch.device,
) -> Tensor | None:
    """The rule on one tile as a bool mask [len(rows), len(columns)]; ``None`` keeps everything."""
    mask = None
    if query_ids is not None and key_ids is not None:
        equal = query_ids[rows.start : rows.stop, None] == key_ids[columns.start : columns.stop]
        mask = equal if relation == "same" else ~equal
    for offset in skip:
        diagonal = offset - columns.start + rows.start
        if -len(rows) < diagonal < len(columns):
            if mask is None:
                mask = torch.ones(len(rows), len(columns), dtype=torch.bool, device=device)
            mask.diagonal(diagonal).fill_(False)
    return mask

"""Which tile, warps and stages a kernel runs with: a shipped table, never a search at run time.

``configs.json`` holds a list of entries; the first whose conditions hold is taken.

    kernel          which kernel
    arch            compute capabilities it is for (0 is the interpreter)
    bits            of the operands' dtype
    d               largest width it is for (null: any)
    rows            largest number of own rows it is for (null: any)
    triton          minor versions it is for (null: any)
    own, other      rows of a tile's two sides
    block_d         width streamed at a time where rows are too wide to hold
    fold            accumulator rows folded in a thread; 0 keeps the tile whole
    warps, stages   as Triton takes them
    programs        that fit a multiprocessor at once; ``make lint-kernels`` checks the claim
    by              what chose the entry

``RULES`` are the sizes at which another path is taken, with the same kind of reason.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import triton

_TABLE = json.loads((Path(__file__).parent / "configs.json").read_text())
RULES: dict[str, int] = {name: rule["value"] for name, rule in _TABLE["rules"].items()}
TRITON = ".".join(triton.__version__.split(".")[:2])
# of every launch: Triton 3.9 warns where it is left open, and 3.10 would compile other code
FUSION = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Config:
    """One entry of the table; see the module's description."""

    kernel: str
    arch: tuple[int, ...]
    bits: int
    d: int | None
    rows: int | None
    triton: tuple[str, ...] | None
    own: int
    other: int
    block_d: int
    fold: int
    warps: int
    stages: int
    programs: int
    by: str

    def serves(self, kernel: str, arch: int, bits: int, d: int, rows: int) -> bool:
        return (
            kernel == self.kernel
            and arch in self.arch
            and bits == self.bits
            and (self.d is None or d <= self.d)
            and (self.rows is None or rows <= self.rows)
            and (self.triton is None or TRITON in self.triton)
        )

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launch takes."""
        return {"num_warps": self.warps, "num_stages": self.stages, **FUSION}


def _entry(row: dict) -> Config:
    lists = {key: tuple(row[key]) if row[key] is not None else None for key in ("arch", "triton")}
    return Config(**{**row, **lists})


ENTRIES = tuple(_entry(row) for row in _TABLE["configs"])


@functools.cache
def lookup(kernel: str, arch: int, bits: int, d: int, rows: int) -> Config:
    """The entry for a kernel on compute capability ``arch`` (90 for 9.0).

    Newer devices than the table knows take the entries of the newest it does.

    Raises:
        LookupError: no entry.
    """
    known = sorted({a for entry in ENTRIES for a in entry.arch if a <= arch})
    for entry in ENTRIES:
        if known and entry.serves(kernel, known[-1], bits, d, rows):
            return entry
    raise LookupError(f"no configuration for {kernel} on sm_{arch} with {bits} bits and D = {d}")

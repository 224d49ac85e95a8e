"""How much work a loss is, and the least time a GPU needs for it.

A unit is one product of all pairs, 2 N M D floating-point operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cases import DTYPES, Case

# units of the minimal deterministic method, forward and backward: the triangle and one W z for
# symmetric problems; both directions at once, then three products, for CLIP; one pass for a queue
_MINIMAL = {"ntxent": (0.5, 2.0), "supcon": (0.5, 2.0), "clip": (1.0, 3.0), "queue": (2.0, 0.0)}
_WIDE = (0.5, 1.5)  # symmetric, where writing W's triangle costs less than forming the other one
_EXPONENTIALS = {"ntxent": (0.5, 1), "supcon": (0.5, 1), "clip": (1, 1), "queue": (1, 0)}


@dataclass(frozen=True)
class Rates:
    """Operations per second of a device.

    The defaults are an H200's, measured with cuBLAS (bf16) and a copy; the others by the ratios of
    its units: TF32 half of bf16, three TF32 products per fp32 product, 16 exponentials per clock
    and multiprocessor.
    """

    bf16: float = 788e12
    tf32: float = 394e12
    fp32: float = 394e12 / 3
    exponentials: float = 4.18e12
    bytes: float = 4.3e12

    def of(self, dtype: str) -> float:
        return self.bf16 if dtype == "fp16" else getattr(self, dtype)


def unit(case: Case) -> int:
    """Floating-point operations of one unit."""
    return 2 * case.rows * case.keys * case.width


def minimal(case: Case) -> tuple[float, float]:
    """Units of the minimal method, forward and backward."""
    symmetric = case.task in ("ntxent", "supcon")
    return _WIDE if symmetric and case.width > _held_width(case) else _MINIMAL[case.task]


def _held_width(case: Case) -> int:
    from fastcl.kernels.configs import RULES

    return RULES[f"held_width_{8 * DTYPES[case.dtype].itemsize}"]


def executed(case: Case) -> tuple[float, float]:
    """Units that the Triton backend executes, forward and backward.

    CLIP's two gradients are two passes, unless rows are too wide to be multiplied in the tile; a
    queue's mean comes from a second pass where they are, or fp16 cannot hold the sums.
    """
    wide = case.width > _held_width(case)
    if case.task == "clip" and not wide:
        return 1.0, 4.0
    if case.task == "queue" and (wide or case.dtype == "fp16"):
        return 3.0, 0.0
    return minimal(case)


def floor_seconds(case: Case, rates: Rates) -> tuple[float, float]:
    """Least time of forward and backward: of products, exponentials or memory, the longest."""
    size = DTYPES[case.dtype].itemsize * case.width
    leaves = case.rows if case.task in ("ntxent", "supcon") else 2 * case.rows
    moved = (leaves + (case.keys if case.task == "queue" else 0), 2 * leaves)
    return tuple(
        max(
            units * unit(case) / rates.of(case.dtype),
            exponentials * case.scores / rates.exponentials,
            rows * size / rates.bytes,
        )
        for units, exponentials, rows in zip(
            minimal(case), _EXPONENTIALS[case.task], moved, strict=True
        )
    )

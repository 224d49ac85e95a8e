"""``python -m benchmarks.tiles``: the tile size of the chunked backend, and keeping exponentials.

Times NT-Xent forward + backward in fp32 for tiles of 2^17 to 2^21 numbers, exponentials recomputed
(workspace 0) or kept where they fit (64 MB): the choice in fastcl/ops/chunked/problem.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

import fastcl
from fastcl.functional import nt_xent
from fastcl.ops.chunked import problem

from .cases import TEMPERATURE, Case
from .contestants import fastcl_backends
from .device import CPU
from .measure import differentiate, interleave, summary

_POWERS = range(17, 22)
_WORKSPACES = (0, 64)  # MB


def _variant(case: Case, power: int, workspace: int) -> Callable[[], float]:
    """Seconds of one step of ``case`` in tiles of 2^``power`` numbers."""
    contestant, inputs = fastcl_backends(("chunked",))[0], case.inputs()

    def run() -> float:
        problem._TILE["cpu"] = 2**power
        fastcl.set_workspace(workspace)
        step = partial(differentiate, lambda a, b: nt_xent(a, b, TEMPERATURE), contestant, inputs)
        return CPU.seconds(step)

    return run


def main(argv: list[str] | None = None) -> None:
    """Print a table per workspace: a line per size, a column per tile; ms."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--seconds", type=float, default=10.0, help="per size")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print("NT-Xent, chunked backend, fp32, forward + backward: median ms (p10-p90)")
    print(f"{'rows':>6}{'D':>5}{'MB':>4}" + "".join(f"{f'2^{p}':>20}" for p in _POWERS))
    for rows in options.rows:
        for width in options.widths:
            case = Case("ntxent", rows, width, "fp32", rows)
            runs = {f"{w} {p}": _variant(case, p, w) for w in _WORKSPACES for p in _POWERS}
            samples = interleave(runs, None, options.seconds)
            for workspace in _WORKSPACES:
                line = f"{rows:>6}{width:>5}{workspace:>4}"
                for power in _POWERS:
                    s = summary(samples[f"{workspace} {power}"])
                    cell = f"{s['median_ms']:.3g} ({s['p10_ms']:.3g}-{s['p90_ms']:.3g})"
                    line += f"{cell:>20}"
                print(line, flush=True)


if __name__ == "__main__":
    main()

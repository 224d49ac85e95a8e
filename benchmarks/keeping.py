"""``python -m benchmarks.keeping``: exponentials kept for the backward, or formed again.

Times NT-Xent and CLIP, forward + backward, both ways on the compiled CPU backend: the choice of
``keeps_exponentials`` in fastcl/ops/cpu.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import fastcl
from fastcl.functional import clip, nt_xent
from fastcl.ops import cpu

from .cases import DTYPES, TEMPERATURE, Case
from .contestants import Step, fastcl_backends
from .device import CPU
from .measure import differentiate, interleave, summary

_STEPS: dict[str, Step] = {
    "ntxent": lambda a, b: nt_xent(a, b, TEMPERATURE),
    "clip": lambda a, b: clip(a, b, TEMPERATURE),
}


def _variant(case: Case, keep: bool) -> Callable[[], float]:
    """Seconds of one step of ``case``."""
    contestant, inputs = fastcl_backends(("cpu",))[0], case.inputs()

    def run() -> float:
        cpu.keeps_exponentials = lambda *_: keep
        return CPU.seconds(lambda: differentiate(_STEPS[case.task], contestant, inputs))

    return run


def main(argv: list[str] | None = None) -> None:
    """Print a line per problem: median ms both ways, and the ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keeping", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--seconds", type=float, default=1.0, help="per problem")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    fastcl.set_workspace(4 * max(options.rows) ** 2 / 2**20)
    print(f"{'case':26}{'kept, ms':>12}{'recomputed':>12}{'ratio':>8}")
    for task in _STEPS:
        for dtype in DTYPES:
            for rows in options.rows:
                for width in options.widths:
                    case = Case(task, rows, width, dtype, rows)
                    runs = {str(keep): _variant(case, keep) for keep in (True, False)}
                    samples = interleave(runs, None, options.seconds)
                    kept, formed = (summary(samples[name])["median_ms"] for name in runs)
                    print(
                        f"{case.name:26}{kept:12.3g}{formed:12.3g}{formed / kept:8.2f}", flush=True
                    )


if __name__ == "__main__":
    main()

"""``python -m benchmarks.memory``: peak memory alone, at sizes whose truth takes minutes.

MB (2^20 bytes) beyond the inputs at the peak of one forward + backward, gradients included, each
in a fresh process.
"""

from __future__ import annotations

import argparse
from concurrent.futures.process import BrokenProcessPool

from . import measure
from .__main__ import fresh
from .cases import CASES

_CASES = ("ntxent-32768x128-fp32", "clip-16384x512-fp32", "queue-256x65536x128-fp32")


def main(argv: list[str] | None = None) -> None:
    """Print a line per case: the peak of every contestant asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--case", nargs="+", default=_CASES, choices=[c.name for c in CASES])
    parser.add_argument("--backends", nargs="+", default=["cpu"], help="of fastcl")
    parser.add_argument("--against", nargs="*", default=[], help="parts of the others' names")
    options = parser.parse_args(argv)
    settings = measure.Settings(backends=tuple(options.backends), against=tuple(options.against))
    for case in (c for c in CASES if c.name in options.case):
        peaks = []
        for contestant in settings.contestants():
            reason = contestant.refusal(case, measure.CPU.memory())
            try:
                peak = reason or fresh(
                    "forkserver", measure.peak_memory, case, contestant.name, settings
                )
            except BrokenProcessPool:
                peak = "killed"
            shown = peak if isinstance(peak, str) else f"{peak:.0f} MB"
            peaks.append(f"{contestant.name} {shown}")
        print(f"{case.name}: {', '.join(peaks)}", flush=True)


if __name__ == "__main__":
    main()

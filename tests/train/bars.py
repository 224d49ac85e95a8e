"""Does every method learn? Runs ``fastcl train METHOD --fast`` with three seeds and checks its bar.

    python tests/train/bars.py [METHOD ...] [--out FOLDER]

A run must take less than a minute of processor time for each seed, and the method's headline
metric must be above the untrained module's with every seed; for the methods named in SPREADS by
more than three times the largest spread over seeds of the two scores and of their difference.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from fastcl.trainers import METHODS

SEEDS = (0, 1, 2)
SECONDS = 60.0
SPREADS = ("simclr", "moco", "moco_v1", "instdisc", "supcon")


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(name: str, out: Path) -> tuple[str, bool]:
    """One line about a method, and whether it cleared its bar."""
    before = processor_seconds()
    command = [sys.executable, "-m", "fastcl.cli", "train", name, "--fast", "--overwrite"]
    command += ["--seeds", *map(str, SEEDS), "--out", str(out / name)]
    process = subprocess.run(command, capture_output=True, text=True)
    seconds = (processor_seconds() - before) / len(SEEDS)
    if process.returncode:
        return f"{name:<14}failed: {process.stderr.strip().splitlines()[-1]}", False
    results = json.loads((out / name / "results.json").read_text())
    headline = results["headline"]
    metric = headline["metric"]
    margins = [
        seed["scores"]["trained"][metric] - seed["scores"]["untrained"][metric]
        for seed in results["seeds"].values()
    ]
    times = headline["margin"] / headline["spread"] if headline["spread"] else float("inf")
    passed = min(margins) > 0 and seconds < SECONDS and (name not in SPREADS or times > 3)
    return (
        f"{name:<14}{metric:<22}{100 * headline['trained']:6.1f} {100 * headline['untrained']:9.1f}"
        f" {100 * headline['margin']:+7.1f} {times:8.1f} {seconds:7.0f} s"
        f"  {'passed' if passed else 'FAILED'}"
    ), passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    arguments = parser.parse_args()
    print(
        f"{'method':<14}{'metric, in %':<22}trained untrained  margin  spreads  per seed",
        flush=True,
    )
    every = True
    for name in arguments.methods:
        line, passed = measure(name, arguments.out)
        print(line, flush=True)
        every &= passed
    return 0 if every else 1


if __name__ == "__main__":
    sys.exit(main())

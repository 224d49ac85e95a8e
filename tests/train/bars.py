"""Does every method learn? Runs ``fastcl train METHOD --fast`` with three seeds and checks its bar.

    python tests/train/bars.py ["METHOD [option ...]" ...] [--out FOLDER]

A run must take less than a minute of processor time for each seed, and the method's headline
metric must be above the untrained module's with every seed; for the methods named in SPREADS by
more than three times the largest spread over seeds of the two scores and of their difference;
for those in LEAST it must also reach a share. FURTHER holds what else single methods must show.
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
# name -> whether the mean scores, by who was scored and metric, are good enough
FURTHER = {
    # five times the untrained encoder's recall above chance, of which it may have none
    "clip": lambda scores: (
        scores["trained"]["recall@10"] - scores["chance"]["recall@10"]
        >= 5 * max(scores["untrained"]["recall@10"] - scores["chance"]["recall@10"], 0.01)
    ),
    "clip_scenes": lambda scores: (
        scores["trained"]["text probe"] > scores["untrained"]["text probe"]
    ),
    "captioning": lambda scores: (
        scores["trained"]["self-retrieval"] > scores["trained"]["self-retrieval of MLE"]
    ),
}
SPREADS = ("simclr", "moco", "moco_v1", "instdisc", "supcon")
VARIANTS = ("cpc --objective cpc_bce", "cswm --world cubes")
LEAST = {"cpc": 0.95, "cpc --objective cpc_bce": 0.95, "cswm": 0.95}


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(name: str, out: Path) -> tuple[str, bool]:
    """One line about a method (and its options), and whether it cleared its bar."""
    folder = out / "-".join(name.replace("--", "").split())
    before = processor_seconds()
    command = [sys.executable, "-m", "fastcl.cli", "train", *name.split(), "--fast", "--overwrite"]
    command += ["--seeds", *map(str, SEEDS), "--out", str(folder)]
    process = subprocess.run(command, capture_output=True, text=True)
    seconds = (processor_seconds() - before) / len(SEEDS)
    if process.returncode:
        said = process.stderr.strip().splitlines() or ["no word of why"]
        return f"{name:<26}exit code {process.returncode}: {said[-1]}", False
    results = json.loads((folder / "results.json").read_text())
    headline = results["headline"]
    metric = headline["metric"]
    margins = [
        seed["scores"]["trained"][metric] - seed["scores"]["untrained"][metric]
        for seed in results["seeds"].values()
    ]
    worst = min(seed["scores"]["trained"][metric] for seed in results["seeds"].values())
    times = headline["margin"] / headline["spread"] if headline["spread"] else float("inf")
    means = {
        who: {name: entry["mean"] for name, entry in scores.items()}
        for who, scores in results["scores"].items()
    }
    further = FURTHER.get(name, lambda scores: True)(means)
    passed = min(margins) > 0 and seconds < SECONDS and (name not in SPREADS or times > 3)
    passed &= worst >= LEAST.get(name, 0.0)
    passed &= further
    return (
        f"{name:<26}{metric:<22}{100 * headline['trained']:6.1f} {100 * headline['untrained']:9.1f}"
        f" {100 * headline['margin']:+7.1f} {times:8.1f} {seconds:7.0f} s"
        f"  {'passed' if passed else 'FAILED'}"
    ), passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=[*METHODS, *VARIANTS], metavar="METHOD")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    arguments = parser.parse_args()
    print(
        f"{'method':<26}{'metric, in %':<22}trained untrained  margin  spreads  per seed",
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

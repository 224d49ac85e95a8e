"""``python -m benchmarks.training --out FILE``: what ``fastcl train`` reaches on a CPU, by seed.

SimCLR and MoCo on handwritten digits, CLIP between functions and docstrings, with the options they
come with, each in a process of its own through the command line. benchmarks.gpu's stage ``train``
does the same on a GPU and compares.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import machine

METHODS = ("simclr", "moco", "clip")
CONFIDENCE = 0.999


@dataclass(frozen=True)
class Run:
    """One call of the command line.

    Attributes:
        method: of ``fastcl train``.
        precision, accelerator: Lightning's names.
        seeds: trained one after the other.
        options: further arguments.
    """

    method: str
    precision: str = "32-true"
    accelerator: str = "cpu"
    seeds: tuple[int, ...] = (0, 1, 2)
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.method} {self.precision} {self.accelerator}"

    def arguments(self) -> list[str]:
        """Of ``fastcl``, but for the folder."""
        return [
            "train", self.method, "--seeds", *map(str, self.seeds), "--precision", self.precision,
            "--accelerator", self.accelerator, *self.options,
        ]  # fmt: skip

    def train(self, seconds: float | None = None) -> dict:
        """Train, and keep of the report what is compared.

        Raises:
            RuntimeError: the command failed, with the last line of what it said.
            subprocess.TimeoutExpired: it took longer than ``seconds``.
        """
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "fastcl", *self.arguments(), "--out", folder]
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
            if done.returncode:
                said = (done.stderr.strip() or "no word of why").splitlines()[-1]
                raise RuntimeError(f"exit code {done.returncode}: {said}")
            report = json.loads(Path(folder, "results.json").read_text())
        seeds = {}
        for seed, found in report["seeds"].items():
            training = found["seconds"]["training"]
            seeds[seed] = {
                "scores": found["scores"]["trained"],
                "seconds": training,
                "seconds_per_epoch": training / report["options"]["epochs"],
                "device": found["device"],
            }
        return {
            "method": self.method,
            "command": " ".join(["fastcl", *self.arguments()]),
            "data": report["data"],
            "scored_on": report["scored_on"],
            "headline": report["headline"]["metric"],
            "untrained": report["headline"]["untrained"],
            "seeds": seeds,
            "seconds": report["seconds"],
            "versions": report["versions"],
        }


def by_metric(record: dict) -> dict[str, list[float]]:
    """A run's scores by metric, seed by seed."""
    scores = [seed["scores"] for seed in record["seeds"].values()]
    return {metric: [one[metric] for one in scores] for metric in scores[0]}


def allowed(reference: Sequence[float], count: int, least: float) -> float:
    """How far the mean of ``count`` seeds may lie from that of ``reference``, other seeds' scores.

    Of ``count`` further seeds like those of the reference, 999 means in 1000 lie nearer (Student's
    t, both means being uncertain); at least ``least``, one held-out sample.
    """
    from scipy.stats import t

    n = len(reference)
    factor = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * math.sqrt(1 / count + 1 / n)
    return max(least, factor * statistics.stdev(reference))


def compare(record: dict, reference: dict) -> dict[str, dict[str, float]]:
    """By metric: means of a run and of the reference, their difference and what is allowed."""
    known, found = by_metric(reference), by_metric(record)
    least = 1 / reference["held_out"]
    return {
        metric: {
            "mean": statistics.fmean(values),
            "reference": statistics.fmean(known[metric]),
            "difference": statistics.fmean(values) - statistics.fmean(known[metric]),
            "allowed": allowed(known[metric], len(values), least),
        }
        for metric, values in found.items()
    }


def held_out(method: str) -> int:
    """How many samples the scores of ``method`` are shares of."""
    if method == "clip":
        from fastcl.data.code_search import load_code_search

        return len(load_code_search().test)
    from fastcl.data.digits import TEST_IMAGES

    return TEST_IMAGES


def main(argv: list[str] | None = None) -> None:
    """Train every method, two at a time; the file is written once all are done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    options = parser.parse_args(argv)
    runs = [Run(method, seeds=tuple(options.seeds)) for method in METHODS]
    with ThreadPoolExecutor(2) as threads:
        records = list(threads.map(Run.train, runs))
    for record in records:
        record["held_out"] = held_out(record["method"])
    found = {"machine": machine.describe(1), "runs": records}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The report of a run: table, pictures, results.json."""

from __future__ import annotations

import json
import math
import platform
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import fastcl
from fastcl.evaluation import figures
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.folder import LOG, RESULTS, RunFolder, write_atomically
from fastcl.trainers.methods import Method
from fastcl.trainers.options import TrainOptions

if TYPE_CHECKING:
    from fastcl.trainers.runner import SeedResult

CURVES, COMPARISON = "curves.png", "comparison.png"


@dataclass(frozen=True)
class Report:
    """A finished run: its options, every seed's result and the seconds it took.

    ``experiment`` is the first seed's, for names; ``pictures`` are the files it drew.
    """

    method: Method
    options: TrainOptions
    experiment: Experiment
    results: dict[int, SeedResult]
    pictures: list[str]
    seconds: float

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and sample standard deviation over seeds, by who was scored and metric."""
        seeds = list(self.results.values())
        return {
            name: {
                metric: mean_and_sd([seed.scores[name][metric] for seed in seeds])
                for metric in known
            }
            for name, known in seeds[0].scores.items()
        }

    def headline(self) -> dict[str, Any]:
        """The headline metric, trained minus untrained, and the largest spread over seeds of the
        two and of their difference."""
        metric = self.experiment.headline
        seeds = [result.scores for result in self.results.values()]
        trained, untrained = ([s[name][metric] for s in seeds] for name in ("trained", "untrained"))
        margins = [t - u for t, u in zip(trained, untrained, strict=True)]
        spread = max(mean_and_sd(values)["sd"] for values in (trained, untrained, margins))
        return {
            "metric": metric,
            "trained": statistics.fmean(trained),
            "untrained": statistics.fmean(untrained),
            "margin": statistics.fmean(margins),
            "spread": spread,
        }

    def as_json(self) -> dict[str, Any]:
        """Everything that is printed or drawn as numbers, and what is needed to repeat it."""
        return {
            "method": self.method.name,
            "data": self.experiment.data,
            "scored_on": self.options.report_on,
            "measured": self.experiment.measured,
            "options": asdict(self.options),
            "headline": self.headline(),
            "scores": self.summary(),
            "seeds": {
                str(seed): {
                    "scores": result.scores,
                    "last_epoch": {
                        name: value for name, value in result.rows[-1].items() if value == value
                    },
                    "details": result.details,
                    "seconds": result.seconds,
                    "device": result.device,
                }
                for seed, result in self.results.items()
            },
            "pictures": [CURVES, COMPARISON, *self.pictures],
            "seconds": self.seconds,
            "versions": versions(),
        }


def write_report(report: Report, folder: RunFolder, console: Console) -> None:
    """Write pictures and results.json into the folder and print the table."""
    figures.training_curves(
        {seed: result.rows for seed, result in report.results.items()},
        levels=report.experiment.levels,
        path=folder.path / CURVES,
    )
    figures.score_comparison(
        report.summary(),
        _labels(report),
        title=report.experiment.measured,
        path=folder.path / COMPARISON,
    )
    content = report.as_json()
    with write_atomically(folder.path / RESULTS) as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    console.print()
    console.print(_table(report))
    headline = content["headline"]
    console.print(
        f"{headline['metric']}: {100 * headline['margin']:+.1f} points against the untrained "
        "module" + (f", spread {100 * headline['spread']:.1f}" if len(report.results) > 1 else ""),
        highlight=False,
    )
    seeds = "seed-" + ("*" if len(report.results) > 1 else str(next(iter(report.results))))
    console.print(
        f"{report.seconds:.0f} s in all. Written to {folder.path}:\n"
        f"  {', '.join((RESULTS, *content['pictures']))}\n"
        f"  {seeds}/{LOG}, {seeds}/checkpoints",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _labels(report: Report) -> dict[str, str]:
    scored = next(iter(report.results.values())).scores
    given = {
        "trained": f"{report.method.title}, trained",
        "untrained": "the same, untrained",
    }
    return {name: given.get(name, name) for name in scored}


def _table(report: Report) -> Table:
    seeds = len(report.results)
    table = Table(
        title=f"{report.experiment.measured}, in %, on {report.options.report_on} data"
        + (f" (mean ± sd of {seeds} seeds)" if seeds > 1 else ""),
        title_justify="left",
    )
    # a narrow terminal breaks names where it must, rather than leave their ends out
    table.add_column("", overflow="fold")
    summary = report.summary()
    labels = _labels(report)
    for name, label in labels.items():
        style = "bold" if name == "trained" else None
        table.add_column(label, justify="right", overflow="fold", style=style)
    for metric in summary["trained"]:
        table.add_row(metric, *(score_cell(summary[name].get(metric), seeds) for name in labels))
    return table


def score_cell(entry: dict[str, float] | None, seeds: int) -> str:
    """A mean in %, with its spread where there are several seeds; empty for none."""
    if entry is None or math.isnan(entry["mean"]):
        return ""
    mean = f"{100 * entry['mean']:.1f}"
    return f"{mean} ± {100 * entry['sd']:.1f}" if seeds > 1 else mean


def mean_and_sd(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation over seeds."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on, where it is installed."""
    found = {"fastcl": fastcl.__version__, "python": platform.python_version()}
    for package in ("torch", "lightning", "kornia", "scikit-learn", "numpy", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

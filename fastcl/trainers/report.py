"""The report of a run: table, pictures, results.json."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

import fastcl
from fastcl.evaluation import figures
from fastcl.trainers.folder import LOG, PICTURES, RESULTS, RunFolder, write_atomically
from fastcl.trainers.options import ReportOptions, SimCLROptions

if TYPE_CHECKING:
    from fastcl.trainers.run import SeedResult

LABELS = {
    "pretrained": "SimCLR, pretrained",
    "untrained": "same encoder, untrained",
    "pixels": "raw pixels",
}


@dataclass(frozen=True)
class Report:
    """A finished run: its options, every seed's result and the seconds it took."""

    options: SimCLROptions
    report_options: ReportOptions
    results: dict[int, SeedResult]
    seconds: float

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and sample standard deviation over seeds, by representation and labels per class."""
        return {
            name: {
                count: _mean_and_sd([r.accuracy[name][count] for r in self.results.values()])
                for count in next(iter(self.results.values())).accuracy[name]
            }
            for name in LABELS
        }

    def as_json(self) -> dict[str, Any]:
        """Everything that is printed or drawn as numbers, and what is needed to repeat it."""
        return {
            "method": "simclr",
            "data": "scikit-learn digits",
            "scored_on": self.report_options.report_on,
            "options": asdict(self.options),
            "report_options": asdict(self.report_options),
            "linear_probe_accuracy": self.summary(),
            "seeds": {
                str(seed): {
                    "linear_probe_accuracy": result.accuracy,
                    "last_epoch": {
                        name: value for name, value in result.rows[-1].items() if value == value
                    },
                    "similarity_gap": {
                        str(epochs): _similarity_gap(matrix)
                        for epochs, matrix in result.similarity.items()
                    },
                    "seconds": result.seconds,
                }
                for seed, result in self.results.items()
            },
            "seconds": self.seconds,
            "versions": {
                "fastcl": fastcl.__version__,
                "python": platform.python_version(),
                **{
                    name: version(name)
                    for name in ("torch", "lightning", "kornia", "scikit-learn", "numpy")
                },
            },
        }


def write_report(report: Report, folder: RunFolder, console: Console) -> None:
    """Write pictures and results.json into the folder and print the table."""
    curves, similarity, comparison, views = (folder.path / name for name in PICTURES)
    first_seed, first = next(iter(report.results.items()))
    figures.training_curves(
        {seed: result.rows for seed, result in report.results.items()},
        candidates=2 * report.options.batch_size - 1,
        path=curves,
    )
    figures.similarity_matrices(
        first.similarity,
        [str(digit) for digit in range(len(first.views[0]))],
        path=similarity,
    )
    figures.view_grid(*first.views, path=views)
    figures.probe_comparison(
        report.summary(), LABELS, report.report_options.report_on, path=comparison
    )
    with write_atomically(folder.path / RESULTS) as file:
        json.dump(report.as_json(), file, indent=2)
        file.write("\n")
    console.print()
    console.print(_table(report))
    seeds = "seed-" + ("*" if len(report.results) > 1 else str(first_seed))
    console.print(
        f"{report.seconds:.0f} s in all. Written to {folder.path}:\n"
        f"  {', '.join((RESULTS, *PICTURES))}\n"
        f"  {seeds}/{LOG}, {seeds}/checkpoints",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _table(report: Report) -> Table:
    seeds = len(report.results)
    table = Table(
        title=f"Linear probe, % of {report.report_options.report_on} images right"
        + (f" (mean ± sd of {seeds} seeds)" if seeds > 1 else ""),
        title_justify="left",
    )
    table.add_column("labels per class")
    summary = report.summary()
    for count in summary["pixels"]:
        table.add_column(count, justify="right")
    for name, label in LABELS.items():
        cells = [_cell(entry, seeds) for entry in summary[name].values()]
        table.add_row(label, *cells, style="bold" if name == "pretrained" else None)
    return table


def _cell(entry: dict[str, float], seeds: int) -> str:
    mean = f"{100 * entry['mean']:.1f}"
    return f"{mean} ± {100 * entry['sd']:.1f}" if seeds > 1 else mean


def _mean_and_sd(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def _similarity_gap(matrix: torch.Tensor) -> float:
    """Mean similarity of the two views of an image minus that of views of different images."""
    count = len(matrix)
    positive = matrix.diagonal(count // 2).mean()
    others = ~torch.eye(count, dtype=torch.bool)
    others &= ~torch.eye(count, dtype=torch.bool).roll(count // 2, dims=1)
    return (positive - matrix[others].mean()).item()

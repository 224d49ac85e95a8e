"""The report of a transfer: table, CSV, pictures, results.json."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from fastcl.evaluation import figures
from fastcl.trainers.folder import RESULTS, write_atomically
from fastcl.trainers.methods import Method
from fastcl.trainers.methods.images import ImageOptions
from fastcl.trainers.methods.transfer import MODES, Amount, ClassifierOptions
from fastcl.trainers.report import mean_and_sd, versions

if TYPE_CHECKING:
    from fastcl.trainers.transfer import Trained

COLUMNS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
TABLE, COMPARISON, EMBEDDING = "table.csv", "comparison.png", "embedding.png"


@dataclass(frozen=True)
class TransferReport:
    """A finished transfer. ``results``: amount of labels, mode and seed to the classifier."""

    method: Method
    options: ImageOptions
    classifier: ClassifierOptions
    labels: list[str]
    seeds: list[int]
    data: str
    results: dict[str, dict[str, dict[int, Trained]]]
    seconds: float

    def summary(self) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """Last epoch's mean and sample standard deviation over seeds, by amount, mode, column; and
        "gap", test accuracy minus that of the classifier from scratch, of the same seed."""
        return {
            amount: {mode: self._row(modes, mode) for mode in modes}
            for amount, modes in self.results.items()
        }

    def _row(self, modes: dict[str, dict[int, Trained]], mode: str) -> dict[str, dict[str, float]]:
        last = {seed: trained.last for seed, trained in modes[mode].items()}
        row = {column: mean_and_sd([r[column] for r in last.values()]) for column in COLUMNS}
        scratch = modes["scratch"]
        gaps = [r["test_accuracy"] - scratch[s].last["test_accuracy"] for s, r in last.items()]
        return row | {"gap": mean_and_sd(gaps)}

    def as_json(self) -> dict[str, Any]:
        """Everything that is printed or drawn as numbers, and what is needed to repeat it."""
        return {
            "method": self.method.name,
            "data": self.data,
            "scored_on": self.options.report_on,
            "pretraining": asdict(self.options),
            "classifier": asdict(self.classifier),
            "modes": MODES,
            "last_epoch": self.summary(),
            "seeds": {
                str(seed): {
                    amount: {mode: asdict(trained[seed]) for mode, trained in modes.items()}
                    for amount, modes in self.results.items()
                }
                for seed in self.seeds
            },
            "seconds": self.seconds,
            "versions": versions(),
        }


def write_transfer_report(
    report: TransferReport,
    features: dict[str, torch.Tensor],
    labels: torch.Tensor,
    classes: tuple[str, ...],
    out: Path,
    console: Console,
) -> None:
    """Write table, pictures and results.json into ``out`` and print the table.

    Args:
        features: stage to features [N, D] of the scored images, of the first seed.
        labels: [N].
        classes: names by label.
    """
    pictures = []
    for amount in report.labels:
        name = f"curves-{Amount(amount).slug}.png"
        figures.classifier_curves(
            {
                label: [trained.rows for trained in report.results[amount][mode].values()]
                for mode, label in MODES.items()
            },
            title=Amount(amount).phrase,
            path=out / name,
        )
        pictures.append(name)
    summary = report.summary()
    figures.score_comparison(
        {
            mode: {
                Amount(amount).title: summary[amount][mode]["test_accuracy"]
                for amount in report.labels
            }
            for mode in MODES
        },
        MODES,
        title=f"{report.options.report_on.capitalize()} accuracy after {report.method.title} by "
        f"labels of {report.data}",
        path=out / COMPARISON,
    )
    figures.embedding(features, labels, classes, path=out / EMBEDDING)
    _write_csv(report, out / TABLE)
    with write_atomically(out / RESULTS) as file:
        json.dump(report.as_json(), file, indent=1)
        file.write("\n")
    console.print()
    for amount in report.labels:
        console.print(_table(report, amount))
    names = ", ".join((RESULTS, TABLE, *pictures, COMPARISON, EMBEDDING))
    console.print(
        f"{report.seconds:.0f} s in all. Written to {out}: {names};\n"
        "pretraining's own curves, views and similarity matrices in its folder pretraining",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _write_csv(report: TransferReport, path: Path) -> None:
    with write_atomically(path) as file:
        writer = csv.writer(file)
        writer.writerow(("labels", "mode", "seed", *COLUMNS, "seconds"))
        for amount, modes in report.results.items():
            for mode, trained in modes.items():
                for seed, one in trained.items():
                    numbers = [one.last[column] for column in COLUMNS]
                    writer.writerow((amount, mode, seed, *numbers, round(one.seconds, 2)))


def _table(report: TransferReport, amount: str) -> Table:
    seeds = len(report.seeds)
    table = Table(
        title=f"{report.data}, {Amount(amount).phrase}; epoch "
        f"{report.classifier.epochs}" + (f" (mean ± sd of {seeds} seeds)" if seeds > 1 else ""),
        title_justify="left",
    )
    table.add_column("")
    scored = report.options.report_on
    for name in ("train loss", "train acc. %", f"{scored} loss", f"{scored} acc. %", "gap"):
        table.add_column(name, justify="right")
    for mode, row in report.summary()[amount].items():
        cells = [_cell(row[name], seeds, name) for name in COLUMNS]
        gap = "" if mode == "scratch" else f"{100 * row['gap']['mean']:+.1f}"
        table.add_row(MODES[mode], *cells, gap)
    return table


def _cell(entry: dict[str, float], seeds: int, column: str) -> str:
    factor, digits = (100, 1) if column.endswith("accuracy") else (1, 4)
    mean = f"{factor * entry['mean']:.{digits}f}"
    return f"{mean} ± {factor * entry['sd']:.{digits}f}" if seeds > 1 else mean

"""Ablations: a method trained again and again with one setting varied."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastcl.evaluation import figures
from fastcl.trainers.folder import RESULTS, write_atomically
from fastcl.trainers.methods import METHODS
from fastcl.trainers.methods.studies import STUDIES, Study, Variant
from fastcl.trainers.options import TrainOptions, check_choice
from fastcl.trainers.report import mean_and_sd, score_cell, versions
from fastcl.trainers.runner import run

TABLE, PICTURE = "table.csv", "picture.png"


def run_study(
    study: Study | str,
    given: Mapping[str, Any],
    *,
    seeds: list[int],
    out: Path,
    fast: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train every variant with every seed; print a table, write it with a picture.

    Args:
        study: or its name in ``STUDIES``.
        given: options for every variant (``Study.options``); what a variant varies is its own.
        seeds: of each variant.
        out: folder; each variant is a run of ``fastcl train`` in a folder of its own below.
        fast: the methods' own short runs.
        resume: variants that are finished are not trained again.
        overwrite: start anew over what ``out`` holds.
        console: where the table goes; standard output by default.

    Returns:
        What was written to ``out``/results.json.

    Raises:
        UsageError, RunError: as :func:`fastcl.trainers.run`.
    """
    start = time.perf_counter()
    if isinstance(study, str):
        check_choice("study", study, tuple(STUDIES))
        study = STUDIES[study]
    for name in given:
        check_choice("given", name, tuple(study.options()))
    console = console or Console()
    lines: dict[str, dict[str, dict[str, float]]] = {}
    untrained: list[float] = []
    headline = ""
    for index, variant in enumerate(study.variants):
        report = run(
            variant.method, variant_options(variant, given, fast), seeds=seeds,
            out=out / _slug(index, variant), resume=resume, overwrite=overwrite,
            console=Console(quiet=True),
        )  # fmt: skip
        headline = report.experiment.headline
        scores = [result.scores for result in report.results.values()]
        entry = mean_and_sd([s["trained"][headline] for s in scores])
        lines.setdefault(variant.line, {})[variant.setting] = entry
        untrained += [s["untrained"][headline] for s in scores]
        console.print(
            f"[{index + 1}/{len(study.variants)}] {variant.line}, {study.axis} {variant.setting}: "
            f"{headline} {100 * entry['mean']:.1f} %",
            highlight=False, markup=False,
        )  # fmt: skip
    level = mean_and_sd(untrained)["mean"]
    figures.sweep(
        lines, title=study.title, xlabel=study.axis, ylabel=f"{headline}, %",
        level=("untrained encoder", level), path=out / PICTURE,
    )  # fmt: skip
    results = {
        "study": study.name,
        "metric": headline,
        "lines": lines,
        "untrained": level,
        "seeds": seeds,
        "given": dict(given),
        "fast": fast,
        "seconds": time.perf_counter() - start,
        "versions": versions(),
    }
    with write_atomically(out / TABLE) as file:
        writer = csv.writer(file)
        writer.writerow(("line", study.axis, f"{headline} mean", "sd"))
        for line, points in lines.items():
            for setting, entry in points.items():
                writer.writerow((line, setting, entry["mean"], entry["sd"]))
    with write_atomically(out / RESULTS) as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    console.print(_table(study, lines, headline, len(seeds)))
    console.print(f"Written to {out}: {RESULTS}, {TABLE}, {PICTURE}", highlight=False, markup=False)
    return results


def variant_options(variant: Variant, given: Mapping[str, Any], fast: bool) -> TrainOptions:
    """The options that a variant is trained with; arguments as for :func:`run_study`."""
    method = METHODS[variant.method]
    # monitors of runs that nobody looks at cost as much as they do
    quiet = {"knn_every": 10**6} if "knn_every" in method.option_names() else {}
    short = method.fast if fast else {}
    return method.options(**{**short, **quiet, **given, **variant.options})


def _slug(index: int, variant: Variant) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", f"{variant.line} {variant.setting}".lower()).strip("-")
    return f"{index:02d}-{words}"


def _table(
    study: Study, lines: dict[str, dict[str, dict[str, float]]], metric: str, seeds: int
) -> Table:
    table = Table(
        title=f"{study.title}: {metric}, %" + (f" (mean ± sd of {seeds} seeds)" * (seeds > 1)),
        title_justify="left",
    )
    settings = list(dict.fromkeys(setting for points in lines.values() for setting in points))
    table.add_column(study.axis)
    for setting in settings:
        table.add_column(setting, justify="right")
    for line, points in lines.items():
        table.add_row(line, *(score_cell(points.get(setting), seeds) for setting in settings))
    return table

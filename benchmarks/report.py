"""Tables for people, JSON for machines: ``python -m benchmarks.report DIR``.

Prints the tables of an earlier run again and draws its pictures anew; measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

_HEADER = (
    "contestant", "ms", "p10-p90", "x fastcl", "tuned ms", "x fastcl", "MB", "loss error",
    "gradient error", "% ceiling",
)  # fmt: skip


def is_ours(name: str) -> bool:
    """Whether a contestant is a backend of fastcl."""
    return name.startswith("fastcl ")


def print_machine(machine: dict) -> None:
    """Where the numbers come from, and how to read a table."""
    print(
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {machine['torch']}, fastcl {machine['fastcl']}, {machine['date']}, "
        f"load {machine['load']:.1f}"
    )
    print(
        "Forward + backward with normalisation, medians. 'x fastcl': time divided by that of the "
        "first fastcl row\nin the same process. 'tuned': a process with oneDNN for fp32 products "
        "and an allocator that keeps its pages.\n'MB': peak beyond the inputs. Errors are relative "
        "to float64. '% ceiling': minimal flop over the best torch.mm\nof either process (tuned is "
        "oneDNN's, for fastcl rows only)."
    )


def ratio(records: dict[str, dict], name: str, tuned: bool = False) -> float | None:
    """Time of ``name`` over that of the first fastcl contestant, in one process."""
    chosen = {n: r.get("tuned", {}) if tuned else r for n, r in records.items()}
    if name not in chosen:
        return None
    ours = next((r for n, r in chosen.items() if is_ours(n)), {})
    if "median_ms" not in ours or "median_ms" not in chosen[name]:
        return None
    return chosen[name]["median_ms"] / ours["median_ms"]


def of_ceiling(result: dict, name: str) -> float | None:
    """Minimal flop per second of ``name`` over the best product's, both processes' best."""
    record = result["contestants"][name]
    if "median_ms" not in record or not is_ours(name):
        return None
    best = max(result["ceiling"]["best"], result["tuned_ceiling"]["best"])
    return result["flop"] / (record["median_ms"] * 1e6) / best


def _rows(result: dict) -> list[tuple[str, ...]]:
    """Cells of every contestant that was timed."""
    records = result["contestants"]
    rows = []
    for name, record in records.items():
        if "median_ms" not in record:
            continue
        tuned = record.get("tuned", {})
        share = of_ceiling(result, name)
        rows.append(
            (
                name,
                number(record["median_ms"]),
                f"{number(record['p10_ms'])}-{number(record['p90_ms'])}",
                number(ratio(records, name)),
                number(tuned.get("median_ms")),
                number(ratio(records, name, tuned=True)),
                number(record.get("memory_mb")),
                f"{record['loss_error']:.0e}",
                f"{record['gradient_error']:.0e}",
                "" if share is None else f"{100 * share:.0f}",
            )
        )
    return rows


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def fastest(records: dict[str, dict], tuned: bool) -> tuple[str, float] | None:
    """The fastest other contestant of a process, and its time over fastcl's."""
    factors = {n: ratio(records, n, tuned) for n in records if not is_ours(n)}
    timed = {n: factor for n, factor in factors.items() if factor is not None}
    return min(timed.items(), key=lambda item: item[1]) if timed else None


def print_case(result: dict) -> None:
    """One table; then who is missing and why."""
    records = result["contestants"]
    _print_table(result["case"], _HEADER, _rows(result))
    best = fastest(records, tuned=True)
    words = f"best-tuned peer: {best[0]}, {best[1]:.2f}x fastcl's time. " if best else ""
    default, tuned = result["ceiling"], result["tuned_ceiling"]
    print(
        f"{words}torch.mm {result['dtype']}, GFLOP/s: {default['best']:.0f} "
        f"(median {default['median']:.0f}), tuned {tuned['best']:.0f} ({tuned['median']:.0f})"
    )
    for name, record in records.items():
        for where, chosen in (("", record), (" tuned", record.get("tuned", {}))):
            if "reason" in chosen and (not where or "reason" not in record):
                print(f"  not timed: {name}{where}: {chosen['reason']}")


def print_overview(results: dict) -> None:
    """One line per case: fastcl's figures, and how many times longer or larger others are."""
    rows = []
    for result in results["cases"]:
        records = result["contestants"]
        ours = next((r for n, r in records.items() if is_ours(n) and "median_ms" in r), None)
        if ours is None:
            continue
        eager = records.get("eager", {}).get("memory_mb")
        best = [fastest(records, tuned) for tuned in (False, True)]
        rows.append(
            (
                result["case"],
                f"{number(ours['median_ms'])} ({number(ours['p10_ms'])}-{number(ours['p90_ms'])})",
                number(ours.get("memory_mb")),
                f"{ours['gradient_error']:.0e}",
                number(ratio(records, "eager")),
                number(eager),
                number(ratio(records, "torch.compile")),
                *(f"{number(b[1])} {b[0]}" if b else "-" for b in best),
            )
        )
    header = (
        "case", "fastcl ms (p10-p90)", "MB", "grad error", "eager x", "its MB", "compiled x",
        "fastest other x", "and tuned x",
    )  # fmt: skip
    _print_table("All cases; x: time over fastcl's, below 1 fastcl is slower", header, rows)


def _print_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """rich's table if it is importable, else plain text."""
    print()
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(title, header, rows))
        return
    table = Table(title=title, title_justify="left")
    for index, text in enumerate(header):
        table.add_column(text, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console = console if console.is_terminal else Console(width=170)
    console.print(table)


def plain(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table as text; the first column to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [title]
    for row in [header, *rows]:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)


def write_json(results: dict, file: Path) -> None:
    """Everything measured so far."""
    file.write_text(json.dumps(results, indent=1) + "\n")


def load(folder: Path) -> dict:
    """What an earlier run wrote: results.json, or a GPU run's peers.json in the same form.

    Raises:
        FileNotFoundError: ``folder`` holds neither.
    """
    file = folder / "results.json"
    if file.exists():
        return json.loads(file.read_text())
    found = json.loads((folder / "peers.json").read_text())
    device = found["device_before"].get("device")
    cases = [record for record in found["records"] if "contestants" in record]
    return {"machine": found["machine"] | {"device": device}, "cases": cases}


def show(results: dict, folder: Path) -> None:
    """The overview, and both pictures into ``folder``."""
    from . import pictures  # which reads a table's ratios here

    print_overview(results)
    pictures.draw(results, folder)


def main(argv: list[str] | None = None) -> int:
    """Print every table of a folder and draw its pictures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="what --out was")
    folder = parser.parse_args(argv).folder
    try:
        results = load(folder)
    except FileNotFoundError:
        print(f"{folder} holds neither results.json nor peers.json", file=sys.stderr)
        return 2
    print_machine(results["machine"])
    for result in results["cases"]:
        if "ceiling" in result:  # a GPU's tables are in its summary.txt
            print_case(result)
    show(results, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

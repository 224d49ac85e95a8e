"""Tables for people, JSON for machines, and one picture."""

from __future__ import annotations

import json
from pathlib import Path

_HEADER = (
    "contestant", "ms", "p10-p90", "x fastcl", "tuned ms", "x fastcl", "MB", "loss error",
    "gradient error", "% ceiling",
)  # fmt: skip
_LIBRARIES = "fastcl "  # what every contestant of ours begins with


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
    ours = next((r for n, r in chosen.items() if n.startswith(_LIBRARIES)), {})
    if "median_ms" not in ours or "median_ms" not in chosen[name]:
        return None
    return chosen[name]["median_ms"] / ours["median_ms"]


def of_ceiling(result: dict, name: str) -> float | None:
    """Minimal flop per second of ``name`` over the best product's, both processes' best."""
    record = result["contestants"][name]
    if "median_ms" not in record or not name.startswith(_LIBRARIES):
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


def _best_peer(records: dict[str, dict]) -> str:
    """The fastest other contestant of the tuned process, in words."""
    others = {n: r["tuned"] for n, r in records.items() if not n.startswith(_LIBRARIES)}
    timed = {n: t["median_ms"] for n, t in others.items() if "median_ms" in t}
    if not timed:
        return ""
    best = min(timed, key=timed.get)
    factor = ratio(records, best, tuned=True)
    return "" if factor is None else f"best-tuned peer: {best}, {factor:.2f}x fastcl's time. "


def print_case(result: dict) -> None:
    """One table: rich's if importable, else plain text; then who is missing and why."""
    records, rows = result["contestants"], _rows(result)
    print()
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(result["case"], _HEADER, rows))
    else:
        table = Table(title=result["case"], title_justify="left")
        for index, text in enumerate(_HEADER):
            table.add_column(text, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console = Console()
        console = console if console.is_terminal else Console(width=150)
        console.print(table)
    default, tuned = result["ceiling"], result["tuned_ceiling"]
    print(
        f"{_best_peer(records)}torch.mm {result['dtype']}, GFLOP/s: {default['best']:.0f} "
        f"(median {default['median']:.0f}), tuned {tuned['best']:.0f} ({tuned['median']:.0f})"
    )
    for name, record in records.items():
        for where, chosen in (("", record), (" tuned", record.get("tuned", {}))):
            if "reason" in chosen and (not where or "reason" not in record):
                print(f"  not timed: {name}{where}: {chosen['reason']}")


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


# ------------------------------------------------------------------------------------- picture


def _curves(results: dict) -> tuple[int, dict[str, list[tuple[int, float, float | None]]]]:
    """NT-Xent in fp32 at the width with most sizes: contestant -> (rows, ms, MB)."""
    cases = [c for c in results["cases"] if c["task"] == "ntxent" and c["dtype"] == "fp32"]
    widths = [c["width"] for c in cases]
    if not widths:
        return 0, {}
    width = max(sorted(set(widths)), key=widths.count)
    curves: dict[str, list] = {}
    for case in sorted((c for c in cases if c["width"] == width), key=lambda c: c["rows"]):
        for name, record in case["contestants"].items():
            if "median_ms" in record:
                point = (case["rows"], record["median_ms"], record.get("memory_mb"))
                curves.setdefault(name, []).append(point)
    return width, curves


def draw(results: dict, file: Path) -> None:
    """Time and peak memory of NT-Xent against the number of rows; needs matplotlib."""
    width, curves = _curves(results)
    if not curves:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2), (1, 2), ("time, ms", "peak memory beyond inputs, MB"), strict=True
    ):
        for name, points in curves.items():
            ours = name.startswith(_LIBRARIES)
            kept = [p for p in points if p[column]]
            axes.plot(
                [p[0] for p in kept], [p[column] for p in kept], marker="o", label=name,
                linewidth=2.4 if ours else 1.3, linestyle="-" if ours else "--",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="rows N", ylabel=label)
        sizes = sorted({p[0] for points in curves.values() for p in points})
        axes.set_xticks(sizes, [str(s) for s in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    machine = results["machine"]
    figure.suptitle(
        f"NT-Xent forward + backward, D = {width}, fp32, {machine['threads']} threads, "
        f"{machine['processor']}, torch {machine['torch']}"
    )
    figure.savefig(file, dpi=130)

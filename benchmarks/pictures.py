"""Two pictures of what was measured: NT-Xent against its size, and where fastcl does not pay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .report import is_ours, ratio

_MARKERS = {"ntxent": "o", "dcl": "p", "supcon": "^", "clip": "s", "siglip": "D", "queue": "X"}
_TICKS = (0.01, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw(results: dict, folder: Path) -> None:
    """Write picture.png and crossover.png into ``folder``; needs matplotlib."""
    try:
        import matplotlib.figure
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return
    new = matplotlib.figure.Figure
    draw_sizes(results, new(figsize=(11, 4.6), layout="constrained"), folder / "picture.png")
    draw_crossover(results, new(figsize=(12, 5), layout="constrained"), folder / "crossover.png")


def _where(results: dict) -> str:
    """The machine, in a title's words."""
    machine = results["machine"]
    device = machine.get("device") or f"{machine['threads']} threads, {machine['processor']}"
    return f"{device}, torch {machine['torch']}"


# ------------------------------------------------------------------------ time and memory by size


def curves(results: dict) -> tuple[tuple[int, str], dict[str, list[tuple]]]:
    """NT-Xent of the width and dtype with most sizes: contestant -> (rows, ms, MB) by rows."""
    cases = sorted(
        (c for c in results["cases"] if c["task"] == "ntxent"), key=lambda case: case["rows"]
    )
    kinds = [(case["width"], case["dtype"]) for case in cases]
    if not kinds:
        return (0, ""), {}
    kind = max(dict.fromkeys(kinds), key=kinds.count)
    found: dict[str, list[tuple]] = {}
    for case in (c for c, k in zip(cases, kinds, strict=True) if k == kind):
        for name, record in case["contestants"].items():
            if "median_ms" in record:
                point = (case["rows"], record["median_ms"], record.get("memory_mb"))
                found.setdefault(name, []).append(point)
    return kind, found


def draw_sizes(results: dict, figure: Any, file: Path) -> None:
    """Time and peak memory of NT-Xent against the number of rows."""
    (width, dtype), lines = curves(results)
    if not lines:
        return
    labels = {1: "time, ms", 2: "peak memory beyond inputs, MB"}
    known = [c for c in labels if any(p[c] for points in lines.values() for p in points)]
    for axes, column in zip(figure.subplots(1, len(known), squeeze=False)[0], known, strict=True):
        for name, points in lines.items():
            kept = [p for p in points if p[column]]
            axes.plot(
                [p[0] for p in kept], [p[column] for p in kept], marker="o", label=name,
                linewidth=2.4 if is_ours(name) else 1.3, linestyle="-" if is_ours(name) else "--",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="rows N", ylabel=labels[column])
        sizes = sorted({p[0] for points in lines.values() for p in points})
        axes.set_xticks(sizes, [str(s) for s in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(f"NT-Xent forward + backward, D = {width}, {dtype}; {_where(results)}")
    figure.savefig(file, dpi=130)


# --------------------------------------------------------------------------------- where it pays


def crossings(results: dict, tuned: bool) -> Iterator[tuple[str, dict, float]]:
    """Other contestant, case, and its time over fastcl's in the same process."""
    for case in results["cases"]:
        for name in case["contestants"]:
            factor = None if is_ours(name) else ratio(case["contestants"], name, tuned)
            if factor is not None:
                yield name, case, factor


def draw_crossover(results: dict, figure: Any, file: Path) -> None:
    """Everybody's time over fastcl's against the size of the problem; below 1 fastcl loses."""
    from matplotlib.lines import Line2D

    titles = {False: "as installed", True: "everybody tuned (oneDNN, kept pages)"}
    panels = {tuned: list(crossings(results, tuned)) for tuned in titles}
    points = [point for panel in panels.values() for point in panel]
    if not points:
        return
    shown = [tuned for tuned, panel in panels.items() if panel]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(p[0] for p in points))}
    least, most = (pick([1.0, *(p[2] for p in points)]) for pick in (min, max))
    low, high = min(0.7, least / 1.2), max(2.0, most * 1.3)
    for axes, tuned in zip(
        figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True
    ):
        for name, case, factor in panels[tuned]:
            axes.plot(
                case["rows"] * case["keys"] * case["width"], factor, _MARKERS[case["task"]],
                color=colours[name], markersize=7, alpha=0.85,
                fillstyle="full" if case["dtype"] in ("fp32", "tf32") else "none",
            )  # fmt: skip
        axes.axhline(1, color="black", linewidth=1)
        axes.axhspan(low, 1, color="tab:red", alpha=0.08)
        axes.text(0.02, 0.02, "fastcl slower", transform=axes.transAxes, color="tab:red")
        axes.set(
            xscale="log", yscale="log", ylim=(low, high), title=titles[tuned],
            xlabel="size of the problem, N x M x D",
        )  # fmt: skip
        ticks = [tick for tick in _TICKS if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.tick_params(axis="y", which="minor", left=False, labelleft=False)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("its time / fastcl's time")
    tasks = dict.fromkeys(case["task"] for _, case, _ in points)
    handles = [Line2D([], [], color=c, marker=".", ls="", label=n) for n, c in colours.items()]
    handles += [
        Line2D([], [], color="grey", marker=_MARKERS[task], ls="", label=task) for task in tasks
    ]
    handles.append(
        Line2D([], [], color="grey", marker="o", fillstyle="none", ls="", label="16 bits: hollow")
    )
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.suptitle(f"Where fastcl pays, forward + backward; {_where(results)}", x=0.01, ha="left")
    figure.savefig(file, dpi=130)

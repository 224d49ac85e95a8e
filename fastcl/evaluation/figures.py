"""Pictures of a pretraining run, drawn without a display; each function writes one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

_DPI = 130
_GREY = "#666666"
_COLOURS = ("#1f6f8b", "#d1783a", "#5a8f3d", "#8a5a9e", "#b0413e", "#777777")


def training_curves(
    histories: Mapping[int, Sequence[Mapping[str, float]]],
    *,
    levels: Mapping[str, float],
    path: Path,
) -> None:
    """Every logged metric by epoch, one panel for each and one line for each seed.

    Args:
        histories: seed to rows with "epoch" and metrics; NaN or absent where not measured.
            Accuracies are drawn in %.
        levels: metric to the value that chance gives, drawn dashed.
        path: PNG file.
    """
    names = dict.fromkeys(name for rows in histories.values() for row in rows for name in row)
    panels = [name for name in names if name != "epoch"]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = _figure(lines, columns, size=(4.4 * columns, 3.6 * lines))
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, name in zip(axes.flat, panels, strict=False):
        factor = 100.0 if name.endswith("accuracy") else 1.0
        for colour, (seed, rows) in zip(_cycle(len(histories)), histories.items(), strict=True):
            points = [(r["epoch"], factor * r[name]) for r in rows if name in r]
            points = [point for point in points if point[1] == point[1]]
            marker = "o" if len(points) < 3 else None
            axis.plot(*zip(*points), color=colour, lw=1.5, marker=marker, label=f"seed {seed}")  # noqa: B905
        if name in levels:
            axis.axhline(factor * levels[name], color=_GREY, lw=1.0, ls="--", label="chance")
        axis.set_title(name.replace("_", " ") + (", %" if factor > 1 else ""), loc="left")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def similarity_matrices(
    matrices: Mapping[int, torch.Tensor], names: Sequence[str], *, path: Path
) -> None:
    """Heat maps of the [2V, 2V] similarities of V images' two views.

    The diagonal (a view with itself) is masked; the partners i and i + V are framed.

    Args:
        matrices: epochs done to the matrix; first before training, last at the end.
        names: of the V images.
        path: PNG file.
    """
    labels = [*names, *(f"{name}'" for name in names)]
    figure, axes = _figure(1, len(matrices), size=(4.3 * len(matrices) + 0.8, 4.7))
    stages = {0: "before training", len(matrices) - 1: "at the end"}
    image = None
    for index, (axis, (epochs, matrix)) in enumerate(zip(axes.flat, matrices.items(), strict=True)):
        size = len(matrix)
        shown = np.ma.array(matrix.float().numpy(), mask=np.eye(size, dtype=bool))
        image = axis.imshow(shown, cmap="RdBu_r", vmin=-1.0, vmax=1.0)
        axis.set_facecolor("#d9d9d9")
        for row in range(size):
            corner = ((row + size // 2) % size - 0.5, row - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, ec="black", lw=1.4))
        axis.set_title(f"{stages.get(index, 'half-way')} ({epochs} epochs)", loc="left")
        axis.set_xticks(range(size), labels, fontsize=8)
        axis.set_yticks(range(size), labels, fontsize=8)
        axis.tick_params(length=0)
    figure.suptitle(
        f"Cosine similarity of the projections of two views (x, x') of {len(names)} digits; "
        "frames mark two views of one image",
        x=0.01,
        ha="left",
    )
    if image is not None:
        figure.colorbar(image, ax=list(axes.flat), shrink=0.8, pad=0.015)
    _save(figure, path)


def view_grid(
    first: torch.Tensor, second: torch.Tensor, *, path: Path, title: str | None = None
) -> None:
    """Two rows of V images: column i holds the two views i and i + V of one image.

    Args:
        first, second: [V, C, H, W] with C = 1 or 3; values outside [0, 1] are clipped.
        path: PNG file.
        title: says which images are one by default.
    """
    count = len(first)
    figure, axes = _figure(2, count, size=(1.15 * count, 2.9))
    for row, views in enumerate((first, second)):
        for column, view in enumerate(views.detach().cpu().float().clamp(0, 1)):
            axis = axes[row, column]
            pixels = view.permute(1, 2, 0).squeeze(-1).numpy()
            axis.imshow(pixels, cmap="gray", vmin=0.0, vmax=1.0)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(str(row * count + column), fontsize=9, labelpad=2)
    title = title or f"Two views of {count} images: i and i + {count} are one image"
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def score_comparison(
    summary: Mapping[str, Mapping[str, Mapping[str, float]]],
    names: Mapping[str, str],
    *,
    title: str,
    path: Path,
) -> None:
    """Bars of scores in % by metric, one colour for each of those who were scored.

    Args:
        summary: who to metric to {"mean", "sd"}, fractions; a metric may be missing.
        names: who to its name in the legend.
        title: of the picture.
        path: PNG file.
    """
    metrics = list(dict.fromkeys(metric for known in summary.values() for metric in known))
    figure, axes = _figure(1, 1, size=(max(6.5, 1.8 * len(metrics)), 4.6))
    axis = axes[0, 0]
    width = 0.8 / len(names)
    values = []
    for index, ((key, name), colour) in enumerate(
        zip(names.items(), _cycle(len(names)), strict=True)
    ):
        known = {place: summary[key][m] for place, m in enumerate(metrics) if m in summary[key]}
        means = [100 * entry["mean"] for entry in known.values()]
        bars = axis.bar(
            np.array(list(known)) + (index - (len(names) - 1) / 2) * width,
            means,
            0.92 * width,
            yerr=[100 * entry["sd"] for entry in known.values()],
            color=colour,
            capsize=3,
            label=name,
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        values += means
    # The differences are what the picture is for; the axis says that it does not start at zero.
    axis.set_ylim(min(0.0, *values) if min(values) < 30 else 10 * (min(values) // 10) - 10, 104)
    axis.set_xticks(range(len(metrics)), metrics)
    axis.set_ylabel("%")
    axis.set_title(title, loc="left", wrap=True)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    figure.legend(frameon=False, loc="outside lower center", ncols=min(4, len(names)), fontsize=9)
    _save(figure, path)


def classifier_curves(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], *, title: str, path: Path
) -> None:
    """Loss and accuracy by epoch, in training and on held-out data; a colour per classifier.

    Args:
        histories: classifier to one list of rows per seed, with "epoch", "train_loss",
            "train_accuracy", "test_loss", "test_accuracy"; the line is the mean over seeds and
            the band its standard deviation.
        title: of the picture.
        path: PNG file.
    """
    panels = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    figure, axes = _figure(2, 2, size=(10.0, 7.0))
    for axis, name in zip(axes.flat, panels, strict=True):
        factor = 100.0 if name.endswith("accuracy") else 1.0
        for colour, (label, seeds) in zip(_cycle(len(histories)), histories.items(), strict=True):
            epochs = [row["epoch"] for row in seeds[0]]
            values = factor * np.array([[row[name] for row in rows] for rows in seeds])
            mean, spread = values.mean(0), values.std(0)
            axis.plot(epochs, mean, color=colour, lw=1.6, label=label)
            if len(seeds) > 1:
                axis.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15)
        kind, what = name.split("_")
        unit = ", %" if factor > 1 else ""
        axis.set_title(f"{'training' if kind == 'train' else 'held-out'} {what}{unit}", loc="left")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
        if factor == 1.0:
            axis.set_yscale("log")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left")
    _save(figure, path)


def pair_distances(
    stages: Mapping[int, tuple[torch.Tensor, torch.Tensor]], *, path: Path, most: int = 6
) -> None:
    """Histograms of the distances of pairs within a class and between classes, by epoch.

    Args:
        stages: number of epochs done to the two kinds' distances [N] and [M].
        path: PNG file.
        most: of the epochs that are shown, evenly spaced, the first and the last among them.
    """
    chosen = np.unique(np.linspace(0, len(stages) - 1, min(most, len(stages))).round().astype(int))
    shown = {epochs: stages[epochs] for epochs in np.array(sorted(stages))[chosen].tolist()}
    figure, axes = _figure(1, len(shown), size=(2.9 * len(shown), 3.2))
    furthest = max(distances.max().item() for pair in shown.values() for distances in pair)
    edges = np.linspace(0.0, 1.02 * furthest or 1.0, 41)
    for axis, (epochs, pair) in zip(axes.flat, shown.items(), strict=True):
        for colour, name, distances in zip(_COLOURS, ("within", "between"), pair, strict=False):
            axis.hist(distances.numpy(), edges, color=colour, alpha=0.7, density=True, label=name)
        axis.set_title(f"{epochs} epochs", loc="left")
        axis.set_xlabel("distance")
        axis.set_yticks([])
    axes[0, 0].legend(frameon=False, fontsize=8, title="classes", title_fontsize=8)
    _save(figure, path)


def roc_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, path: Path) -> None:
    """Shares of true positives over those of false ones, the latter on a logarithmic axis.

    Args:
        curves: name to (false positives [T], true positives [T]), fractions, drawn in %.
        path: PNG file.
    """
    figure, axes = _figure(1, 1, size=(5.6, 4.4))
    axis = axes[0, 0]
    for colour, (name, (false, true)) in zip(_cycle(len(curves)), curves.items(), strict=True):
        axis.step(100 * false, 100 * true, color=colour, lw=1.6, where="post", label=name)
    chance = np.linspace(0.1, 100.0, 200)
    axis.plot(chance, chance, color=_GREY, lw=1.0, ls="--", label="chance")
    axis.set_xscale("log")
    axis.set_xlim(0.1, 100)
    axis.set_ylim(0, 102)
    axis.set_xlabel("pairs of different labels accepted, %")
    axis.set_ylabel("pairs of equal labels accepted, %")
    axis.set_title("Verification of pairs", loc="left")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


def embedding(
    stages: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    classes: Sequence[str],
    *,
    path: Path,
    most: int = 1000,
) -> None:
    """Features in two dimensions (t-SNE of each stage by itself), coloured by class.

    Args:
        stages: stage to features [N, D] of the same images.
        labels: [N].
        classes: names by label.
        path: PNG file.
        most: of the images that are shown, evenly spaced.
    """
    from sklearn.manifold import TSNE

    chosen = torch.linspace(0, len(labels) - 1, min(most, len(labels))).round().long()
    shown = labels.cpu()[chosen].numpy()
    figure, axes = _figure(1, len(stages), size=(3.6 * len(stages), 4.2))
    colours = matplotlib.colormaps["tab10" if len(classes) <= 10 else "gist_rainbow"]
    for axis, (name, features) in zip(axes.flat, stages.items(), strict=True):
        rows = torch.nn.functional.normalize(features.cpu().float()[chosen], dim=1).numpy()
        perplexity = min(30.0, (len(rows) - 1) / 3)
        points = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(rows)
        for label, title in enumerate(classes):
            own = points[shown == label]
            share = label / max(1, len(classes) - 1) if len(classes) > 10 else label
            axis.scatter(own[:, 0], own[:, 1], s=7, color=colours(share), label=title)
        axis.set_title(name, loc="left")
        axis.set_xticks([])
        axis.set_yticks([])
    if len(classes) <= 20:
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, names, frameon=False, loc="outside lower center", ncols=10, markerscale=2
        )
    figure.suptitle(f"t-SNE of the features of {len(shown)} held-out images", x=0.01, ha="left")
    _save(figure, path)


def sweep(
    series: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    level: tuple[str, float] | None,
    path: Path,
) -> None:
    """A score over settings: lines where the settings are numbers, bars where they are names.

    Args:
        series: name of the line to setting to {"mean", "sd"}, fractions, drawn in %.
        title, xlabel, ylabel: of the picture.
        level: name and fraction of a dashed line, such as the untrained encoder's.
        path: PNG file.
    """
    settings = list(dict.fromkeys(setting for points in series.values() for setting in points))
    try:
        places = {setting: float(setting) for setting in settings}
        numeric = len(settings) > 1
    except ValueError:
        numeric = False
    if not numeric:
        places = {setting: float(index) for index, setting in enumerate(settings)}
    figure, axes = _figure(1, 1, size=(max(6.0, 0.9 * len(settings) + 2.5), 4.4))
    axis = axes[0, 0]
    for index, (colour, (name, points)) in enumerate(
        zip(_cycle(len(series)), series.items(), strict=True)
    ):
        x = np.array([places[setting] for setting in points])
        mean = [100 * entry["mean"] for entry in points.values()]
        spread = [100 * entry["sd"] for entry in points.values()]
        if numeric:
            axis.errorbar(x, mean, spread, color=colour, marker="o", capsize=3, lw=1.6, label=name)
        else:
            width = 0.8 / len(series)
            shift = (index - (len(series) - 1) / 2) * width
            bars = axis.bar(x + shift, mean, 0.92 * width, yerr=spread, color=colour, capsize=3,
                            label=name)  # fmt: skip
            axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    if numeric and min(places.values()) > 0 and max(places.values()) >= 8 * min(places.values()):
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(list(places.values()), settings, rotation=0 if numeric else 20)
    if level is not None:
        axis.axhline(100 * level[1], color=_GREY, lw=1.0, ls="--", label=level[0])
    means = [100 * entry["mean"] for points in series.values() for entry in points.values()]
    drawn = [*means, *([100 * level[1]] if level else [])]
    lowest, highest = min(drawn), max(drawn)
    axis.set_ylim(
        max(0.0, 10 * (lowest // 10) - 10) if lowest > 30 else 0.0,
        min(102.0, 10 * (highest // 10) + 20),
    )
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_title(title, loc="left", wrap=True)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    axis: Axes
    for axis in axes.flat:
        axis.title.set_fontsize(10.5)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png")


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]

"""Pictures of methods that predict; each function writes one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.gridspec import GridSpecFromSubplotSpec
from matplotlib.ticker import MaxNLocator

from fastcl.evaluation.figures import _COLOURS, _GREY, _figure, _save


def continuations(
    table: torch.Tensor,
    contexts: Sequence[str],
    followers: Sequence[str],
    sequences: torch.Tensor,
    follows: torch.Tensor,
    context_steps: int,
    *,
    path: Path,
) -> None:
    """Mean scores of contexts with continuations, and some of the sequences.

    Args:
        table: [G, G], row i is context i, which continuation i follows.
        contexts, followers: G names each.
        sequences: [R, T, 1, H, W].
        follows: [R], whether the end of a sequence follows from its beginning.
        context_steps: images that belong to the context.
        path: PNG file.
    """
    figure, axes = _figure(1, 2, size=(11.5, 4.8))
    heat, strip = axes.flat
    centred = table - table.mean(dim=1, keepdim=True)  # a softmax sees no more
    image = heat.imshow(centred.numpy(), cmap="viridis")
    heat.set_xticks(range(len(followers)), followers)
    heat.set_yticks(range(len(contexts)), contexts)
    heat.set_xlabel("continuation")
    heat.set_ylabel("context")
    heat.set_title("Score of a continuation, less the row's mean", loc="left")
    figure.colorbar(image, ax=heat, shrink=0.8)
    place = strip.get_subplotspec()
    strip.remove()
    rows, steps = sequences.shape[:2]
    assert place is not None
    grid = GridSpecFromSubplotSpec(rows, steps, subplot_spec=place, wspace=0.1, hspace=0.5)
    for row in range(rows):
        for step in range(steps):
            axis = figure.add_subplot(grid[row, step])
            axis.imshow(sequences[row, step, 0].numpy(), cmap="gray_r", vmin=0.0, vmax=1.0)
            axis.set_xticks([])
            axis.set_yticks([])
            colour = _GREY if step < context_steps else _COLOURS[0 if follows[row] else 4]
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=1.6)
            if step == 0:
                axis.set_title("context", loc="left", fontsize=9, color=colour)
            if step == context_steps:
                name = "what follows" if follows[row] else "what does not"
                axis.set_title(name, loc="left", fontsize=9, color=colour)
    _save(figure, path)


def sound(
    accuracies: Sequence[float],
    chance: float,
    contexts: torch.Tensor,
    labels: Mapping[str, torch.Tensor],
    *,
    path: Path,
) -> None:
    """Accuracy by steps ahead, and contexts along their two main directions.

    Args:
        accuracies: [K] fractions.
        chance: the accuracy of guessing.
        contexts: [N, C].
        labels: name to labels [N], one panel of coloured contexts for each.
        path: PNG file.
    """
    figure, axes = _figure(1, 1 + len(labels), size=(4.4 * (1 + len(labels)), 3.8))
    curve, *panels = axes.flat
    steps = range(1, len(accuracies) + 1)
    curve.plot(steps, [100 * value for value in accuracies], color=_COLOURS[0], marker="o")
    curve.axhline(100 * chance, color=_GREY, lw=1.0, ls="--", label="chance")
    curve.set_ylim(bottom=0)
    curve.set_title("true continuation picked, %", loc="left")
    curve.set_xlabel("steps of 10 ms ahead")
    curve.grid(alpha=0.25)
    curve.legend(frameon=False, fontsize=8)
    centred = (contexts - contexts.mean(dim=0)).double()
    plane = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T).numpy()
    for axis, (name, values) in zip(panels, labels.items(), strict=True):
        shown = axis.scatter(*plane.T, c=values.numpy(), cmap="turbo", s=7, lw=0)
        axis.set_title(f"contexts by {name}: two main directions", loc="left")
        axis.set_xticks([])
        axis.set_yticks([])
        figure.colorbar(shown, ax=axis, ticks=MaxNLocator(integer=True))
    _save(figure, path)


def latent_states(
    true: torch.Tensor, predicted: torch.Tensor, pictures: torch.Tensor, steps: int, *, path: Path
) -> None:
    """Where every object lies in its two latent dimensions, true and predicted, and the pictures.

    Args:
        true, predicted: [N, K, D >= 2]: encoded states, and the same predicted from ``steps``
            earlier.
        pictures: [R, 3, H, W], states of one episode in order.
        steps: actions between the state that was seen and the predicted one.
        path: PNG file.
    """
    objects, count = true.shape[1], len(pictures)
    figure, axes = _figure(2, max(objects, count), size=(2.6 * max(objects, count), 5.6))
    for axis in (*axes[0, count:], *axes[1, objects:]):
        axis.remove()
    for number, (axis, picture) in enumerate(zip(axes[0], pictures, strict=False)):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_title(f"after {number} actions", loc="left")
        axis.set_xticks([])
        axis.set_yticks([])
    for index in range(objects):
        axis = axes[1, index]
        there, guess = true[:, index].numpy(), predicted[:, index].numpy()
        axis.plot(
            [there[:, 0], guess[:, 0]], [there[:, 1], guess[:, 1]], color=_GREY, lw=0.4, zorder=1
        )
        axis.scatter(there[:, 0], there[:, 1], s=26, fc="none", ec=_COLOURS[0], lw=0.8)
        axis.scatter(guess[:, 0], guess[:, 1], s=5, color=_COLOURS[1], zorder=3)
        axis.set_title(f"slot {index + 1}", loc="left")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.margins(0.08)
    figure.suptitle(
        f"Latent states of each object slot: encoded (rings) and predicted {steps} actions ahead "
        "(dots, joined to theirs)",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    _save(figure, path)


def hits_by_steps(curves: Mapping[str, Sequence[float]], *, path: Path) -> None:
    """Fractions by number of actions ahead, one line for each name, in %."""
    figure, axes = _figure(1, 1, size=(6.6, 4.2))
    axis = axes[0, 0]
    for colour, (name, values) in zip(_COLOURS, curves.items(), strict=False):
        steps = range(1, len(values) + 1)
        axis.plot(steps, [100 * v for v in values], color=colour, marker="o", ms=4, label=name)
    axis.set_ylim(-2, 102)
    axis.set_xlabel("actions ahead")
    axis.set_title("True end state found among all, %", loc="left")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path)

"""What a method hands to the runner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


@dataclass
class Experiment:
    """One run of a method with one seed, ready to be trained.

    Args:
        module: with its initial parameters, a function of the options and the seed. What a method
            carries from step to step (queue, bank, momentum encoder) lives in its ``state_dict``;
            then a resumed run repeats.
        batches: what Lightning takes as training data. Its order must depend on (seed, epoch)
            alone, as that of :class:`~fastcl.data.EpochShuffledBatches` does.
        scores: held-out metrics of a module by name, fractions where more is better, printed in %.
            Called on the untrained and on the trained module, in evaluation mode, on the device
            it was trained on; must not change it.
        headline: the metric that decides whether something was learnt.
        measured: what the scores are, for the table's title.
        data: what was learnt from, for the report.
        references: scores that need no training of this module, by name ("raw pixels", "TF-IDF",
            "chance"); a metric may be missing.
        callbacks: of its own, such as a kNN monitor; their state is part of the checkpoints.
        levels: logged metric to the value chance gives, drawn into the curves.
        figures: draws pictures of the trained module into a folder and returns their file names;
            called for the first seed.
        details: further numbers of the trained module for results.json.
    """

    module: pl.LightningModule
    batches: Iterable[Any]
    scores: Callable[[Any], dict[str, float]]
    headline: str
    measured: str
    data: str
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    callbacks: list[pl.Callback] = field(default_factory=list)
    levels: Mapping[str, float] = field(default_factory=dict)
    figures: Callable[[Any, Path], list[str]] | None = None
    details: Callable[[Any], dict[str, Any]] | None = None

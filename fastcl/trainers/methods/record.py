"""What is known of a method before anything heavy is imported."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from fastcl.trainers.options import TrainOptions

if TYPE_CHECKING:
    from fastcl.trainers.experiment import Experiment


@dataclass(frozen=True)
class Method:
    """A method of ``fastcl train``.

    Args:
        name: on the command line.
        title: in tables and pictures.
        summary: one line of ``fastcl train --help``.
        options: its options and their defaults, a frozen dataclass that inherits
            :class:`TrainOptions`; fields are documented in its docstring and checked by ``check``.
        module: whose function ``experiment(options, seed)`` returns an
            :class:`~fastcl.trainers.experiment.Experiment`; imported only to run.
        fast: the options that ``--fast`` changes: a run of well under a minute on a processor
            that still beats the untrained module.
        needs: modules beyond those of the extra ``train``.
        extra: what installs them, for the message when one is missing.
    """

    name: str
    title: str
    summary: str
    options: type[TrainOptions]
    module: str
    fast: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    extra: str = "train"

    def option_names(self) -> tuple[str, ...]:
        """What its options are called."""
        return tuple(field.name for field in fields(self.options))

    def experiment(self, options: TrainOptions, seed: int) -> Experiment:
        """What a run of this method with this seed consists of."""
        return importlib.import_module(self.module).experiment(options, seed)

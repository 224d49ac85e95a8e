"""Methods that predict: what comes next in a sequence, what an action does to a world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastcl.trainers.methods.record import Method
from fastcl.trainers.options import (
    TrainOptions,
    UsageError,
    check_at_least,
    check_choice,
    check_not_negative,
    check_positive,
)

NEGATIVES = ("batch", "sequence", "all", "other_sequences")
HOP = 160


@dataclass(frozen=True)
class CPCOptions(TrainOptions):
    """Contrastive predictive coding on sequences of digits that count upwards.

    Options were chosen on validation images.

    Args:
        objective: info_nce (van den Oord et al. 2018) or cpc_bce (is this continuation the true
            one? a sigmoid of the mean score; half of the sequences then break off).
        negatives: of info_nce: where the features come from among which a prediction picks its
            own: batch (other sequences, at the same time), sequence (other times of the same
            sequence), all (both, and other times of others) or other_sequences (at any time).
        sequences: training sequences, drawn from the training images.
        length: images of a sequence.
        context_steps: fewest images that a prediction sees; cpc_bce always sees all but the last
            ``predicted_steps``.
        predicted_steps: images after them that are predicted.
        width: channels of the image encoder's first convolution.
        features: dimension of z, an image's features.
        context_features: dimension of c, the features of the past.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    warmup_epochs: int = 1
    objective: str = "info_nce"
    negatives: str = "batch"
    sequences: int = 4096
    length: int = 10
    context_steps: int = 4
    predicted_steps: int = 4
    width: int = 16
    features: int = 64
    context_features: int = 128

    def check(self) -> None:
        super().check()
        check_choice("objective", self.objective, ("info_nce", "cpc_bce"))
        check_choice("negatives", self.negatives, NEGATIVES)
        _check_counts(self, "sequences", "context_steps", "predicted_steps", "width", "features")
        _check_counts(self, "context_features")
        _check_times(self, "length", self.length, 1)


@dataclass(frozen=True)
class CPCAudioOptions(TrainOptions):
    """Contrastive predictive coding of sound: notes of several voices in noise, generated.

    Options were chosen on validation clips. Channels, window and context are small enough for a
    processor; the paper has 512, 20480 and 256.

    Args:
        negatives: where the features come from among which a prediction picks its own: batch
            (other clips, at the same time), sequence (other times of the same clip), all (both,
            and other times of others) or other_sequences (at any time).
        clips: generated for training.
        window: samples of a clip at 16 kHz, a multiple of 160; 160 make a step.
        noise: standard deviation of the white noise; a tone's is 0.7.
        context_steps: fewest steps that a prediction sees.
        predicted_steps: steps after them that are predicted.
        channels: dimension of z, a step's features.
        context_features: dimension of c, the features of the past.
    """

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    warmup_epochs: int = 1
    negatives: str = "batch"
    clips: int = 4096
    window: int = 32 * HOP
    noise: float = 0.3
    context_steps: int = 8
    predicted_steps: int = 12
    channels: int = 32
    context_features: int = 64

    def check(self) -> None:
        super().check()
        check_choice("negatives", self.negatives, NEGATIVES)
        _check_counts(self, "clips", "window", "context_steps", "channels", "context_features")
        check_at_least("predicted_steps", self.predicted_steps, 1)
        check_not_negative("noise", self.noise)
        if self.window % HOP:
            raise UsageError(f"window: expected a multiple of {HOP}, got {self.window}")
        _check_times(self, "window", self.window, HOP)


@dataclass(frozen=True)
class CSWMOptions(TrainOptions):
    """Contrastively trained structured world models (Kipf et al. 2020).

    The defaults are the paper's; on a processor they take hours, which --fast does not. One action
    moves one object at most, so the state before it is often the nearest to the state after it:
    the scores named "still" say how far a model gets that predicts no change.

    Args:
        world: shapes (flat, seen from above) or cubes (in perspective, hiding one another).
        train_episodes: episodes of random actions to learn from.
        train_steps: actions in each of them.
        scored_episodes: episodes of ten actions to score on; the state that an episode really ends
            in is to be found among the ends of all of them.
        form: which state the hinge keeps a random other state away from: paper (the next one) or
            repository (the current one, as in its authors' code).
        encoder: form of the object extractor, small or medium.
        width: channels of the object extractor.
        hidden_features: of all MLPs.
        sigma: scale of the energy, mean |x - y|^2 / (2 sigma^2).
        margin: of the hinge.
    """

    FREE: ClassVar[tuple[str, ...]] = (*TrainOptions.FREE, "scored_episodes")

    epochs: int = 100
    batch_size: int = 1024
    optimizer: str = "adam"
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    schedule: str = "constant"
    checkpoint_every: int = 5
    world: str = "shapes"
    train_episodes: int = 1000
    train_steps: int = 100
    scored_episodes: int = 10_000
    form: str = "paper"
    encoder: str = "small"
    width: int = 32
    hidden_features: int = 512
    sigma: float = 0.5
    margin: float = 1.0

    def check(self) -> None:
        super().check()
        check_choice("world", self.world, ("shapes", "cubes"))
        check_choice("form", self.form, ("paper", "repository"))
        check_choice("encoder", self.encoder, ("small", "medium"))
        _check_counts(self, "train_episodes", "train_steps", "width", "hidden_features")
        check_at_least("scored_episodes", self.scored_episodes, 2)
        check_positive("sigma", self.sigma)
        check_positive("margin", self.margin)


def _check_times(options: CPCOptions | CPCAudioOptions, name: str, length: int, unit: int) -> None:
    """Room for the context, the prediction and, for negatives of other times, one time more."""
    steps = options.context_steps + options.predicted_steps + (options.negatives == "sequence")
    if length < unit * steps:
        raise UsageError(
            f"{name}: expected at least {unit * steps} for context_steps {options.context_steps}, "
            f"predicted_steps {options.predicted_steps} and negatives of the {options.negatives}, "
            f"got {length}"
        )


def _check_counts(options: TrainOptions, *names: str) -> None:
    for name in names:
        check_at_least(name, getattr(options, name), 1)


METHODS = (
    Method(
        name="cpc",
        title="CPC",
        summary="the past of a sequence of digits predicts its next features (InfoNCE)",
        options=CPCOptions,
        module="fastcl.trainers.cpc",
        fast={"epochs": 6},
    ),
    Method(
        name="cpc_audio",
        title="CPC on sound",
        summary="the past of a sound predicts its next features (InfoNCE)",
        options=CPCAudioOptions,
        module="fastcl.trainers.cpc_audio",
        fast={"epochs": 4},
    ),
    Method(
        name="cswm",
        title="C-SWM",
        summary="a world of objects and what an action does to each, from pictures alone",
        options=CSWMOptions,
        module="fastcl.trainers.cswm",
        fast={
            "epochs": 5,
            "batch_size": 64,
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "train_episodes": 250,
            "scored_episodes": 1000,
            "hidden_features": 64,
        },
    ),
)

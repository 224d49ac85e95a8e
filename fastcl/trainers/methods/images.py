"""Methods that learn from images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastcl.trainers.methods.record import Method
from fastcl.trainers.options import TrainOptions, check_at_least, check_positive


@dataclass(frozen=True)
class ImageOptions(TrainOptions):
    """What methods that learn from images share.

    Learning rate, weight decay, schedule and augmentations were chosen on validation images (see
    fastcl.data.digits); temperature, batch size and widths were taken over from earlier trials.

    Args:
        recipe: augmentations that make the views.
        width: channels of the encoder's first convolution.
        hidden_features: width of the projection head's hidden layer.
        out_features: dimension in which views are compared.
        knn_every: epochs between two measurements of the kNN monitor.
        knn_neighbours: k of the kNN monitor.
        label_draws: drawings of 1, 5 and 10 labels per class that are averaged by the probes.
    """

    FREE: ClassVar[tuple[str, ...]] = (*TrainOptions.FREE, "label_draws")

    epochs: int = 125
    batch_size: int = 256
    learning_rate: float = 8e-3
    weight_decay: float = 1e-2
    warmup_epochs: int = 10
    recipe: str = "digits"
    width: int = 16
    hidden_features: int = 128
    out_features: int = 64
    knn_every: int = 5
    knn_neighbours: int = 200
    label_draws: int = 10

    def check(self) -> None:
        super().check()
        for name in (
            "width",
            "hidden_features",
            "out_features",
            "knn_every",
            "knn_neighbours",
            "label_draws",
        ):
            check_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class SimCLROptions(ImageOptions):
    """SimCLR (Chen et al. 2020).

    Args:
        temperature: divisor of the cosine similarities in NT-Xent.
    """

    temperature: float = 0.5

    def check(self) -> None:
        super().check()
        check_positive("temperature", self.temperature)


METHODS = (
    Method(
        name="simclr",
        title="SimCLR",
        summary="two augmented views of an image attract each other (NT-Xent)",
        options=SimCLROptions,
        module="fastcl.trainers.simclr",
        fast={"epochs": 40, "warmup_epochs": 4},
    ),
)

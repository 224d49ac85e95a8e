"""Methods that learn to say what an image shows."""

from __future__ import annotations

from dataclasses import dataclass

from fastcl.trainers.methods.record import Method
from fastcl.trainers.options import TrainOptions, UsageError, check_at_least, check_fraction


@dataclass(frozen=True)
class CaptioningOptions(TrainOptions):
    """Contrastive captioning (Dai and Lin 2017) after maximum likelihood.

    Args:
        mle_epochs: epochs of maximum likelihood, before the contrastive ones.
        negatives: captions of other images that each image is shown.
        detail: probability with which a training caption mentions a colour or a place.
        drawings: images of every training scene, each with a caption of its own.
        width: of word vectors and of the LSTM's state.
        cnn_width: channels of the image encoder's first convolution.
    """

    epochs: int = 16
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    warmup_epochs: int = 1
    schedule: str = "constant"
    gradient_clip: float = 1.0
    mle_epochs: int = 8
    negatives: int = 5
    detail: float = 0.25
    drawings: int = 2
    width: int = 64
    cnn_width: int = 8

    def check(self) -> None:
        super().check()
        for name in ("mle_epochs", "negatives", "drawings", "width", "cnn_width"):
            check_at_least(name, getattr(self, name), 1)
        check_fraction("detail", self.detail)
        if self.negatives >= self.batch_size:
            raise UsageError(
                f"negatives: expected fewer than batch_size = {self.batch_size}, "
                f"got {self.negatives}"
            )


METHODS = (
    Method(
        name="captioning",
        title="Contrastive captioning",
        summary="captions that fit their image better than others, against a frozen reference",
        options=CaptioningOptions,
        module="fastcl.trainers.captioning",
        fast={"epochs": 14, "mle_epochs": 7},
    ),
)

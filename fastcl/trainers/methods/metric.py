"""Methods that learn from labelled images by comparing samples: metric learning, blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastcl.trainers.methods.images import DATA
from fastcl.trainers.methods.record import Method
from fastcl.trainers.options import (
    TrainOptions,
    UsageError,
    check_at_least,
    check_choice,
    check_not_negative,
    check_positive,
)


@dataclass(frozen=True)
class MetricOptions(TrainOptions):
    """What methods share whose batches hold equally many samples of some classes.

    Args:
        data: digits (scikit-learn's, no download), mnist, cifar10, cifar100, stl10 or folder.
        data_root: where the files of the others lie, as torchvision lays them out.
        image_size: height and width to which the images of a folder are brought.
        width: channels of the encoder's first convolution.
    """

    FREE: ClassVar[tuple[str, ...]] = (*TrainOptions.FREE, "data_root")

    learning_rate: float = 3e-3
    warmup_epochs: int = 1
    data: str = "digits"
    data_root: str = "data"
    image_size: int = 64
    width: int = 16

    def check(self) -> None:
        super().check()
        check_choice("data", self.data, DATA)
        check_at_least("image_size", self.image_size, 8)
        check_at_least("width", self.width, 1)

    def check_groups(self, of: int) -> None:
        """Raise UsageError unless a batch is two or more classes with ``of`` samples each."""
        if self.batch_size % of or self.batch_size // of < 2:
            raise UsageError(
                f"batch_size: expected a multiple, at least the double, of the {of} samples "
                f"of a class, got {self.batch_size}"
            )


@dataclass(frozen=True)
class TripletOptions(MetricOptions):
    """FaceNet's triplet loss (Schroff et al. 2015) with mining.

    Args:
        per_class: samples of each class in a batch; batch_size must be a multiple.
        mining: semi_hard, semi_hard_all, batch_all or batch_hard (see MinedTripletLoss). Batch-hard
            from fresh parameters stays at its margin: all embeddings fall together.
        margin: of squared distances of unit rows.
        out_features: dimension of the embeddings.
    """

    epochs: int = 15
    batch_size: int = 120
    per_class: int = 12
    mining: str = "semi_hard"
    margin: float = 0.2
    out_features: int = 64

    def check(self) -> None:
        super().check()
        check_choice(
            "mining", self.mining, ("batch_hard", "batch_all", "semi_hard", "semi_hard_all")
        )
        check_at_least("per_class", self.per_class, 2)
        check_at_least("out_features", self.out_features, 1)
        check_not_negative("margin", self.margin)
        self.check_groups(self.per_class)


@dataclass(frozen=True)
class BlockOptions(MetricOptions):
    """Block contrastive learning (Arora et al. 2019).

    Args:
        block: b, similar samples whose features are averaged; batch_size must be a multiple of
            b + 1.
        loss: logistic or hinge.
    """

    epochs: int = 15
    batch_size: int = 60
    block: int = 5
    loss: str = "logistic"

    def check(self) -> None:
        super().check()
        check_at_least("block", self.block, 1)
        check_choice("loss", self.loss, ("logistic", "hinge"))
        self.check_groups(self.block + 1)


@dataclass(frozen=True)
class SiameseOptions(TrainOptions):
    """Contrastive loss of labelled pairs (Hadsell et al. 2006) with the MNIST CNN.

    Args:
        data: digits (scikit-learn's, resized to 28 x 28) or mnist.
        data_root: where the files of MNIST lie, as torchvision lays them out.
        margin: distance beyond which images of two classes push each other no more.
        form: hadsell (the margin bounds the distance) or squared (it bounds its square).
    """

    FREE: ClassVar[tuple[str, ...]] = (*TrainOptions.FREE, "data_root")

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "constant"
    epochs: int = 10
    batch_size: int = 64
    data: str = "digits"
    data_root: str = "data"
    margin: float = 1.0
    form: str = "hadsell"

    def check(self) -> None:
        super().check()
        check_choice("data", self.data, ("digits", "mnist"))
        check_positive("margin", self.margin)
        check_choice("form", self.form, ("hadsell", "squared"))


METHODS = (
    Method(
        name="siamese",
        title="Siamese",
        summary="pairs of one label near, others beyond a margin (Hadsell's contrastive loss)",
        options=SiameseOptions,
        module="fastcl.trainers.siamese",
        fast={"epochs": 4},
    ),
    Method(
        name="triplet",
        title="Triplet",
        summary="samples of a label nearer than others, by triplets mined from each batch",
        options=TripletOptions,
        module="fastcl.trainers.triplet",
        fast={"epochs": 8},
    ),
    Method(
        name="block",
        title="Block contrastive",
        summary="nearer to the mean of b similar samples than to that of b others",
        options=BlockOptions,
        module="fastcl.trainers.block",
        fast={"epochs": 8},
    ),
)

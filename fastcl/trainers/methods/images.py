"""Methods that learn from images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastcl.trainers.methods.record import Method
from fastcl.trainers.options import (
    TrainOptions,
    UsageError,
    check_at_least,
    check_choice,
    check_fraction,
    check_positive,
)

DATA = ("digits", "mnist", "cifar10", "cifar100", "stl10", "folder")
ENCODERS = ("small_cnn", "mnist_cnn", "resnet18", "resnet34", "resnet50")
HEADS = ("linear", "simclr", "moco_v1", "moco_v2")
RECIPES = ("digits", "moco_v1", "moco_v2", "plain", "simclr")
COLOUR_RECIPES = ("moco_v1", "moco_v2", "simclr")


@dataclass(frozen=True)
class ImageOptions(TrainOptions):
    """What methods that learn from images share.

    Learning rates, weight decay, schedules and augmentations were chosen on validation images of
    the digits (see fastcl.data.digits).

    Args:
        data: digits (scikit-learn's, no download), mnist, cifar10, cifar100, stl10 (its unlabelled
            images if they are there) or folder (train/CLASS/*.png and test/CLASS/*.png).
        data_root: where the files of the others lie, as torchvision lays them out.
        image_size: height and width to which the images of a folder are brought.
        recipe: augmentations that make the views: digits, or for colour simclr, moco_v1, moco_v2,
            or plain for either.
        encoder: small_cnn, mnist_cnn (183,296 parameters), resnet18, resnet34 or resnet50.
        stem: of a ResNet: cifar (images of about 32 x 32) or imagenet.
        width: channels of small_cnn's first convolution.
        head: projection on top of the encoder, dropped after training: linear (moco_v1) or an MLP
            with batch norm (simclr) or without (moco_v2).
        hidden_features: width of an MLP's hidden layer.
        out_features: dimension in which views are compared.
        knn_every: epochs between two measurements of the kNN monitor.
        knn_neighbours: k of the kNN monitor.
        label_draws: drawings of 1, 5 and 10 labels per class that are averaged by the probes.
    """

    FREE: ClassVar[tuple[str, ...]] = (*TrainOptions.FREE, "data_root", "label_draws")

    epochs: int = 125
    batch_size: int = 256
    learning_rate: float = 8e-3
    weight_decay: float = 1e-2
    warmup_epochs: int = 10
    data: str = "digits"
    data_root: str = "data"
    image_size: int = 64
    recipe: str = "digits"
    encoder: str = "small_cnn"
    stem: str = "cifar"
    width: int = 16
    head: str = "simclr"
    hidden_features: int = 128
    out_features: int = 64
    knn_every: int = 5
    knn_neighbours: int = 200
    label_draws: int = 10

    def check(self) -> None:
        super().check()
        check_choice("data", self.data, DATA)
        check_choice("recipe", self.recipe, RECIPES)
        check_choice("encoder", self.encoder, ENCODERS)
        check_choice("stem", self.stem, ("cifar", "imagenet"))
        check_choice("head", self.head, HEADS)
        if self.data in ("digits", "mnist") and self.recipe in COLOUR_RECIPES:
            raise UsageError(
                f"recipe: {self.recipe!r} jitters colour and {self.data} is grey; "
                "expected 'digits' or 'plain'"
            )
        check_at_least("image_size", self.image_size, 8)
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


@dataclass(frozen=True)
class MoCoOptions(ImageOptions):
    """MoCo v2 (Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning").

    Args:
        temperature: divisor of the cosine similarities in InfoNCE.
        queue_size: keys of earlier batches that serve as negatives (65536 on ImageNet).
        momentum: how much of the key encoder stays at each step (0.999 on ImageNet).
        bn_splits: groups of samples with batch-norm statistics of their own, in place of as many
            devices: what keeps statistics from telling which key is the query's.
        symmetric: let each view be query once and key once.
    """

    temperature: float = 0.2
    queue_size: int = 1024
    momentum: float = 0.99
    bn_splits: int = 4
    symmetric: bool = False
    head: str = "moco_v2"

    def check(self) -> None:
        super().check()
        check_positive("temperature", self.temperature)
        check_at_least("queue_size", self.queue_size, 1)
        check_fraction("momentum", self.momentum)
        check_at_least("bn_splits", self.bn_splits, 1)
        if (self.batch_size // self.devices) % self.bn_splits:
            raise UsageError(
                f"bn_splits: expected a divisor of the batch of a device, "
                f"{self.batch_size // self.devices}, got {self.bn_splits}"
            )


@dataclass(frozen=True)
class MoCoV1Options(MoCoOptions):
    """MoCo v1 (He et al. 2020, "Momentum Contrast"): a linear head, a lower temperature, steps."""

    temperature: float = 0.07
    head: str = "moco_v1"
    schedule: str = "steps"


@dataclass(frozen=True)
class InstDiscOptions(ImageOptions):
    """Instance discrimination (Wu et al. 2018).

    Args:
        temperature: divisor of the cosine similarities.
        bank_momentum: how much of a sample's stored feature stays when it is seen.
        form: softmax (exact, over all samples), sampled_softmax or nce (the paper's).
        negatives: how many the sampled forms draw for each sample.
    """

    temperature: float = 0.1
    bank_momentum: float = 0.5
    form: str = "softmax"
    negatives: int = 512
    head: str = "linear"

    def check(self) -> None:
        super().check()
        check_positive("temperature", self.temperature)
        check_fraction("bank_momentum", self.bank_momentum)
        check_choice("form", self.form, ("softmax", "sampled_softmax", "nce"))
        check_at_least("negatives", self.negatives, 1)


@dataclass(frozen=True)
class SupConOptions(ImageOptions):
    """Supervised contrastive learning (Khosla et al. 2020): it trains on the labels.

    Args:
        temperature: divisor of the cosine similarities.
        form: out (the mean over positives outside the logarithm) or in.
    """

    temperature: float = 0.1
    form: str = "out"

    def check(self) -> None:
        super().check()
        check_positive("temperature", self.temperature)
        check_choice("form", self.form, ("out", "in"))


METHODS = (
    Method(
        name="simclr",
        title="SimCLR",
        summary="two views of an image attract each other, all others repel (NT-Xent)",
        options=SimCLROptions,
        module="fastcl.trainers.simclr",
        fast={"epochs": 40, "warmup_epochs": 4},
    ),
    Method(
        name="moco",
        title="MoCo v2",
        summary="negatives from a queue that a momentum encoder fills; MLP head",
        options=MoCoOptions,
        module="fastcl.trainers.moco",
        fast={"epochs": 40, "warmup_epochs": 4},
    ),
    Method(
        name="moco_v1",
        title="MoCo v1",
        summary="negatives from a queue that a momentum encoder fills; linear head",
        options=MoCoV1Options,
        module="fastcl.trainers.moco",
        fast={"epochs": 40, "warmup_epochs": 4},
    ),
    Method(
        name="instdisc",
        title="Instance discrimination",
        summary="every image is a class of its own, in a memory bank",
        options=InstDiscOptions,
        module="fastcl.trainers.instdisc",
        fast={"epochs": 40, "warmup_epochs": 4},
    ),
    Method(
        name="supcon",
        title="SupCon",
        summary="images of one label attract each other; trains on the labels",
        options=SupConOptions,
        module="fastcl.trainers.supcon",
        fast={"epochs": 40, "warmup_epochs": 4},
    ),
)

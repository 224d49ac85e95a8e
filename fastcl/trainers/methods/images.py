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
LOSSES = ("nt_xent", "dcl", "dclw", "debiased", "hard_negative")
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
        without: augmentations of the recipe that are left out, by kornia's names with commas
            between them.
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
    without: str = ""
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
        temperature: divisor of the cosine similarities in NT-Xent or the other loss.
        loss: nt_xent, or one that treats negatives otherwise: dcl (the positive left out of the
            denominator), dclw, debiased or hard_negative.
        normalize: compare directions; otherwise dot products of the projections as they are.
        view_noise: share of the pairs whose second view shows another image.
    """

    temperature: float = 0.5
    loss: str = "nt_xent"
    normalize: bool = True
    view_noise: float = 0.0

    def check(self) -> None:
        super().check()
        check_positive("temperature", self.temperature)
        check_choice("loss", self.loss, LOSSES)
        check_fraction("view_noise", self.view_noise)


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

    learning_rate: float = 3e-3
    temperature: float = 0.1
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

    temperature: float = 0.5
    bank_momentum: float = 0.5
    form: str = "softmax"
    negatives: int = 512
    batch_size: int = 128

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
        label_noise: share of the training images that carry another class's label.
    """

    temperature: float = 0.1
    form: str = "out"
    label_noise: float = 0.0

    def check(self) -> None:
        super().check()
        check_fraction("label_noise", self.label_noise)
        check_positive("temperature", self.temperature)
        check_choice("form", self.form, ("out", "in"))


@dataclass(frozen=True)
class RotationOptions(ImageOptions):
    """Rotation pretext (Gidaris et al. 2018); it has no head and compares no views."""


@dataclass(frozen=True)
class JigsawOptions(ImageOptions):
    """Jigsaw pretext (Noroozi and Favaro 2016); it has no head and compares no views.

    On images as small as digits a ninth shows too little to learn from: the puzzles are solved,
    and the features are worth less than those of the untrained encoder.

    Args:
        side: to which images are resized before they are cut (255 in the paper).
        grid: tiles per side (3 in the paper).
        tile: side of a tile, smaller than a cell, so that edges do not continue (64 in the paper).
        permutations: classes, chosen far apart (1000 in the paper); of four tiles there are 24.
    """

    learning_rate: float = 3e-3
    side: int = 30
    grid: int = 2
    tile: int = 13
    permutations: int = 24
    hidden_features: int = 256

    def check(self) -> None:
        super().check()
        check_at_least("grid", self.grid, 2)
        check_at_least("tile", self.tile, 8)
        check_at_least("side", self.side, self.grid * self.tile)
        check_at_least("permutations", self.permutations, 2)


@dataclass(frozen=True)
class CMCOptions(InstDiscOptions):
    """Contrastive multiview coding (Tian et al. 2020); options of the bank as for instdisc.

    Args:
        split: what makes views of an image: halves (upper and lower), edges (image and Sobel
            edges) or, for colour, lab (luminance and colour).
    """

    split: str = "edges"

    def check(self) -> None:
        super().check()
        check_choice("split", self.split, ("edges", "halves", "lab"))


@dataclass(frozen=True)
class DomainOptions(SimCLROptions):
    """Domain adaptation by contrastive pretraining (Shen et al. 2022).

    Args:
        shift: how images of the target domain differ from those of the source: tilted (by 35
            degrees), noisy, inverted or textured (blended with a smooth random background, as
            MNIST-M is with photographs). There is something to gain where augmentations carry
            images of one domain towards the other, as rotations do for tilted.
        pretrain_on: both domains, or one of them, to see what the other is worth.
        finetune_epochs: passes over the labelled source images.
        finetune_learning_rate: of their supervised training, by AdamW.
    """

    shift: str = "tilted"
    pretrain_on: str = "both"
    finetune_epochs: int = 20
    finetune_learning_rate: float = 3e-3

    def check(self) -> None:
        super().check()
        check_choice("shift", self.shift, ("inverted", "noisy", "textured", "tilted"))
        check_choice("pretrain_on", self.pretrain_on, ("both", "source", "target"))
        check_at_least("finetune_epochs", self.finetune_epochs, 1)
        check_positive("finetune_learning_rate", self.finetune_learning_rate)


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
    Method(
        name="cmc",
        title="CMC",
        summary="an encoder per view (colour, edges, halves); each finds the other's features",
        options=CMCOptions,
        module="fastcl.trainers.cmc",
        fast={"epochs": 40, "warmup_epochs": 4},
    ),
    Method(
        name="rotation",
        title="Rotation",
        summary="tells which of four ways up an image is",
        options=RotationOptions,
        module="fastcl.trainers.rotation",
        fast={"epochs": 30, "warmup_epochs": 3},
    ),
    Method(
        name="jigsaw",
        title="Jigsaw",
        summary="tells in which order the tiles of an image were shuffled",
        options=JigsawOptions,
        module="fastcl.trainers.jigsaw",
        fast={"epochs": 40, "warmup_epochs": 4},
    ),
    Method(
        name="domain",
        title="Domain adaptation",
        summary="contrast images of two domains, learn the labels of one, score in the other",
        options=DomainOptions,
        module="fastcl.trainers.domain",
        fast={"epochs": 40, "warmup_epochs": 4},
    ),
)

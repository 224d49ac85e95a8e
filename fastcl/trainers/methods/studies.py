"""The ablations of ``fastcl ablate``; importing this needs nothing but Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastcl.trainers.methods import METHODS


@dataclass(frozen=True)
class Variant:
    """One point of a study: the line it belongs to, its setting on the axis, the method, and the
    options that make it so."""

    line: str
    setting: str
    method: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """A method with one thing varied.

    Args:
        name: on the command line.
        title: of the picture.
        summary: one line of ``fastcl ablate --help``.
        axis: what the settings are.
        variants: the points.
    """

    OPTIONS: ClassVar[dict[str, type]] = {
        "data": str,
        "data_root": str,
        "encoder": str,
        "epochs": int,
        "batch_size": int,
        "report_on": str,
        "threads": int,
    }
    """Options of ``fastcl train`` that hold for every point, unless it varies them itself."""

    name: str
    title: str
    summary: str
    axis: str
    variants: tuple[Variant, ...]

    def options(self) -> dict[str, type]:
        """Those of ``OPTIONS`` that every method of the study has and some variant leaves open."""
        methods = [METHODS[variant.method] for variant in self.variants]
        return {
            name: kind
            for name, kind in self.OPTIONS.items()
            if all(name in method.option_names() for method in methods)
            and not all(name in variant.options for variant in self.variants)
        }


def _over(option: str, values: tuple, line: str = "SimCLR", method: str = "simclr", **fixed):
    return tuple(
        Variant(line, str(value) or "nothing", method, {option: value, **fixed}) for value in values
    )


def _equal_steps(b: int) -> dict[str, int]:
    """Ten blocks of b and their anchors in every step, and as many steps for every b."""
    return {"block": b, "batch_size": 10 * (b + 1), "epochs": 4 * (b + 1)}


_DIGITS = ("RandomAffine", "RandomElasticTransform", "RandomContrast", "RandomGaussianNoise",
           "RandomErasing")  # fmt: skip
_TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0)
_NEGATIVES = (64, 128, 256, 512, 1024)

STUDIES = {
    study.name: study
    for study in (
        Study(
            "augmentation",
            "SimCLR without one of its augmentations",
            "which augmentations the views need (SimCLR)",
            "left out of the recipe",
            (
                *_over("without", ("", *_DIGITS)),
                Variant("SimCLR", "all", "simclr", {"without": ",".join(_DIGITS)}),
            ),
        ),
        Study(
            "temperature",
            "SimCLR: temperature, with and without normalisation",
            "temperature x normalisation (SimCLR)",
            "temperature",
            (
                *_over("temperature", _TEMPERATURES, "unit rows"),
                *_over("temperature", _TEMPERATURES, "rows as they are", normalize=False),
            ),
        ),
        Study(
            "head",
            "SimCLR: projection heads of different width",
            "what sits between features and loss (SimCLR)",
            "dimension in which views are compared",
            tuple(
                variant
                for line, head in (
                    ("MLP with batch norm", "simclr"),
                    ("MLP", "moco_v2"),
                    ("linear", "linear"),
                )
                for variant in _over("out_features", (16, 64, 256), line, head=head)
            ),
        ),
        Study(
            "batch",
            "SimCLR: batch size, the epochs being the same",
            "how many images share a batch (SimCLR)",
            "images per batch",
            _over("batch_size", (32, 64, 128, 256, 512)),
        ),
        Study(
            "loss",
            "NT-Xent and losses that treat negatives otherwise, the epochs being the same",
            "which loss of two views (SimCLR) copes with small batches",
            "images per batch",
            tuple(
                variant
                for loss in ("nt_xent", "dcl", "debiased", "hard_negative")
                for variant in _over("batch_size", (32, 128, 256), loss, loss=loss)
            ),
        ),
        Study(
            "domain",
            "Domain adaptation: what the pretraining saw",
            "whether images of the target domain help (domain adaptation)",
            "pretrained on images of",
            _over("pretrain_on", ("source", "target", "both"), "SimCLR", "domain"),
        ),
        Study(
            "queue",
            "MoCo: size of the queue",
            "how many keys wait in the queue (MoCo)",
            "keys in the queue",
            _over("queue_size", (64, 256, 1024, 4096), "MoCo", "moco"),
        ),
        Study(
            "batch_norm",
            "MoCo: groups with batch-norm statistics of their own",
            "whether shared batch statistics give the key away (MoCo)",
            "groups of a batch",
            _over("bn_splits", (1, 2, 4, 8), "MoCo", "moco"),
        ),
        Study(
            "block",
            "Block contrastive: size of the blocks, the steps being the same",
            "how many similar samples are averaged (Arora's block loss)",
            "samples of a block",
            tuple(Variant("block", str(b), "block", _equal_steps(b)) for b in (1, 2, 5, 10)),
        ),
        Study(
            "captioning",
            "Captioning: when contrast takes over from maximum likelihood",
            "whether contrast is worth its epochs (captioning)",
            "epochs of maximum likelihood first (16: nothing else)",
            _over("mle_epochs", (4, 8, 12, 16), "captioner", "captioning"),
        ),
        Study(
            "sources",
            "Where negatives come from, the epochs being the same",
            "the batch end to end (SimCLR), a memory bank (InstDisc) or a queue (MoCo)",
            "negatives",
            (
                *(
                    Variant("batch, end to end", str(n), "simclr", {"batch_size": n // 2 + 1})
                    for n in _NEGATIVES
                ),
                *_over("negatives", _NEGATIVES, "memory bank", "instdisc", form="sampled_softmax"),
                *_over("queue_size", _NEGATIVES, "queue", "moco"),
            ),
        ),
        Study(
            "noise",
            "Wrong labels and wrong views",
            "what wrong labels (SupCon) and views of other images (SimCLR) cost",
            "share of the training samples that are wrong",
            (
                *_over("label_noise", (0.0, 0.2, 0.4, 0.6, 0.8), "labels, SupCon", "supcon"),
                *_over("view_noise", (0.0, 0.2, 0.4, 0.6, 0.8), "views, SimCLR"),
            ),
        ),
    )
}
"""Studies by name."""

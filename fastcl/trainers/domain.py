"""Domain adaptation: contrast unlabelled images of two domains, learn the labels of one.

There is no alignment term: views of an image attract each other in both domains at once, and the
features that this leaves carry a classifier from the source to the target.

Source: Shen et al. 2022, "Connect, Not Collapse: Explaining Contrastive Learning for Unsupervised
Domain Adaptation".
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.shifts import shift
from fastcl.data.splits import Split, Splits, unit_range
from fastcl.data.views import Augment
from fastcl.evaluation import figures
from fastcl.evaluation.features import extract_features
from fastcl.evaluation.probe import linear_probe
from fastcl.trainers import images
from fastcl.trainers.classifier import Classifier
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.fit import fit
from fastcl.trainers.methods.images import DomainOptions
from fastcl.trainers.options import Optimization, TrainOptions
from fastcl.trainers.simclr import SimCLR

MEASURED = "Images of the target and the source domain classified right, by labels of the source"


def experiment(options: DomainOptions, seed: int) -> Experiment:
    """SimCLR on both domains; then a linear probe and fine-tuning on labelled source images.

    Fine-tuning the untrained module is the usual baseline, supervised training on the source
    alone: same encoder, augmentations and epochs.
    """
    splits = images.load(options, seed)
    half = len(splits.train) // 2  # the domains show different images
    source = Split(
        unit_range(splits.train.images[:half]),
        splits.train.labels[:half],
        splits.train.indices[:half],
    )
    target = shift(unit_range(splits.train.images[half:]), options.shift, seed)
    unlabelled = {
        "both": torch.cat([source.images, target]),
        "source": source.images,
        "target": target,
    }[options.pretrain_on]
    encoder, head = images.build_parts(options, splits, seed)
    module = SimCLR(
        encoder,
        head,
        images.views(options, splits),
        temperature=options.temperature,
        loss=options.loss,
        normalize=options.normalize,
        view_noise=options.view_noise,
        optimization=options,
    )
    scored: Split = getattr(splits, options.report_on)
    held_out = {
        "target": shift(unit_range(scored.images), options.shift, seed + 1),
        "source": unit_range(scored.images),
    }

    def scores(trained: Any) -> dict[str, float]:
        measured = {}
        for name, pictures in held_out.items():
            measured[f"{name}, probe"] = _probe(trained.encoder, source, pictures, scored, seed)
        classifier = fine_tuned(trained.encoder, source, splits, options, seed)
        for name, pictures in held_out.items():
            predicted = extract_features(classifier, pictures).argmax(1).cpu()
            right = (predicted == scored.labels).double().mean().item()
            measured[f"{name}, fine-tuned"] = right
        return measured

    def draw(trained: Any, folder: Path) -> list[str]:
        figures.view_grid(
            held_out["source"][:8], held_out["target"][:8], path=folder / "domains.png",
            title="The same images in the source and in the target domain",
        )  # fmt: skip
        return ["domains.png"]

    candidates = 2 * options.batch_size - 1
    pixels = {
        f"{name}, probe": _probe(nn.Flatten(), source, pictures, scored, seed)
        for name, pictures in held_out.items()
    }
    return images.image_experiment(
        module,
        options,
        splits,
        seed,
        batches=EpochShuffledBatches(unlabelled, options.batch_size, seed),
        scores=scores,
        headline="target, probe",
        measured=MEASURED,
        data=f"{splits.name}; {half} as they are (source), the others {options.shift} (target)",
        references={"raw pixels": pixels},
        figures=draw,
        levels={"contrastive_accuracy": 1 / candidates},
    )


def _probe(
    encoder: nn.Module, source: Split, pictures: torch.Tensor, scored: Split, seed: int
) -> float:
    return linear_probe(
        extract_features(encoder, source.images).cpu().numpy(),
        source.labels.numpy(),
        extract_features(encoder, pictures).cpu().numpy(),
        scored.labels.numpy(),
        labels_per_class=None,
        seed=seed,
    )


def fine_tuned(
    encoder: nn.Module, source: Split, splits: Splits, options: DomainOptions, seed: int
) -> Classifier:
    """A copy of ``encoder`` and a classifier, trained on labelled source images."""
    torch.manual_seed(seed)
    training = TrainOptions(
        epochs=options.finetune_epochs,
        batch_size=64,
        accelerator=options.accelerator,
        checkpoint_every=options.finetune_epochs,
    )
    how = Optimization(learning_rate=options.finetune_learning_rate, warmup_epochs=1)
    width: Any = encoder.feature_dim
    classifier = Classifier(
        copy.deepcopy(encoder),
        nn.Linear(width, len(splits.classes)),
        augment=images.views(options, splits, Augment),
        optimization=how,
    )
    supervised = Experiment(
        module=classifier,
        batches=EpochShuffledBatches((source.images, source.labels), training.batch_size, seed),
        scores=lambda module: {},
        headline="",
        measured="",
        data="",
    )
    classifier.train()  # the encoder comes from being scored
    with tempfile.TemporaryDirectory() as folder:
        fit(supervised, training, seed, folder=Path(folder))
    return classifier

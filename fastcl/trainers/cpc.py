"""Contrastive predictive coding: the context of the past predicts the features of what follows."""

from __future__ import annotations

import math
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import CPCBCELoss, CPCLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.digits import load_digit_splits
from fastcl.data.sequences import DigitSequences, digit_sequences
from fastcl.data.splits import Split
from fastcl.encoders import GRUContext, SmallCNN, StepEncoder
from fastcl.evaluation import predictive_figures
from fastcl.evaluation.features import calibrate_batch_norm
from fastcl.evaluation.probe import linear_probe
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.predictive import CPCOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization
from fastcl.trainers.outlook import Outlook, look_ahead, probe_scores

_SCORED, _PROBED = 1000, 2000  # sequences
_HELD_OUT_SEED, _PROBE_SEED = 2**32, 2**32 + 1  # runs' own seeds lie below


class CPC(pl.LightningModule):
    """Encoder, context network and predictors trained with InfoNCE or with ``cpc_bce``.

    Batches are inputs [B, ...] of T steps; ``cpc_bce`` takes them with integers [B] beside them, 1
    where the last K steps follow from those before and 0 where they do not.

    Args:
        encoder: inputs [B, ...] to features z [B, T, D].
        context: features [B, T, D] to contexts c [B, T, C], each of its step and those before.
        loss: with the predictors W_k of K steps; ``return_metrics=True``.
        context_steps: fewest steps that a prediction sees.
        optimization: optimizer and schedule.

    Source: van den Oord, Li and Vinyals 2018, "Representation Learning with Contrastive Predictive
    Coding", section 2.
    """

    def __init__(
        self,
        encoder: nn.Module,
        context: nn.Module,
        loss: CPCLoss | CPCBCELoss,
        *,
        context_steps: int = 1,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.encoder = encoder
        self.context = context
        self.loss = loss
        self.context_steps = context_steps
        self.optimization = optimization

    def forward(self, inputs: torch.Tensor) -> Outlook:
        """What all steps but the last K say of the last K."""
        features = self.encoder(inputs)
        seen = features.shape[1] - self.loss.predictors.steps
        context = self.context(features[:, :seen])[:, -1]
        predictions = self.loss.predictors(context)
        return Outlook(features[:, seen - 1], context, predictions, features[:, seen:])

    def training_step(
        self, batch: torch.Tensor | list[torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        if isinstance(self.loss, CPCBCELoss):
            inputs, follows = batch
            outlook = self(inputs)
            loss, metrics = self.loss(outlook.context, outlook.targets, follows)
        else:
            inputs = batch
            features = self.encoder(inputs)
            first = self.context_steps - 1
            loss, metrics = self.loss(self.context(features)[:, first:], features[:, first:])
        log_batch(self, len(inputs), loss, {"accuracy": metrics["accuracy"]})
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def experiment(options: CPCOptions, seed: int) -> Experiment:
    """CPC on digits that count upwards; every image scored on is one that was never trained on."""
    splits = load_digit_splits(seed)
    bce = options.objective == "cpc_bce"
    seen = options.length - options.predicted_steps

    def draw(split: Split, count: int, seed: int, broken: float = 0.0) -> DigitSequences:
        return digit_sequences(
            split, count, seed, broken=broken,
            context=seen, steps=options.predicted_steps,
        )  # fmt: skip

    scored = getattr(splits, options.report_on)
    training = draw(splits.train, options.sequences, seed, broken=0.5 if bce else 0.0)
    probed = draw(splits.train, _PROBED, _PROBE_SEED)
    held_out = draw(scored, _SCORED, _HELD_OUT_SEED)
    judged = draw(scored, _SCORED, _HELD_OUT_SEED, broken=0.5)

    def scores(module: CPC) -> dict[str, float]:
        outlook = look_ahead(module, held_out.images)
        result = {"contrastive": outlook.accuracy(10)}
        if bce:
            told = look_ahead(module, judged.images).scores() > 0
            right = (told == judged.follows).double().mean().item()
            result = {"contrastive": right, "of ten": outlook.accuracy(10)}
        known = look_ahead(module, probed.images), probed.labels[:, seen - 1]
        probes = probe_scores(*known, outlook, held_out.labels[:, seen - 1])
        return result | {f"probe {name}": value for name, value in probes.items()}

    def figures(module: CPC, folder: Path) -> list[str]:
        table = look_ahead(module, held_out.images).group_scores(10).mean(dim=0)
        predictive_figures.continuations(
            table,
            [f"...{(start + seen - 1) % 10}" for start in range(10)],
            [f"{(start + seen) % 10}..." for start in range(10)],
            judged.images[:4],
            judged.follows[:4],
            seen,
            path=folder / "continuations.png",
        )
        return ["continuations.png"]

    task, chance = ("true continuation picked among ten", {"contrastive": 0.1})
    levels = {}
    if bce:
        task, chance = ("true or broken, also picked of ten", {"contrastive": 0.5, "of ten": 0.1})
        levels = {"loss": math.log(2), "contrastive_accuracy": 0.5}
    elif options.negatives == "batch":
        size = options.batch_size
        levels = {"loss": math.log(size), "contrastive_accuracy": 1 / size}
    return Experiment(
        module=build_cpc(options, splits.train.images, seed),
        batches=EpochShuffledBatches(
            (training.images, training.follows.long()) if bce else training.images,
            options.batch_size,
            seed,
        ),
        scores=scores,
        headline="contrastive",
        measured=f"contrastive: {task}; linear probe of the last digit seen",
        data="handwritten digits of scikit-learn in sequences that count upwards",
        references={
            "chance": chance,
            "raw pixels": {
                "probe z": linear_probe(
                    probed.images[:, seen - 1].flatten(1).numpy(),
                    probed.labels[:, seen - 1].numpy(),
                    held_out.images[:, seen - 1].flatten(1).numpy(),
                    held_out.labels[:, seen - 1].numpy(),
                    labels_per_class=None,
                )
            },
        },
        levels=levels,
        figures=figures,
    )


def build_cpc(options: CPCOptions, images: torch.Tensor, seed: int) -> CPC:
    """The module with its initial parameters, a function of ``options`` and ``seed``; batch norm
    starts from the statistics of ``images`` [N, 1, H, W]."""
    torch.manual_seed(seed)
    encoder = SmallCNN(in_channels=1, width=options.width)
    calibrate_batch_norm(encoder, images)
    sizes = options.context_features, options.features, options.predicted_steps
    return CPC(
        StepEncoder(encoder, options.features),
        GRUContext(options.features, options.context_features),
        CPCBCELoss(*sizes, return_metrics=True)
        if options.objective == "cpc_bce"
        else CPCLoss(*sizes, negatives=options.negatives, return_metrics=True),
        context_steps=options.context_steps,
        optimization=options,
    )

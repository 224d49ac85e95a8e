"""CLIP and SigLIP: two towers, one for each half of a pair."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import CLIPLoss, SigLIPLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.tokens import PADDING
from fastcl.encoders import TwoTower
from fastcl.evaluation.features import extract_features
from fastcl.trainers import texts
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.texts import CLIPOptions, TowerOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


class CLIP(pl.LightningModule):
    """Two towers trained with the loss of CLIP or of SigLIP, scale and bias learnt.

    Batches are (first, second): what the towers' encoders take, row by row. Token ids, which are
    integers, lose a share of their words first.

    Args:
        towers: the two encoders and where they meet.
        loss: ``"clip"`` or ``"siglip"``.
        word_dropout: share of each text's tokens, the first excepted, that training leaves out.
        optimization: optimizer and schedule.

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
    Supervision", figure 3; Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """

    def __init__(
        self,
        towers: TwoTower,
        *,
        loss: str = "clip",
        word_dropout: float = 0.0,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        if loss not in ("clip", "siglip"):
            raise ValueError(f"loss: expected clip or siglip, got {loss!r}")
        self.towers = towers
        self.loss = (CLIPLoss if loss == "clip" else SigLIPLoss)(return_metrics=True)
        self.word_dropout = word_dropout
        self.optimization = optimization

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        pair = self.towers(*(drop_words(half, self.word_dropout) for half in batch))
        if isinstance(self.loss, CLIPLoss):
            loss, metrics = self.loss(*pair, self.towers.scale)
        else:
            loss, metrics = self.loss(*pair, self.towers.scale, self.towers.logit_bias)
        scale = self.towers.logit_scale.detach().exp()
        log_batch(self, len(batch[0]), loss, {**metrics, "scale": scale})
        return loss

    @torch.no_grad()
    def embed(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where held-out halves [N, ...] and [M, ...] of pairs lie, [N, P] and [M, P]."""
        towers = self.towers
        return (
            towers.first_projection(extract_features(towers.first, first)),
            towers.second_projection(extract_features(towers.second, second)),
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def drop_words(inputs: torch.Tensor, share: float) -> torch.Tensor:
    """Token ids [B, L] with ``share`` of the tokens turned into padding, the first of a row kept.

    Other inputs come back as they are. The draws are PyTorch's global ones.
    """
    if not share or inputs.is_floating_point():
        return inputs
    left_out = torch.rand(inputs.shape, device=inputs.device) < share
    left_out[:, 0] = False
    return inputs.masked_fill(left_out, PADDING)


def experiment(options: CLIPOptions, seed: int) -> Experiment:
    """Sources and docstrings, judged by retrieval among functions of unseen packages."""
    data = texts.load(options)
    torch.manual_seed(seed)
    # One encoder: words and identifiers share their vectors. What each side makes of them differs.
    encoder = texts.build_encoder(options, data.tokenizer)
    sources, docstrings = data.scored.sources, data.scored.docstrings
    return Experiment(
        module=build_clip(options, encoder, encoder),
        batches=EpochShuffledBatches(
            (data.train.sources, data.train.docstrings), options.batch_size, seed
        ),
        scores=lambda module: texts.search_scores(*module.embed(sources, docstrings)),
        headline="recall@10",
        measured=texts.MEASURED,
        data=texts.DATA,
        references={
            "TF-IDF": texts.search_scores(*texts.tfidf_vectors(data)),
            "chance": texts.chance_scores(len(data.scored)),
        },
        levels=chance_levels(options),
    )


def build_clip(options: TowerOptions, first: nn.Module, second: nn.Module) -> CLIP:
    """Two encoders and fresh projections, trained as ``options`` say."""
    towers = TwoTower(
        first, second, options.dim, temperature=options.temperature, bias=options.bias
    )
    return CLIP(towers, loss=options.loss, word_dropout=options.word_dropout, optimization=options)


def chance_levels(options: TowerOptions) -> dict[str, float]:
    """What is logged while nothing is learnt, where that is known."""
    if options.loss == "siglip":
        return {}
    return {"loss": math.log(options.batch_size), "contrastive_accuracy": 1 / options.batch_size}

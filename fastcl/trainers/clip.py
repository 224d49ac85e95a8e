"""CLIP and SigLIP: two towers, one for each half of a pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from fastcl import CLIPLoss, SigLIPLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.scenes import IMAGE_SIZE, Scenes, load_scenes
from fastcl.data.tokens import WordTokenizer
from fastcl.encoders import SmallCNN, TextTransformer, TwoTower
from fastcl.evaluation.features import calibrate_batch_norm, extract_features
from fastcl.evaluation.retrieval import retrieval_scores
from fastcl.trainers import texts
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.texts import CLIPOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization

_DRAWINGS = 4


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
    """Sources and docstrings, or images and captions, judged by retrieval of unseen pairs."""
    return (_code_search if options.data == "code_search" else _scenes)(options, seed)


def _code_search(options: CLIPOptions, seed: int) -> Experiment:
    data = texts.load(options)
    module = _build(options, lambda: texts.build_encoder(options, data.tokenizer), None, seed)
    sources, docstrings = texts.tfidf_vectors(data)

    def scores(module: Any) -> dict[str, float]:
        return texts.search_scores(
            extract_features(module.towers.encode_second, data.scored.docstrings),
            extract_features(module.towers.first, data.scored.sources),
        )

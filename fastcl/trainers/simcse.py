"""SimCSE: a sentence shall be near itself under another dropout mask, or near its partner."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import SimCSELoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.code_search import CodePair
from fastcl.data.tokens import PADDING
from fastcl.evaluation.features import extract_features
from fastcl.evaluation.retrieval import alignment, uniformity
from fastcl.trainers import texts
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.clip import drop_words
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.texts import SimCSEOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization


class SimCSE(pl.LightningModule):
    """A text encoder, and a head that only training uses, trained with InfoNCE.

    Batches are token ids [B, L], each text being its own positive; or triples (text, positive,
    hard negative) of such, where hard negatives are negatives of every text of the batch.

    Args:
        encoder: token ids to features [B, D], with dropout.
        head: features to what is compared; :func:`mlp_head` is the paper's, identity none.
        temperature: of the cosines.
        hard_negative_weight: added to the logit of a text's own hard negative; 0 changes nothing.
        word_dropout: share of the tokens, the first excepted, left out of each view.
        optimization: optimizer and schedule.

    Source: Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings",
    equations 4 and 5.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        *,
        temperature: float = 0.05,
        hard_negative_weight: float = 0.0,
        word_dropout: float = 0.0,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.loss = SimCSELoss(
            temperature, hard_negative_weight=hard_negative_weight, return_metrics=True
        )
        self.word_dropout = word_dropout
        self.optimization = optimization

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the loss sees, [B, D], of token ids [B, L]."""
        return self.head(self.encoder(drop_words(tokens, self.word_dropout)))

    def training_step(
        self, batch: torch.Tensor | tuple[torch.Tensor, ...], batch_index: int
    ) -> torch.Tensor:
        views = (batch, batch) if isinstance(batch, torch.Tensor) else batch
        loss, metrics = self.loss(*map(self, views))
        log_batch(self, len(views[0]), loss, metrics)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def experiment(options: SimCSEOptions, seed: int) -> Experiment:
    """Docstrings and sources in one space, judged by code search and by a probe."""
    data = texts.load(options)
    train, scored = data.train, data.scored
    training: torch.Tensor | tuple[torch.Tensor, ...]
    if options.supervised:
        training = train.docstrings, train.sources, train.sources[hard_negatives(train.pairs)]
    else:
        missing = options.source_length - options.docstring_length
        training = torch.cat([F.pad(train.docstrings, (0, missing), value=PADDING), train.sources])
    torch.manual_seed(seed)
    encoder = texts.build_encoder(options, data.tokenizer)
    module = SimCSE(
        encoder,
        mlp_head(encoder.feature_dim) if options.head else nn.Identity(),
        temperature=options.temperature,
        hard_negative_weight=options.hard_negative_weight,
        word_dropout=options.word_dropout,
        optimization=options,
    )

    def embed(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            extract_features(module.encoder, scored.sources),
            extract_features(module.encoder, scored.docstrings),
        )

    def scores(module: Any) -> dict[str, float]:
        sources, docstrings = embed(module)
        probe = texts.package_probe(docstrings, scored.pairs)
        return {**texts.search_scores(sources, docstrings), "package probe": probe}

    def geometry(module: Any) -> dict[str, float]:
        sources, docstrings = embed(module)
        both = torch.cat([sources, docstrings])
        return {"alignment": alignment(sources, docstrings), "uniformity": uniformity(both)}

    before = geometry(module)
    sources, docstrings = texts.tfidf_vectors(data)
    tfidf = texts.search_scores(sources, docstrings)
    return Experiment(
        module=module,
        batches=EpochShuffledBatches(training, options.batch_size, seed),
        scores=scores,
        headline="mrr",
        measured=f"{texts.MEASURED}; packages told apart by a linear probe of docstrings",
        data=texts.DATA,
        references={
            "TF-IDF": {**tfidf, "package probe": texts.package_probe(docstrings, scored.pairs)},
            "chance": texts.chance_scores(len(scored)),
        },
        details=lambda module: {"geometry": {"before": before, "after": geometry(module)}},
    )


def mlp_head(width: int) -> nn.Module:
    """The head of SimCSE (section 6.1): linear, tanh; not used where features are."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


def hard_negatives(pairs: tuple[CodePair, ...]) -> torch.Tensor:
    """For each pair [N] the index of another one, of the same module where that has several."""
    members: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        members.setdefault(pair.module, []).append(index)
    chosen = torch.arange(1, len(pairs) + 1) % len(pairs)
    for indices in members.values():
        if len(indices) > 1:
            chosen[indices] = torch.tensor(indices[1:] + indices[:1])
    return chosen

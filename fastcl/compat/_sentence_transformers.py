"""The classes of :mod:`fastcl.compat.sentence_transformers`, which stand on the peer's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ranking import ranking_loss

_NEEDED = "pip install 'sentence-transformers>=6.2'"
try:
    from sentence_transformers.sentence_transformer import losses as _peer
    from sentence_transformers.util import cos_sim, dot_score
except ImportError as error:
    raise ImportError(
        "fastcl.compat.sentence_transformers stands on classes of sentence-transformers 6.2 or "
        f"newer, which cannot be imported here ({error}): {_NEEDED}"
    ) from error


class MultipleNegativesRankingLoss(_peer.MultipleNegativesRankingLoss):
    """The peer's class with its ``compute_loss_from_embeddings`` on fastcl's operators."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        """:func:`~fastcl.compat.ranking.ranking_loss` of queries, documents, hard negatives."""
        if self.similarity_fct not in (cos_sim, dot_score):
            return super().compute_loss_from_embeddings(embeddings, labels)
        return ranking_loss(
            embeddings, self.scale, normalize=self.similarity_fct is cos_sim,
            gather=self.gather_across_devices, directions=self.directions,
            partition_mode=self.partition_mode, hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
        )  # fmt: skip


class CachedMultipleNegativesRankingLoss(_peer.CachedMultipleNegativesRankingLoss):
    """The peer's class (GradCache for the encoder) around :class:`MultipleNegativesRankingLoss`."""

    loss: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        theirs: Any = self.loss
        self.loss = MultipleNegativesRankingLoss(
            self.model,
            **{
                name: getattr(theirs, name)
                for name in (
                    "scale", "similarity_fct", "gather_across_devices", "directions",
                    "partition_mode", "hardness_mode", "hardness_strength",
                )
            },
        )  # fmt: skip

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of mini-batches of embeddings, one list for each column."""
        loss = self.loss.compute_loss_from_embeddings([torch.cat(r) for r in reps], labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

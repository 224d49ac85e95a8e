"""Weighted k-nearest-neighbour classification, the usual monitor of self-supervised training."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def knn_predict(
    queries: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int | None = None,
    chunk_size: int = 4096,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify each query by its k nearest bank rows in cosine similarity s, each voting exp(s/T).

    Args:
        queries: [N, D], any floating dtype; normalised here.
        bank: [M, D], same dtype and device; normalised here.
        bank_labels: [M] int64 in [0, num_classes).
        k: neighbours, clipped to M.
        temperature: T > 0 of the votes.
        num_classes: C; the largest label + 1 when not given.
        chunk_size: queries handled at once, so memory is O(chunk_size * M).

    Returns:
        predictions [N] int64 and scores [N, C] in the dtype of ``queries``, where scores[n, c]
        is the sum of exp(s/T) over those of the k neighbours that carry label c (infinite where
        that overflows, NaN for the other classes; predictions are right nevertheless).

    Raises:
        ValueError: shapes that do not fit, an empty bank, k < 1 or temperature <= 0.

    Source: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination", section 3.4.
    """
    _check(queries, bank, bank_labels, k, temperature)
    classes = int(bank_labels.max()) + 1 if num_classes is None else num_classes
    keys = F.normalize(bank, dim=1).T
    predictions, scores = [], []
    for chunk in F.normalize(queries, dim=1).split(chunk_size):
        similarity, neighbours = (chunk @ keys).topk(min(k, len(bank)), dim=1)
        logits = similarity / temperature
        # Votes relative to the nearest neighbour's: they decide even where exp(s/T) overflows.
        votes = (logits - logits[:, :1]).exp()
        relative = votes.new_zeros(len(chunk), classes)
        relative.scatter_add_(1, bank_labels[neighbours], votes)
        predictions.append(relative.argmax(dim=1))
        scores.append(relative * logits[:, :1].exp())
    return torch.cat(predictions), torch.cat(scores)


def knn_accuracy(
    queries: torch.Tensor,
    labels: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Share of queries [N, D] whose ``knn_predict`` class equals ``labels`` [N]; in [0, 1]."""
    predictions, _ = knn_predict(queries, bank, bank_labels, k=k, temperature=temperature)
    return (predictions == labels).double().mean().item()


def _check(
    queries: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    k: int,
    temperature: float,
) -> None:
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1] or not len(bank):
        raise ValueError(
            "queries and bank: expected [N, D] and [M >= 1, D], "
            f"got {list(queries.shape)} and {list(bank.shape)}"
        )
    if bank_labels.shape != bank.shape[:1]:
        raise ValueError(
            f"bank_labels: expected shape [{len(bank)}], one per bank row, "
            f"got {list(bank_labels.shape)}"
        )
    if k < 1:
        raise ValueError(f"k: expected an integer >= 1, got {k}")
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")

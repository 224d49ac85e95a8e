"""Where the right answer stands among all answers: Hits@k and the mean reciprocal rank."""

from __future__ import annotations

import torch


@torch.no_grad()
def ranks_by_distance(
    predictions: torch.Tensor, references: torch.Tensor, chunk_size: int = 1024
) -> torch.Tensor:
    """Rank [N] of reference i among all by Euclidean distance from prediction i; 1 is the nearest.

    A rank is the number of references that are not strictly farther than i, itself among them.
    Ties count against it, so a model that says the same of everything is last everywhere, and one
    that says NaN too. All distances are looked at (a mean reciprocal rank needs every one, not
    the best few), in O(chunk_size * N) memory.

    Args:
        predictions, references: [N, D], row by row.
        chunk_size: predictions handled at once.

    Raises:
        ValueError: not two matrices of one shape.
    """
    if predictions.ndim != 2 or predictions.shape != references.shape:
        raise ValueError(
            "predictions and references: expected two matrices [N, D], "
            f"got {list(predictions.shape)} and {list(references.shape)}"
        )
    ranks = []
    for start in range(0, len(predictions), chunk_size):
        # differences, not products: states lie so close that squares would cancel
        distances = torch.cdist(
            predictions[start : start + chunk_size],
            references,
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        own = distances.diagonal(start)[:, None]
        ranks.append((~(distances > own)).sum(dim=1))
    return torch.cat(ranks)


def hits_at(ranks: torch.Tensor, k: int) -> float:
    """Share of ranks [N] that are at most ``k``."""
    return (ranks <= k).double().mean().item()


def mean_reciprocal_rank(ranks: torch.Tensor) -> float:
    """Mean of 1 / rank over ranks [N]."""
    return ranks.double().reciprocal().mean().item()

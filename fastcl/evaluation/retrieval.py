"""Retrieval, verification, alignment and uniformity of embeddings; memory is linear in the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from fastcl.ops import Pairs, similarity_logsumexp, similarity_topk


def retrieval_scores(
    queries: torch.Tensor,
    keys: torch.Tensor | None = None,
    *,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    depth: int = 100,
) -> dict[str, float]:
    """Recall@k and mean reciprocal rank of the keys in the order of their cosine.

    A key is relevant to a query when their ids are equal. Recall@k is the share of queries with a
    relevant key among the first k (metric learning's Recall@K); the reciprocal rank is that of the
    first relevant key, 0 where it is not among the first ``depth``.

    Args:
        queries: [N, D], any float dtype; normalised here.
        keys: [M, D]; ``None`` for the queries themselves, each of which then never finds itself.
        query_ids, key_ids: [N] and [M] int64; by default row i belongs to row i. With
            ``keys=None`` the ids are ``query_ids``.
        ks: the k of recall@k.
        depth: how far ranks are followed, clipped to M.

    Returns:
        ``{"recall@1": ..., "recall@5": ..., "recall@10": ..., "mrr": ...}``, all in [0, 1].

    Raises:
        ValueError: ids that are missing or do not fit, k below 1, or an operand that does not fit.
    """
    queries = F.normalize(queries, dim=1)
    n = len(queries)
    if keys is None:
        if query_ids is None or key_ids is not None:
            raise ValueError("query_ids: expected alone, and always, where keys is None")
        key_ids, m = query_ids, n
    else:
        m = len(keys)
        if query_ids is None and key_ids is None and n == m:
            query_ids = key_ids = torch.arange(n, device=queries.device)
        if query_ids is None or key_ids is None:
            raise ValueError(
                f"query_ids and key_ids: expected both, for {n} queries and {m} keys, got "
                f"{'neither' if query_ids is key_ids else 'one'}"
            )
        keys = F.normalize(keys, dim=1)
    for name, ids, count in (("query_ids", query_ids, n), ("key_ids", key_ids, m)):
        if ids.shape != (count,):
            raise ValueError(f"{name}: expected shape [{count}], got {list(ids.shape)}")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: expected integers >= 1, got {list(ks)}")
    deep = min(max(depth, *ks), m)
    pairs = Pairs(skip=(0,)) if keys is None else Pairs()
    found = similarity_topk(queries, keys, k=deep, pairs=pairs).indices
    hits = (key_ids[found] == query_ids[:, None]) & (found >= 0)
    rank = torch.where(hits.any(1), hits.int().argmax(1) + 1, deep + 1)
    scores = {f"recall@{k}": (rank <= min(k, deep)).double().mean().item() for k in ks}
    reciprocal = torch.where(rank <= min(depth, deep), 1.0 / rank.double(), 0.0)
    return {**scores, "mrr": reciprocal.mean().item()}


def verification_auc(
    features: torch.Tensor, labels: torch.Tensor, *, pairs: int = 20000, seed: int = 0
) -> float:
    """Area under the ROC curve of "cosine above a threshold" for "same label", in [0, 1].

    Args:
        features: [N, D]; normalised here.
        labels: [N] integers.
        pairs: how many pairs of different rows are drawn, uniformly.
        seed: of the drawing.

    Raises:
        ValueError: the drawn pairs are all of one kind.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_verified_pairs(features, labels, pairs, seed)))


def verification_roc(
    features: torch.Tensor, labels: torch.Tensor, *, pairs: int = 20000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The curve whose area is :func:`verification_auc`: shares of pairs of different labels (false
    positives) and of equal labels (true positives) above each threshold, from (0, 0) to (1, 1).

    Arguments and errors are those of :func:`verification_auc`.
    """
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(*_verified_pairs(features, labels, pairs, seed))
    return false, true


def _verified_pairs(
    features: torch.Tensor, labels: torch.Tensor, pairs: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of drawn pairs of different rows, whether their labels are equal, and their cosines."""
    generator = torch.Generator().manual_seed(seed)
    n = len(features)
    first = torch.randint(n, (pairs,), generator=generator)
    second = (first + torch.randint(1, n, (pairs,), generator=generator)) % n
    same = labels.cpu()[first] == labels.cpu()[second]
    if same.all() or not same.any():
        raise ValueError(
            f"labels: expected pairs of equal and of different labels among {pairs} drawn pairs, "
            f"got {int(same.sum())} equal"
        )
    unit = F.normalize(features, dim=1).cpu()
    return same.numpy(), (unit[first] * unit[second]).sum(1).numpy()


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared distance of unit rows [N, D] and their partners [N, D]; lower is better.

    Source: Wang and Isola 2020, "Understanding Contrastive Representation Learning through
    Alignment and Uniformity on the Hypersphere", section 4.1, alpha = 2.
    """
    distance = (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(1)
    return distance.double().mean().item()


def uniformity(features: torch.Tensor) -> float:
    """ln of the mean of exp(-2 |x - y|^2) over pairs of different unit rows; lower is better.

    |x - y|^2 = 2 - 2 x.y, so this is a log-sum-exp of 4 x.y - 4, taken tile by tile.

    Source: Wang and Isola 2020, section 4.1, t = 2.
    """
    unit = F.normalize(features, dim=1)
    n = len(unit)
    rows = similarity_logsumexp(unit, None, 4.0, pairs=Pairs(skip=(0,))).rows
    return torch.logsumexp(rows.double(), 0).item() - 4.0 - math.log(n * (n - 1))

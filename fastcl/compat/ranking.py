"""Multiple negatives ranking of sentence embeddings, without sentence-transformers itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as f
from ..losses.common import softmax_loss
from ..losses.inputs import check_positive, unit_pair, unit_rows
from ..ops import Pairs
from ..ops.checks import check_same_shape, precision_of
from .common import everyone, own_mean

OTHERS_PENALISED = ("in_batch_negatives", "all_negatives")
OWN_PENALISED = ("hard_negatives", "all_negatives")


def ranking_loss(
    embeddings: Sequence[Tensor],
    scale: float = 20.0,
    *,
    normalize: bool = True,
    gather: bool = False,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
) -> Tensor:
    """The loss of sentence-transformers' ``MultipleNegativesRankingLoss``.

    With Z over a query's candidates in all directions, loss = ln Z - s+ (``"joint"``), or the mean
    of that over directions (``"per_direction"``). The positive occurs in Z once for each of
    ``query_to_doc`` and ``doc_to_query``, c times in all, so with the negatives' sum N

        ln(c e^s+ + N) - s+ = ln c + softplus(ln N - ln c - s+).

    Args:
        embeddings: queries, documents and any number of hard negatives, [B, D] each, row by row.
        scale: inverse temperature.
        normalize: scores are cosines, else inner products.
        gather: candidates come from all ranks; every rank returns its own queries' mean.
        directions: of ``query_to_doc`` (always), ``query_to_query``, ``doc_to_query`` (documents
            against all queries) and ``doc_to_doc`` (against documents of other queries).
        partition_mode: one softmax over all directions, or one for each.
        hardness_mode, hardness_strength: which negatives' scores are raised by that many times
            their undifferentiated cosine: those of other samples (``"in_batch_negatives"``), the
            sample's own (``"hard_negatives"``) or ``"all_negatives"``, in ``query_to_doc``.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: embeddings of the wrong dtype, shape or device; fewer than two; a
            scale that is not positive; ranks that disagree; NaN or infinity (looked at where that
            is free, on a CPU).
        RuntimeError: a rank that ended or does not answer.
    """
    if len(embeddings) < 2:
        raise ValueError(f"embeddings came {len(embeddings)}; expected at least 2")
    check_positive(scale, "scale")
    names = ["queries", "documents"]
    check_same_shape(embeddings[0], embeddings[1], "queries", "documents")
    strength = hardness_strength if hardness_mode is not None else 0.0
    if len(embeddings) == 2 and not gather and not strength:  # in one operator where that is better
        if set(directions) == {"query_to_doc"}:
            return f.info_nce(embeddings[0], embeddings[1], None, 1.0 / scale, normalize=normalize)
        if partition_mode == "per_direction":
            return f.clip(embeddings[0], embeddings[1], logit_scale=scale, normalize=normalize)

    both, cosines = unit_pair(embeddings[0], embeddings[1], ("queries", "documents"), normalize)
    queries, positives = both.split(embeddings[0].shape[0])
    hard = []
    for i, x in enumerate(embeddings[2:]):
        names.append(f"negatives[{i}]")
        check_same_shape(embeddings[0], x, names[0], names[-1])
        hard.append(unit_rows(x, names[-1], normalize))
    documents = torch.cat([positives, *hard])
    precision = precision_of(embeddings[0], embeddings[1], None)
    facts = {"scale": scale, "precision": precision, "directions": tuple(sorted(directions))}
    over_queries = everyone(gather, queries, loss="compat ranking", candidates="queries", **facts)
    over_documents = everyone(gather, documents, loss="compat ranking", **facts)
    own = torch.arange(queries.shape[0], device=queries.device) + over_queries.start
    unlike = Pairs("different", own, own.repeat(1 + len(hard)))

    def sums(ranks, a, b, pairs, factor=scale):
        return ranks.logsumexp(a, b, factor, pairs=pairs, precision=precision).rows

    if strength:
        negatives = [
            _penalised(
                queries, documents, hard, scale, strength, hardness_mode,
                lambda a, b, factor: sums(over_documents, a, b, unlike, factor),
            )
        ]  # fmt: skip
    else:
        negatives = [sums(over_documents, queries, documents, Pairs(skip=(0,)))]
    if "doc_to_query" in directions:
        negatives.append(sums(over_queries, positives, queries, Pairs(skip=(0,))))
    positive = cosines * scale
    if partition_mode == "per_direction":
        losses = torch.stack([softmax_loss(positive, x) for x in negatives]).mean(0)
        return own_mean(losses, over_queries)

    copies = math.log(len(negatives))
    if "query_to_query" in directions:
        negatives.append(sums(over_queries, queries, None, Pairs(skip=(0,))))
    if "doc_to_doc" in directions:
        negatives.append(sums(over_documents, positives, documents, unlike))
    losses = copies + softmax_loss(positive + copies, _together(negatives))
    return own_mean(losses, over_queries)


def _penalised(queries, documents, hard, scale, strength, mode, others) -> Tensor:
    """Log-sum-exp over ``query_to_doc`` negatives, some with raised scores.

    A raised score is scale * cosine + strength * cosine, the latter undifferentiated: a product of
    rows twice as wide, so that derivatives of any order are those of the definition.
    """
    if mode in OTHERS_PENALISED:
        wide = torch.cat([scale * queries, strength * queries.detach()], 1)
        parts = [others(wide, torch.cat([documents, documents.detach()], 1), 1.0)]
    else:
        parts = [others(queries, documents, scale)]
    for x in hard:
        score = (queries * x).sum(1)
        rise = strength * score.detach() if mode in OWN_PENALISED else 0.0
        parts.append(scale * score + rise)
    return _together(parts)


def _together(parts: list[Tensor]) -> Tensor:
    """Log-sum-exp over partial ones; -inf with zero gradient where all are."""
    stacked = torch.stack(parts)
    empty = torch.isneginf(stacked).all(0)
    merged = torch.logsumexp(torch.where(empty, 0.0, stacked), 0)
    return torch.where(empty, float("-inf"), merged)

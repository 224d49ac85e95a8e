"""What every replaced loss should return, written densely in float64 from its definition.

The reference of ``fastcl check --against`` and of the tests. Nothing here shares code with the
losses or with a peer. Rows are normalised where the peer does so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_NEVER = float("-inf")


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.double(), dim=-1)


def _lse(scores: Tensor, keep: Tensor) -> Tensor:
    """Log-sum-exp over kept columns; -inf, without a gradient, where there is none."""
    some = keep.any(1)
    kept = torch.where(some[:, None], scores.masked_fill(~keep, _NEVER), 0.0)
    return torch.where(some, torch.logsumexp(kept, 1), _NEVER)


def _views(out0: Tensor, out1: Tensor, temperature: float):
    z = _unit(torch.cat([out0, out1]))
    index = torch.arange(len(z))
    partner = index.roll(len(out0))
    scores = z @ z.T / temperature
    others = ~torch.eye(len(z), dtype=torch.bool)
    return z, scores, scores[index, partner], others, index, partner


def nt_xent(out0: Tensor, out1: Tensor, temperature: float = 0.5) -> Tensor:
    _, scores, positive, others, _, _ = _views(out0, out1, temperature)
    return (_lse(scores, others) - positive).mean()


def moco(
    out0: Tensor, out1: Tensor, bank: Tensor, temperature: float = 0.5, normalize: bool = True
) -> Tensor:
    q, k = (_unit(x) if normalize else x.double() for x in (out0, out1))
    scores = torch.cat([(q * k).sum(1, keepdim=True), q @ bank.double().T], 1) / temperature
    return (torch.logsumexp(scores, 1) - scores[:, 0]).mean()


def dcl(out0, out1, temperature: float = 0.1, sigma: float | None = None) -> Tensor:
    _, scores, positive, others, index, partner = _views(out0, out1, temperature)
    others[index, partner] = False
    weight = torch.ones_like(positive)
    if sigma is not None:
        half = positive[: len(out0)].detach() * temperature / sigma
        weight = (2 - len(out0) * torch.softmax(half, 0)).repeat(2)
    negatives = _lse(scores, others)
    # a batch of one has no negatives, and no term for them
    return (torch.where(torch.isneginf(negatives), 0.0, negatives) - weight * positive).mean()


def info_nce(query, positive_key, negative_keys=None, temperature: float = 0.1) -> Tensor:
    q, p = _unit(query), _unit(positive_key)
    if negative_keys is None:
        scores = q @ p.T / temperature
        return (torch.logsumexp(scores, 1) - scores.diagonal()).mean()
    k = _unit(negative_keys)
    negative = torch.einsum("nd,nmd->nm", q, k) if k.dim() == 3 else q @ k.T
    scores = torch.cat([(q * p).sum(1, keepdim=True), negative], 1) / temperature
    return (torch.logsumexp(scores, 1) - scores[:, 0]).mean()


def clip(images: Tensor, texts: Tensor, scale) -> Tensor:
    scores = scale * images.double() @ texts.double().T
    both = torch.logsumexp(scores, 1) + torch.logsumexp(scores, 0)
    return (both / 2 - scores.diagonal()).mean()


def siglip(images: Tensor, texts: Tensor, scale, bias, negative_only: bool = False) -> Tensor:
    scores = scale * images.double() @ texts.double().T + bias
    sign = -torch.ones_like(scores)
    if not negative_only:
        sign = sign + 2 * torch.eye(len(scores))
    return -F.logsigmoid(sign * scores).sum() / len(images)


def ranking(
    *embeddings: Tensor,
    scale: float = 20.0,
    normalize: bool = True,
    directions: tuple[str, ...] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
) -> Tensor:
    rows = [_unit(x) if normalize else x.double() for x in embeddings]
    q, d, documents, n = rows[0], rows[1], torch.cat(rows[1:]), len(rows[0])
    of_sample = torch.arange(n).repeat(len(rows) - 1)
    own = torch.arange(n)[:, None] == of_sample
    is_positive = torch.zeros_like(own)
    is_positive[:, :n] = torch.eye(n, dtype=torch.bool)
    everything = torch.ones(n, n, dtype=torch.bool)
    raised = {
        None: torch.zeros_like(own),
        "in_batch_negatives": ~own,
        "hard_negatives": own & ~is_positive,
        "all_negatives": ~is_positive,
    }[hardness_mode]
    cosines = q @ documents.T
    to_documents = scale * cosines + hardness_strength * raised * cosines.detach()
    candidates = {
        "query_to_doc": (to_documents, torch.ones_like(own)),
        "query_to_query": (scale * q @ q.T, ~torch.eye(n, dtype=torch.bool)),
        "doc_to_query": (scale * d @ q.T, everything),
        "doc_to_doc": (scale * d @ documents.T, ~own),
    }
    sums = [_lse(*candidates[name]) for name in directions]
    positive = scale * (q * d).sum(1)
    if partition_mode == "joint":
        return (torch.logsumexp(torch.stack(sums), 0) - positive).mean()
    return (torch.stack(sums).mean(0) - positive).mean()


def sup_con_views(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 0.07,
    base_temperature: float = 0.07,
    contrast_mode: str = "all",
) -> Tensor:
    b, v = features.shape[:2]
    keys = features.double().flatten(2).transpose(0, 1).reshape(b * v, -1)
    anchors = keys if contrast_mode == "all" else keys[:b]
    if mask is None:
        labels = torch.arange(b) if labels is None else labels
        mask = labels[:, None] == labels
    share = mask.double().repeat(len(anchors) // b, v)
    other = ~torch.eye(len(anchors), b * v, dtype=torch.bool)
    share = share * other
    scores = anchors @ keys.T / temperature
    losses = share * (_lse(scores, other)[:, None] - scores)
    count = share.sum(1)
    losses = losses.sum(1) / torch.where(count == 0, 1.0, count)
    return temperature / base_temperature * losses.mean()


def sup_con_inside(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    scores = _unit(z) @ _unit(z).T / temperature
    other = ~torch.eye(len(z), dtype=torch.bool)
    same = (indexes[:, None] == indexes) & other
    losses = _lse(scores, other) - _lse(scores, same)
    return torch.where(same.any(1), losses, 0.0).mean()


def by_label(
    loss: str,
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    itself: Tensor | None = None,
    temperature: float = 0.1,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    margin: float = 0.05,
) -> Tensor:
    """pytorch-metric-learning's losses with their default distances and reducers.

    Args:
        loss: ``"NTXentLoss"``, ``"SupConLoss"``, ``"ContrastiveLoss"`` or ``"TripletMarginLoss"``.
        itself: [N, M], which keys are the anchor; by default the diagonal without ``ref_emb``.
    """
    q = _unit(embeddings)
    k = q if ref_emb is None else _unit(ref_emb)
    key_labels = labels if ref_labels is None else ref_labels
    if itself is None:
        itself = torch.eye(len(q), len(k), dtype=torch.bool) & (ref_emb is None)
    same = (labels[:, None] == key_labels) & ~itself
    other = labels[:, None] != key_labels
    scores = q @ k.T
    nothing = (q * 0).sum()
    if loss in ("NTXentLoss", "SupConLoss") and not (same.any() and other.any()):
        return nothing
    scores = scores / temperature if loss in ("NTXentLoss", "SupConLoss") else scores
    if loss == "NTXentLoss":
        negatives = _lse(scores, other)
        anchors, positives = torch.where(same)
        pair = scores[anchors, positives]
        return F.softplus(negatives[anchors] - pair, threshold=700).mean()
    if loss == "SupConLoss":
        some = same.any(1)
        mean = (scores * same).sum(1) / same.sum(1).clamp(min=1)
        return _above_zero((_lse(scores, same | other) - mean)[some])
    distances = (2 - 2 * scores).clamp(min=0)
    apart = distances > 0
    distances = torch.where(apart, torch.where(apart, distances, 1.0).sqrt(), 0.0)
    if loss == "ContrastiveLoss":
        if same.sum() < 2 and other.sum() < 2:
            return nothing
        near = torch.relu(distances[same] - pos_margin)
        return _above_zero(near) + _above_zero(torch.relu(neg_margin - distances[other]))
    a, p, n = torch.where(same[:, :, None] & other[:, None])
    return _above_zero(torch.relu(distances[a, p] - distances[a, n] + margin))


def _above_zero(losses: Tensor) -> Tensor:
    return losses.sum() / (losses > 0).sum().clamp(min=1)

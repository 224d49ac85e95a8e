"""Losses of softmax type with one positive: NT-Xent and InfoNCE.

All are compositions of one log-sum-exp over *negatives* with the positive's score kept outside
it. Scores are cosines over the temperature unless ``normalize=False``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import meet
from ..memory.queue import NegativeQueue, check_queue, merge, stored_precision
from ..ops import LogSumExp, Pairs, pair_softmax
from ..ops.checks import check_features, check_same_width, precision_of
from ..ops.pairs import describe
from .common import Views, finish, smooth, softmax_loss, softmax_metrics, whole_loss
from .inputs import (
    check_fraction,
    check_vector,
    scale_of,
    stored_rows,
    unit_pair,
    unit_rows,
)
from .modules import TemperatureLoss


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    queue: NegativeQueue | None = None,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    distributed: str | None = None,
    process_group=None,
):
    """NT-Xent, the loss of SimCLR (Chen et al. 2020, eq. 1), over the 2B rows of two views.

    Each row is classified among the 2B - 1 others; its other view is the positive.

    Args:
        z1, z2: [B, D], any float dtype; row i of one is the other view of row i of the other.
        temperature: positive number or one-element tensor (differentiable).
        queue: its keys are further negatives of every row; read, not changed.
        ids: [B] integers; samples of equal id are never each other's negatives, nor are queue
            keys of equal id.
        weight: [B] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        label_smoothing: share of the target spread evenly over all candidates.
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over 2B rows, ``"sum"``, or ``"none"`` for [2B] losses.
        return_metrics: also return a dict of 0-dim tensors from the same sweep: ``accuracy``
            (the positive beats every negative), ``positive_similarity``, ``negative_similarity``
            (mean cosines) and ``effective_negatives`` (mean of sum_j exp(s_j - max_j s_j)).
        distributed: ``"gather"`` or ``"ring"``: the rows of all ranks are one batch, of which
            every rank returns the mean; see :mod:`fastcl.distributed`.
        process_group: whose ranks; ``None`` for all.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range; ranks that
            disagree.
        RuntimeError: a rank that ended or does not answer.
    """
    check_fraction(label_smoothing, "label_smoothing")
    scale = scale_of(temperature)
    plain = ids is None and weight is None and not (label_smoothing or return_metrics)
    if plain and normalize and queue is None and distributed is None and process_group is None:
        loss = whole_loss(pair_softmax, z1, z2, ("z1", "z2"), reduction, scale, form="views")
        if loss is not None:
            return loss
    views = Views.of(z1, z2, ids, normalize)
    ranks = meet(
        distributed, process_group, views.rows, reduction, loss="nt_xent", scale=scale, ids=ids,
        precision=views.precision, weight=weight, label_smoothing=label_smoothing,
        return_metrics=return_metrics, queue=queue is not None,
    )  # fmt: skip
    negatives = ranks.logsumexp(
        views.rows, None, scale, pairs=views.pairs, maxima=return_metrics, precision=views.precision
    )
    extra = None
    if label_smoothing or return_metrics:
        extra = ranks.pair_sums(views.rows, views.rows, views.pairs)
    if queue is not None:
        negatives, extra = _with_queue(
            queue, views.rows, scale, views.pairs.query_ids, normalize, return_metrics,
            views.precision, negatives, extra,
        )  # fmt: skip
    positive = views.cosines * scale
    losses = softmax_loss(positive, negatives.rows)
    metrics = None
    if extra is not None:
        sums, count = extra
        if label_smoothing:
            losses = smooth(losses, positive, scale, sums, count, label_smoothing)
        if return_metrics:
            metrics = softmax_metrics(views.cosines, positive, negatives, sums, count, ranks)
    return finish(losses, reduction, views.repeat(weight), metrics, ranks)


def _with_queue(
    queue, rows, scale, ids, normalize, maxima, precision, negatives: LogSumExp | None, extra
) -> tuple[LogSumExp, tuple[Tensor, Tensor] | None]:
    """``negatives`` (``None``: no others) and ``extra``, if any, with the queue's keys."""
    check_queue(queue, normalize)
    found = queue.logsumexp(
        rows, scale, relation="any" if ids is None else "different", ids=ids, maxima=maxima,
        precision=stored_precision(precision, queue),
    )  # fmt: skip
    if extra is not None:
        extra = tuple(a + b for a, b in zip(extra, queue.negative_sums(rows, ids), strict=True))
    return found if negatives is None else merge(negatives, found), extra


class NTXentLoss(TemperatureLoss):
    """:func:`~fastcl.functional.nt_xent` as a module: ``NTXentLoss(0.1)(z1, z2)``.

    With a ``queue``, both views enter it, with ``ids``, after the loss is taken (in training mode).
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        label_smoothing: float = 0.0,
        queue: NegativeQueue | None = None,
        **options,
    ):
        super().__init__(temperature, **options)
        check_fraction(label_smoothing, "label_smoothing")
        self.label_smoothing = label_smoothing
        self.queue = None if queue is None else check_queue(queue, self.normalize)

    def forward(self, z1, z2, *, ids=None, weight=None):
        result = nt_xent(
            z1, z2, self.temperature, queue=self.queue, ids=ids, weight=weight,
            label_smoothing=self.label_smoothing, **self.options(),
        )  # fmt: skip
        if self.queue is not None:
            both = None if ids is None else torch.cat([ids, ids])
            self.queue.enqueue(torch.cat([z1.detach(), z2.detach()]), both)
        return result


def _paired_negatives(rows, negative_keys, scale, normalize) -> tuple[LogSumExp, Tensor, Tensor]:
    """Each query's own negatives [N, M, D]: their log-sum-exp, sum of cosines and number."""
    n, m, d = negative_keys.shape
    keys = unit_rows(negative_keys.reshape(n * m, d), "negative_keys", normalize).view(n, m, d)
    cosines = (rows[:, None] * keys).sum(2)
    scores = cosines * scale
    negatives = LogSumExp(
        torch.logsumexp(scores, 1),
        scores.new_empty(0),
        scores.detach().amax(1),
        scores.new_empty(0),
    )
    return negatives, cosines.sum(1), torch.full_like(cosines[:, 0], m)


def shared_rule(ids, negative_ids, in_batch: bool, n: int, m: int, like: Tensor) -> Pairs:
    if (negative_ids is None) != (in_batch or ids is None):
        raise ValueError(
            "ids and negative_ids go together with shared negative_keys, and ids alone without; "
            f"ids is {'absent' if ids is None else 'given'}, negative_ids is "
            f"{'absent' if negative_ids is None else 'given'}"
        )
    skip = (0,) if in_batch else ()
    if ids is None:
        return Pairs(skip=skip)
    ids = check_vector(ids, "ids", n, like)
    if negative_ids is not None:
        negative_ids = check_vector(negative_ids, "negative_ids", m, like)
    return Pairs("different", ids, ids if in_batch else negative_ids, skip)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    queue: NegativeQueue | None = None,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    distributed: str | None = None,
    process_group=None,
):
    """InfoNCE (van den Oord et al. 2018, eq. 4): each query picks its key among negatives.

    Args:
        query, positive_key: [N, D], row by row.
        negative_keys: ``None`` for the other queries' positive keys (none with a queue),
            [M, D] shared by all queries, or [N, M, D] of each query's own. Keys that need no
            gradient, unless they are each query's own, make the backward free. With
            ``distributed``, every rank's queries share the negatives of all ranks.
        temperature: positive number or one-element tensor (differentiable).
        queue: its keys are negatives of every query, beside ``negative_keys`` if there are any
            (MoCo: He et al. 2020, eq. 1); read, not changed. While it is empty and alone, the loss
            is 0.
        ids: [N] integers; a key of equal id is never a negative.
        negative_ids: [M] integers, the ids of shared ``negative_keys``; goes with ``ids``.
        weight, label_smoothing, normalize, return_metrics, distributed, process_group: as for
            :func:`nt_xent`.
        margin: taken off the positive's cosine before it is scaled.
        reduction: ``"mean"`` over N, ``"sum"``, or ``"none"`` for [N] losses.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_fraction(label_smoothing, "label_smoothing")
    scale = scale_of(temperature)
    plain = ids is None and weight is None and not (label_smoothing or margin or return_metrics)
    alone = queue is None and distributed is None and process_group is None
    if plain and normalize and alone and negative_keys is None and negative_ids is None:
        names = ("query", "positive_key")
        loss = whole_loss(pair_softmax, query, positive_key, names, reduction, scale, form="rows")
        if loss is not None:
            return loss
    both, cosines = unit_pair(query, positive_key, ("query", "positive_key"), normalize)
    n = query.shape[0]
    rows, positives = both.split(n)
    extra: tuple[Tensor, Tensor] | None = None  # sums over negatives and their number
    negatives: LogSumExp | None = None
    facts = {
        "loss": "info_nce", "scale": scale, "ids": ids, "weight": weight, "margin": margin,
        "label_smoothing": label_smoothing, "return_metrics": return_metrics,
        "queue": queue is not None,
    }  # fmt: skip
    if isinstance(negative_keys, Tensor) and negative_keys.dim() == 3:
        check_features(negative_keys, "negative_keys", "[N, M, D]")
        check_same_width(query, negative_keys, "query", "negative_keys")
        if negative_keys.shape[0] != n or ids is not None or negative_ids is not None:
            raise ValueError(
                f"negative_keys {describe(negative_keys)}; expected a first dimension of {n} "
                "and no ids, as each query's own negatives"
            )
        ranks = meet(distributed, process_group, rows, reduction, negatives="own", **facts)
        negatives, sums, count = _paired_negatives(rows, negative_keys, scale, normalize)
        extra = sums, count
        precision = precision_of(query, positive_key, None)
    elif queue is not None and negative_keys is None:
        ranks = meet(distributed, process_group, rows, reduction, negatives="queue", **facts)
        precision = precision_of(query, positive_key, None)
        if ids is not None:
            ids = check_vector(ids, "ids", n, rows)
        if label_smoothing or return_metrics:
            extra = rows.new_zeros(()), rows.new_zeros(())
    else:
        if negative_keys is None:
            # of a pair, where one needs a gradient both get one; keys without make backward free
            keys = positives if positive_key.requires_grad else positives.detach()
            precision = precision_of(query, positive_key, None)
        else:
            check_features(negative_keys, "negative_keys", "[M, D]")
            check_same_width(query, negative_keys, "query", "negative_keys")
            prepare = unit_rows if normalize else stored_rows
            keys = prepare(negative_keys, "negative_keys")
            precision = torch.promote_types(
                precision_of(query, negative_keys, None), precision_of(query, positive_key, None)
            )
        in_batch = negative_keys is None
        pairs = shared_rule(ids, negative_ids, in_batch, n, keys.shape[0], rows)
        ranks = meet(
            distributed, process_group, keys, reduction, precision=precision,
            negatives="in batch" if in_batch else "shared", **facts,
        )  # fmt: skip
        negatives = ranks.logsumexp(
            rows, keys, scale, pairs=pairs, maxima=return_metrics, precision=precision
        )
        if label_smoothing or return_metrics:
            wide = keys.to(torch.promote_types(rows.dtype, keys.dtype))
            extra = ranks.pair_sums(rows, wide, pairs)
    if queue is not None:
        negatives, extra = _with_queue(
            queue, rows, scale, ids, normalize, return_metrics, precision, negatives, extra
        )
    assert negatives is not None

    positive = (cosines - margin) * scale
    losses = softmax_loss(positive, negatives.rows)
    metrics = None
    if extra is not None:
        if label_smoothing:
            losses = smooth(losses, positive, scale, *extra, label_smoothing)
        if return_metrics:
            metrics = softmax_metrics(cosines, positive, negatives, *extra, ranks)
    return finish(losses, reduction, weight, metrics, ranks)


class InfoNCELoss(TemperatureLoss):
    """:func:`~fastcl.functional.info_nce` as a module.

    With a ``queue`` (MoCo), positive keys enter it, with ``ids``, after the loss is taken (in
    training mode).
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        label_smoothing: float = 0.0,
        queue: NegativeQueue | None = None,
        **options,
    ):
        super().__init__(temperature, **options)
        check_fraction(label_smoothing, "label_smoothing")
        self.label_smoothing = label_smoothing
        self.queue = None if queue is None else check_queue(queue, self.normalize)

    def forward(
        self, query, positive_key, negative_keys=None, *, ids=None, negative_ids=None, weight=None
    ):
        result = info_nce(
            query, positive_key, negative_keys, self.temperature, queue=self.queue, ids=ids,
            negative_ids=negative_ids, weight=weight, label_smoothing=self.label_smoothing,
            **self.options(),
        )  # fmt: skip
        if self.queue is not None:
            self.queue.enqueue(positive_key.detach(), ids)
        return result

"""SimCSE: sentences against their batch, with hard negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import meet
from ..memory.queue import merge
from ..ops import LogSumExp, Pairs
from ..ops.checks import check_same_shape, precision_of
from .common import finish, softmax_loss, softmax_metrics
from .inputs import check_number, scale_of, unit_pair, unit_rows
from .modules import TemperatureLoss


def sim_cse(
    query: Tensor,
    positive_key: Tensor,
    hard_negative_key: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    *,
    hard_negative_weight: float = 0.0,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    distributed: str | None = None,
    process_group=None,
):
    """SimCSE (Gao et al. 2021, eqs. 1 and 5): each query picks its key among the batch's.

    Unsupervised, ``positive_key`` is a second pass of the same sentences under another dropout;
    supervised, entailments with contradictions as hard negatives.

    Args:
        query, positive_key: [N, D], row by row; any float dtype.
        hard_negative_key: [N, D]; negatives of every query, beside the other positive keys.
        temperature: positive number or one-element tensor (differentiable).
        hard_negative_weight: added to the logit of a query's *own* hard negative; 0 does nothing.
        weight, normalize, return_metrics, distributed, process_group: as for :func:`nt_xent`.
        reduction: ``"mean"`` over N, ``"sum"``, or ``"none"`` for [N] losses.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_number(hard_negative_weight, "hard_negative_weight")
    scale = scale_of(temperature)
    both, cosines = unit_pair(query, positive_key, ("query", "positive_key"), normalize)
    rows, keys = both.split(query.shape[0])
    precision = precision_of(query, positive_key, None)
    hard = None
    if hard_negative_key is not None:
        check_same_shape(query, hard_negative_key, "query", "hard_negative_key")
        hard = unit_rows(hard_negative_key, "hard_negative_key", normalize)
    others = Pairs(skip=(0,))
    ranks = meet(
        distributed, process_group, keys, reduction, loss="sim_cse", scale=scale,
        precision=precision, weight=weight, return_metrics=return_metrics, hard=hard is not None,
        hard_negative_weight=hard_negative_weight,
    )  # fmt: skip

    def sweep(candidates: Tensor) -> LogSumExp:
        return ranks.logsumexp(
            rows, candidates, scale, pairs=others, maxima=return_metrics, precision=precision
        )

    negatives = sweep(keys)
    if hard is not None:
        own = (rows * hard).sum(1) * scale + hard_negative_weight
        none = own.new_empty(0)
        alone = LogSumExp(own, none, own.detach() if return_metrics else none, none)
        negatives = merge(merge(negatives, sweep(hard)), alone)
    positive = cosines * scale
    metrics = None
    if return_metrics:
        with torch.no_grad():
            sums, count = ranks.pair_sums(rows, keys, others)
            if hard is not None:
                more, number = ranks.pair_sums(rows, hard, Pairs())
                sums, count = sums + more, count + number
        metrics = softmax_metrics(cosines, positive, negatives, sums, count, ranks)
    return finish(softmax_loss(positive, negatives.rows), reduction, weight, metrics, ranks)


class SimCSELoss(TemperatureLoss):
    """:func:`~fastcl.functional.sim_cse` as a module."""

    described = ("hard_negative_weight",)

    def __init__(self, temperature: float = 0.05, *, hard_negative_weight: float = 0.0, **options):
        super().__init__(temperature, **options)
        check_number(hard_negative_weight, "hard_negative_weight")
        self.hard_negative_weight = hard_negative_weight

    def forward(self, query, positive_key, hard_negative_key=None, *, weight=None):
        return sim_cse(
            query, positive_key, hard_negative_key, self.temperature,
            hard_negative_weight=self.hard_negative_weight, weight=weight, **self.options(),
        )  # fmt: skip

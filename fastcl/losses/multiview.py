"""Contrastive multiview coding within the batch, over any number of views."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Pairs, similarity_logsumexp, similarity_sum
from ..ops.checks import precision_of
from ..ops.pairs import describe
from .common import finish
from .inputs import check_choice, scale_of, unit_pair
from .modules import TemperatureLoss
from .towers import both_directions

FORMS = ("softmax", "nce")


def cmc(
    views: Sequence[Tensor],
    temperature: float | Tensor = 0.07,
    *,
    form: str = "softmax",
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    distributed: str | None = None,
    process_group=None,
) -> Tensor:
    """Contrastive multiview coding (Tian et al. 2020, full graph) with in-batch negatives.

    The sum, over all ordered pairs of views, of one view's rows choosing among the other's.
    :class:`~fastcl.CMCLoss` takes the negatives from memory banks instead.

    Args:
        views: two or more [N, D], row by row, any float dtype.
        temperature: positive number or one-element tensor (differentiable).
        form: ``"softmax"``, both directions of a pair from one sweep; or ``"nce"``,
            noise-contrastive estimation with the batch as data set: as ``"nce"`` of
            :func:`memory_bank` with every other row drawn once, the constant Z taken from the
            batch and without a gradient.
        weight: [N] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        normalize: divide rows by their length first.
        reduction: ``"mean"`` over N, ``"sum"``, or ``"none"`` for [N] losses.
        distributed, process_group: with ``"softmax"`` as for :func:`nt_xent`.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_choice(form, "form", FORMS)
    if isinstance(views, Tensor) or not isinstance(views, Sequence) or len(views) < 2:
        raise ValueError(f"views {describe(views)}; expected a sequence of two or more tensors")
    if form == "nce" and distributed is not None:
        raise ValueError(f"distributed is {distributed!r}; expected None with form 'nce'")
    scale = scale_of(temperature)
    total: float | Tensor = 0.0
    for b, second in enumerate(views):
        for a, first in enumerate(views[:b]):
            names = (f"views[{a}]", f"views[{b}]")
            if form == "nce":
                losses = _nce(first, second, names, scale, normalize)
                total = total + finish(losses, reduction, weight, None)
            else:
                total = total + 2.0 * both_directions(
                    first, second, names, scale, None, weight, 0.0, 0.0, normalize, reduction,
                    False, distributed, process_group,
                )  # fmt: skip
    assert isinstance(total, Tensor)
    return total


def _nce(a: Tensor, b: Tensor, names: tuple[str, str], scale, normalize: bool) -> Tensor:
    """Both directions of a pair of views: [N]."""
    both, cosines = unit_pair(a, b, names, normalize)
    n = a.shape[0]
    first, second = both.split(n)
    precision = precision_of(a, b, None)
    with torch.no_grad():
        sums = similarity_logsumexp(first.detach(), second.detach(), scale, precision=precision)
        # ln Z = ln(n mean e^s); the noise is uniform over n, drawn n - 1 times
        shift = torch.logsumexp(sums.rows, 0) - math.log(n)
        shift = shift + (math.log((n - 1) / n) if n > 1 else -math.inf)
    losses = 2.0 * F.softplus(shift - cosines * scale, threshold=50.0)
    if n > 1:
        for queries, keys in ((first, second), (second, first)):
            losses = losses + similarity_sum(
                queries, keys, scale, phi="softplus", row_bias=-shift.expand(n),
                pairs=Pairs(skip=(0,)), precision=precision,
            )  # fmt: skip
    return losses


class InBatchCMCLoss(TemperatureLoss):
    """:func:`~fastcl.functional.cmc` as a module: ``InBatchCMCLoss()(l, ab)``."""

    described = ("form",)
    has_metrics = False

    def __init__(self, temperature: float = 0.07, *, form: str = "softmax", **options):
        super().__init__(temperature, **options)
        check_choice(form, "form", FORMS)
        self.form = form

    def forward(self, *views, weight=None):
        return cmc(views, self.temperature, form=self.form, weight=weight, **self.options())

"""Blocks of similar samples: the loss of Arora et al. 2019."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import similarity_logsumexp, similarity_topk
from ..ops.checks import check_dense, check_features, check_same_width, precision_of
from ..ops.pair_sums import take_rows
from ..ops.pairs import describe
from .common import finish, softmax_loss
from .inputs import check_choice, unit_rows
from .modules import FixedLoss

FORMS = ("logistic", "hinge")


def block_contrastive(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    form: str = "logistic",
    shared: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The unsupervised loss of Arora et al. 2019, and its block form (CURL, not the one of RL).

    With v_j = <f(x), mean of positives - mean of block j of negatives>: log2(1 + sum_j e^(-v_j))
    (``"logistic"``) or [1 + max_j(-v_j)]_+ (``"hinge"``). No normalisation and no temperature.

    Args:
        anchor: [N, D], any float dtype.
        positive: [N, D], or blocks [N, b, D] that share the anchor's latent class.
        negative: each anchor's own: [N, D], one block [N, b, D], or k blocks [N, k, b, D]. With
            ``shared``, [M, D] or M blocks [M, b, D] for all anchors, swept without an N x M matrix.
        form: see above.
        shared: see above.
        weight: [N] floats; each anchor's share, the mean becoming sum(w l) / sum(w).
        reduction: ``"mean"`` over N, ``"sum"``, or ``"none"`` for [N] losses.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    check_choice(form, "form", FORMS)
    a = unit_rows(anchor, "anchor", normalize=False)
    near = _block_means(positive, "positive", anchor, own=True)
    far = _block_means(negative, "negative", anchor, own=not shared)
    score = (a * near).sum(1)
    if shared and form == "logistic":
        precision = precision_of(anchor, negative, None)
        pushes = similarity_logsumexp(a, far, 1.0, precision=precision).rows
    elif shared:
        found = similarity_topk(a, far, 1.0, k=1).indices[:, 0]
        pushes = (a * take_rows(far, found)).sum(1)
    else:
        scores = (a[:, None] * (far if far.dim() == 3 else far[:, None])).sum(2)
        pushes = torch.logsumexp(scores, 1) if form == "logistic" else scores.amax(1)
    if form == "logistic":
        losses = softmax_loss(score, pushes) / math.log(2.0)
    else:
        losses = F.relu(1.0 + pushes - score)
    return finish(losses, reduction, weight, None)


def _block_means(x: Tensor, name: str, anchor: Tensor, own: bool) -> Tensor:
    """Means of blocks in the accumulator's dtype; rows without blocks as they are.

    Raises:
        TypeError, ValueError: the wrong dtype, shape, width or device.
    """
    forms = ["[N, D]", "[N, b, D]"]
    if own and name == "negative":
        forms.append("[N, k, b, D]")
    if isinstance(x, Tensor):
        check_dense(x, name)
    dims = x.dim() if isinstance(x, Tensor) else 0
    if not 2 <= dims < 2 + len(forms) or (own and x.shape[0] != anchor.shape[0]):
        first = f" with N = {anchor.shape[0]}, one per anchor" if own else ""
        raise ValueError(f"{name} {describe(x)}; expected {' or '.join(forms)}{first}")
    check_features(x, name, forms[dims - 2])
    check_same_width(anchor, x, "anchor", name)
    rows = unit_rows(x.flatten(0, -2), name, normalize=False).view(x.shape)
    return rows if dims == 2 else rows.mean(-2)


class BlockContrastiveLoss(FixedLoss):
    """:func:`~fastcl.functional.block_contrastive` as a module."""

    def __init__(self, *, form: str = "logistic", shared: bool = False, reduction: str = "mean"):
        check_choice(form, "form", FORMS)
        super().__init__(form=form, shared=shared, reduction=reduction)

    def forward(self, anchor, positive, negative, *, weight=None):
        return block_contrastive(anchor, positive, negative, weight=weight, **self.options())

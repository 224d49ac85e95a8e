"""Which samples to learn from: indices alone, found without a distance matrix.

Gather with the indices and differentiate that; a selection has no gradient. Distances are
Euclidean between the rows as they are (divide them by their length first where the loss does),
compared in the precision of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import Pairs, similarity_topk
from .ops.checks import check_features
from .ops.pairs import describe


def batch_hard(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's farthest row of its label and nearest row of another (Hermans et al. 2017).

    Args:
        features: [N, D], any float dtype.
        labels: [N] integers.

    Returns:
        Indices of positives [N] and of negatives [N]; -1 where there is none.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    rows = _rows(features)
    positives = _select(rows, rows, Pairs("same", labels, skip=(0,)), farthest=True)
    return positives, _select(rows, rows, Pairs("different", labels))


def semi_hard(features: Tensor, labels: Tensor, anchors: Tensor, positives: Tensor) -> Tensor:
    """For each pair of one label the nearest negative farther than the positive.

    Where every negative is nearer than the positive, the farthest of them (the choice of
    TensorFlow Addons). FaceNet (Schroff et al. 2015, section 3.2) calls the former semi-hard.

    Args:
        features: [N, D], any float dtype.
        labels: [N] integers.
        anchors, positives: [P] integers, indices of rows.

    Returns:
        Indices of negatives [P]; -1 where a pair has none.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
    """
    rows = _rows(features)
    for name, index in (("anchors", anchors), ("positives", positives)):
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dim() != 1:
            raise TypeError(f"{name} {describe(index)}; expected a 1-D tensor of integers")
    if anchors.shape != positives.shape:
        raise ValueError(
            f"positives {describe(positives)}; expected {anchors.shape[0]} entries, one per anchor"
        )
    queries, partners = rows[anchors], rows[positives]
    nearness = (2.0 * queries * partners - partners.square()).sum(1)
    pairs = Pairs("different", labels[anchors], labels)
    farther = _select(queries, rows, pairs, below=nearness)
    return torch.where(farther < 0, _select(queries, rows, pairs, farthest=True), farther)


def _rows(features: Tensor) -> Tensor:
    check_features(features, "features")
    rows = features.detach()
    return rows if rows.dtype == torch.float64 else rows.float()


def _select(queries: Tensor, keys: Tensor, pairs: Pairs, farthest=False, below=None) -> Tensor:
    """Index of each query's nearest (or farthest) kept key: that of the largest 2qk - |k|^2."""
    sign = -1.0 if farthest else 1.0
    bias = -sign * keys.square().sum(1)
    return similarity_topk(
        queries, keys, 2.0 * sign, k=1, key_bias=bias, pairs=pairs, below=below,
    ).indices[:, 0]  # fmt: skip

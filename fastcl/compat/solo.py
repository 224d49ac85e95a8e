"""The InfoNCE-type losses of solo-learn (1.0) on fastcl's operators.

    from fastcl.compat.solo import simclr_loss_func    # was: from solo.losses import ...

Same signatures, values and gradients; no N x M matrix is formed. What differs, and why:

- Low temperatures stay finite: ``simclr_loss_func`` exponentiates there without subtracting a
  maximum, and is NaN in fp32 below T of about 0.011.
- A row without positives counts as 0 there, where solo-learn returns infinity.
- Batches of ranks may differ in size. The loss of 16-bit features is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as f
from ..distributed import ALONE
from ..losses.common import softmax_loss
from ..losses.inputs import check_vector, scale_of, unit_pair, unit_rows
from ..ops import Pairs
from ..ops.checks import check_features, check_same_shape, precision_of
from .common import everyone, own_mean

__all__ = ["mocov2plus_loss_func", "mocov3_loss_func", "nnclr_loss_func", "simclr_loss_func"]


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over rows of -ln(sum over positives / sum over all others), over all ranks' rows.

    Args:
        z: [N V, D], the views of all samples.
        indexes: [N V] integers; rows of equal index are each other's positives.
        temperature: positive number.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    scale = scale_of(temperature)
    rows = unit_rows(z, "z")
    ids = check_vector(indexes, "indexes", len(rows), rows)
    precision = precision_of(z, None, None)
    ranks = everyone(True, rows, loss="compat solo simclr", precision=precision)

    def sums(pairs: Pairs) -> Tensor:
        return ranks.logsumexp(rows, None, scale, pairs=pairs, precision=precision).rows

    positives = Pairs("same", ids, skip=(0,))
    cosines, count = ranks.pair_sums(rows, rows, positives)
    # one positive is its own sum, exactly
    same = torch.where(count > 1, sums(positives), cosines * scale)
    losses = softmax_loss(same, sums(Pairs("different", ids)))
    return own_mean(torch.where(count > 0, losses, 0.0), ranks)


def mocov2plus_loss_func(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1
) -> Tensor:
    """InfoNCE of queries [N, D] with their keys [N, D] and a queue [D, K]; nothing is normalised.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_features(queue, "queue", "[D, K]")
    check_same_shape(query, key, "query", "key")
    return f.info_nce(query, key, queue.T, temperature, normalize=False)


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """2 T times InfoNCE of queries [N, D] among the keys [N, D] of all ranks.

    Keys of other ranks pass no gradient back, and neither do a rank's own where there are several.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    return 2 * temperature * _among(query, key, temperature, ("query", "key"), False)


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE of neighbours [N, D] among the predictions [N, D] of all ranks.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    return _among(nn, p, temperature, ("nn", "p"), True)


def _among(a: Tensor, b: Tensor, temperature: float, names, keys_learn: bool) -> Tensor:
    scale = scale_of(temperature)
    precision = precision_of(a, b, None)
    ranks = everyone(True, b, loss="compat solo", names=names, precision=precision)
    if ranks is ALONE:
        return f.info_nce(a, b, None, temperature)
    rows, cosines = unit_pair(a, b if keys_learn else b.detach(), names)
    queries, keys = rows.split(len(a))
    if not keys_learn:
        keys = keys.detach()
    sums = ranks.logsumexp(queries, keys, scale, pairs=Pairs(skip=(0,)), precision=precision)
    return own_mean(softmax_loss(cosines * scale, sums.rows), ranks)

"""The three streaming reductions over similarity tiles: schemas, autograd and public functions.

The score of a pair is ``s_ij = scale * <q_i, k_j> + key_bias_j``. Every contrastive loss is a
reduction of these scores over the pairs that a rule (:class:`~fastcl.ops.pairs.Pairs`) keeps:

    similarity_logsumexp   log sum_j exp(s_ij) per row, and per column from the same sweep
    similarity_sum         sum_j phi(s_ij), phi one of softplus, relu, relu squared
    similarity_topk        the k largest s_ij per row, undifferentiated

Each gradient is another sweep of the same tiles with a weight W_ij = dLoss/ds_ij:

    dq = scale W k        dk = scale W^T q        dscale = <q, W k>        dbias = column sums of W
    log-sum-exp: W_ij = g_i exp(s_ij - row_i) + h_j exp(s_ij - column_j)        sum: g_i phi'(s_ij)

Nothing here holds N x M numbers, with two exceptions stated where they occur: exponentials kept
within a memory budget, and second derivatives. Schemas, shape functions and autograd formulas are
written once, below; a backend only computes. An operator asks the registry when it runs, so
compiled graphs stay whole and ``use_backend`` works on them too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .checks import as_scalar, as_vector, check_operands, precision_of
from .library import cast_gradients, define, differentiate, dispatch
from .pairs import ALL, Pairs
from .registry import Call, accumulator, pick, workspace_bytes

_PAIR = "Tensor queries, Tensor? keys, Tensor scale, Tensor? key_bias"
_RULE = "Tensor? query_ids, Tensor? key_ids, str relation, SymInt[] skip"


_KEYS, _KEY_IDS = 1, 5  # positions among an operator's tensors


class LogSumExp(NamedTuple):
    """What :func:`similarity_logsumexp` returns; what was not asked for is an empty tensor."""

    rows: Tensor
    columns: Tensor
    row_max: Tensor
    column_max: Tensor


def similarity_logsumexp(
    queries: Tensor,
    keys: Tensor | None,
    scale: float | Tensor,
    *,
    key_bias: Tensor | None = None,
    pairs: Pairs = ALL,
    columns: bool = False,
    maxima: bool = False,
    precision: torch.dtype | None = None,
) -> LogSumExp:
    """Log-sum-exp of the scores of each query over its kept keys, and the other way round.

    Args:
        queries: [N, D], any float dtype.
        keys: [M, D]; ``None`` or ``queries`` itself for the symmetric problem, which costs half.
        scale: inverse temperature, a number or a 0-dim tensor (differentiable).
        key_bias: [M], added to each key's scores (differentiable).
        pairs: which pairs count.
        columns: also reduce over queries, for each key, in the same sweep.
        maxima: also return the largest score per row (and column), undifferentiated.
        precision: dtype in which products may be formed; by default the inputs' promoted dtype,
            or autocast's. Sums are always fp32 (fp64 for fp64).

    Returns:
        Rows [N] and columns [M] in fp32 (fp64 for fp64 inputs); -inf with zero gradient where no
        pair is kept. Second derivatives take N x M memory.

    Raises:
        TypeError, ValueError: an operand of the wrong dtype, shape or device.
    """
    n, m = check_operands(queries, keys, pairs)
    precision = precision_of(queries, keys, precision)
    scale = as_scalar(scale, "scale", queries, precision)
    key_bias = as_vector(key_bias, "key_bias", m, queries, precision)
    symmetric = (keys is None or keys is queries) and pairs.symmetric and key_bias is None
    if keys is None and not symmetric:
        keys = queries
    query_ids, key_ids = pairs.ids(n, m)
    rows, column_sums, row_max, column_max, _, _ = _logsumexp_op(
        queries, None if symmetric else keys, scale, key_bias,
        query_ids, None if symmetric else key_ids, pairs.relation, list(pairs.skip),
        columns and not symmetric, maxima,
        _what_to_save(queries, None if symmetric else keys, scale, key_bias, columns, precision),
        precision,
    )  # fmt: skip
    if symmetric and columns:
        column_sums, column_max = rows, row_max
    return LogSumExp(rows, column_sums, row_max, column_max)


def _what_to_save(queries, keys, scale, key_bias, columns: bool, precision: torch.dtype) -> str:
    """What the forward leaves for the backward besides the sums.

    ``mean_keys``: where keys need no gradient (a queue, a bank) the softmax-weighted mean of the
    keys *is* the gradient, and the backward sweeps nothing. ``exponentials``: where all of them
    fit the workspace budget, keeping them is cheaper than forming the products again. They are
    exp(s_ij - offset), 0 for dropped pairs; of a symmetric problem only those with j >= i, so
    that any backend can finish what another began. A NaN offset says that nothing was kept.
    """
    inputs = [t for t in (queries, keys, scale, key_bias) if t is not None]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return "nothing"
    bias_is_fixed = key_bias is None or not key_bias.requires_grad
    if keys is not None and not keys.requires_grad and bias_is_fixed and not columns:
        return "mean_keys"
    n, d = queries.shape
    m = n if keys is None else keys.shape[0]
    device = queries.device
    backend = pick(Call("similarity_logsumexp", device.type, precision, device.index))
    fits = n * m * accumulator(precision).itemsize <= workspace_bytes()
    keep = fits and backend.keeps_exponentials(n, m, d, precision)
    return "exponentials" if keep else "nothing"


def _logsumexp(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima, save,
    precision,
):  # fmt: skip
    return dispatch(
        "similarity_logsumexp", "similarity_logsumexp", queries, precision,
        queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima, save,
    )  # fmt: skip


def _logsumexp_fake(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima, save,
    precision,
):  # fmt: skip
    n, d = queries.shape
    m = n if keys is None else keys.shape[0]
    saved = {"nothing": (0,), "mean_keys": (n, d), "exponentials": (n, m)}[save]
    shapes = (
        (n,),
        (m if columns else 0,),
        (n if maxima else 0,),
        (m if maxima and columns else 0,),
        saved,
        (),
    )
    return tuple(queries.new_empty(shape, dtype=accumulator(precision)) for shape in shapes)


def _logsumexp_backward(
    grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip,
    rows, columns, saved, offset, save, needs, precision,
):  # fmt: skip
    if save == "mean_keys" and grad_columns is None and not (needs[1] or needs[3]):
        acc = accumulator(precision)
        none = rows.new_empty(0)
        weighted = saved * grad_rows.to(acc)[:, None]
        grad_scale = (queries.to(acc) * weighted).sum() if needs[2] else none
        return weighted.mul_(scale) if needs[0] else none, none.clone(), grad_scale, none.clone()
    return dispatch(
        "similarity_logsumexp", "similarity_logsumexp_backward", queries, precision,
        grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip,
        rows, columns, saved, offset, save, needs,
    )  # fmt: skip


def _logsumexp_backward_fake(
    grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip,
    rows, columns, saved, offset, save, needs, precision,
):  # fmt: skip
    keys_shape = (0,) if keys is None else keys.shape
    bias_shape = (0,) if key_bias is None else key_bias.shape
    shapes = (queries.shape, keys_shape, (), bias_shape)
    return tuple(
        queries.new_empty(shape if needed else (0,), dtype=accumulator(precision))
        for shape, needed in zip(shapes, needs, strict=True)
    )


def _logsumexp_setup(ctx, inputs, output):
    *tensors, relation, skip, columns, _, save, precision = inputs
    rows, column_sums, row_max, column_max, saved, offset = output
    ctx.mark_non_differentiable(row_max, column_max, saved, offset)
    ctx.set_materialize_grads(False)
    ctx.fixed = None
    if save == "mean_keys" and torch._C._functorch.peek_interpreter_stack() is None:
        # The gradient is done and reads neither keys nor their ids: a queue may take new ones
        # before the backward, which autograd's own check of saved tensors would refuse.
        fixed = [tensors[_KEYS], tensors[_KEY_IDS]]
        ctx.fixed = [(t, 0 if t is None else t._version) for t in fixed]
        tensors[_KEYS] = tensors[_KEY_IDS] = None
    ctx.save_for_backward(*tensors, rows, column_sums, saved, offset)
    ctx.static = (relation, skip, columns, save, precision)


def _logsumexp_autograd(ctx, grad_rows, grad_columns, *_):
    *tensors, rows, column_sums, saved, offset = ctx.saved_tensors
    relation, skip, columns, save, precision = ctx.static
    if ctx.fixed is not None and torch.is_grad_enabled():  # second derivatives read them
        tensors[_KEYS], tensors[_KEY_IDS] = (t for t, _ in ctx.fixed)
        if any(t is not None and t._version != version for t, version in ctx.fixed):
            raise RuntimeError(
                "keys were changed in place after the forward pass; a second derivative needs them "
                "as they were: take it before the queue or bank is updated"
            )
    if grad_rows is None:
        grad_rows = torch.zeros_like(rows)
    needs = list(ctx.needs_input_grad[:4])
    gradients = _logsumexp_gradient(
        grad_rows, grad_columns if columns else None, *tensors, relation, skip,
        rows, column_sums, saved, offset, save, needs, precision,
    )  # fmt: skip
    return (*cast_gradients(gradients, tensors[:4], needs), *[None] * 8)


_logsumexp_op = define(
    "similarity_logsumexp",
    f"{_PAIR}, {_RULE}, bool columns, bool maxima, str save, ScalarType precision",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _logsumexp,
    _logsumexp_fake,
    setup_context=_logsumexp_setup,
    backward=_logsumexp_autograd,
)
_logsumexp_gradient = define(
    "similarity_logsumexp_backward",
    f"Tensor grad_rows, Tensor? grad_columns, {_PAIR}, {_RULE}, Tensor rows, Tensor columns, "
    "Tensor saved, Tensor offset, str save, bool[] needs, ScalarType precision",
    "(Tensor, Tensor, Tensor, Tensor)",
    _logsumexp_backward,
    _logsumexp_backward_fake,
    **differentiate(reference.logsumexp_gradients, needs_at=-2),
)


def similarity_sum(
    queries: Tensor,
    keys: Tensor | None,
    scale: float | Tensor,
    *,
    phi: str,
    key_bias: Tensor | None = None,
    row_bias: Tensor | None = None,
    pairs: Pairs = ALL,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Sum over each query's kept keys of ``phi(score + row_bias)``.

    Args:
        queries: [N, D], any float dtype.
        keys: [M, D]; ``None`` for the queries themselves.
        scale: a number or a 0-dim tensor (differentiable).
        phi: ``"softplus"``, ``"relu"`` or ``"relu_squared"``.
        key_bias: [M], added to each key's scores (differentiable).
        row_bias: [N], added to each query's scores (differentiable).
        pairs, precision: as for :func:`similarity_logsumexp`.

    Returns:
        Sums [N] in fp32 (fp64 for fp64 inputs); 0 where no pair is kept.

    Raises:
        TypeError, ValueError: an operand of the wrong dtype, shape or device; an unknown phi.
    """
    if phi not in ("softplus", "relu", "relu_squared"):
        raise ValueError(f"phi is {phi!r}; expected 'softplus', 'relu' or 'relu_squared'")
    n, m = check_operands(queries, keys, pairs)
    precision = precision_of(queries, keys, precision)
    query_ids, key_ids = pairs.ids(n, m)
    return _sum_op(
        queries, keys, as_scalar(scale, "scale", queries, precision),
        as_vector(key_bias, "key_bias", m, queries, precision),
        as_vector(row_bias, "row_bias", n, queries, precision),
        query_ids, key_ids, pairs.relation, list(pairs.skip), phi, precision,
    )  # fmt: skip


def _sum(
    queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi, precision
):
    return dispatch(
        "similarity_sum", "similarity_sum", queries, precision,
        queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi,
    )  # fmt: skip


def _sum_fake(
    queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi, precision
):
    return queries.new_empty(queries.shape[0], dtype=accumulator(precision))


def _sum_backward(
    grad_rows, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi,
    needs, precision,
):  # fmt: skip
    return dispatch(
        "similarity_sum", "similarity_sum_backward", queries, precision,
        grad_rows, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip,
        phi, needs,
    )  # fmt: skip


def _sum_backward_fake(
    grad_rows, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi,
    needs, precision,
):  # fmt: skip
    inputs = (queries, keys, scale, key_bias, row_bias)
    return tuple(
        queries.new_empty(
            x.shape if needed and x is not None else (0,), dtype=accumulator(precision)
        )
        for x, needed in zip(inputs, needs, strict=True)
    )


def _sum_setup(ctx, inputs, output):
    *tensors, relation, skip, phi, precision = inputs
    ctx.save_for_backward(*tensors)
    ctx.static = (relation, skip, phi, precision)


def _sum_autograd(ctx, grad_rows):
    tensors = ctx.saved_tensors
    relation, skip, phi, precision = ctx.static
    needs = list(ctx.needs_input_grad[:5])
    gradients = _sum_gradient(grad_rows, *tensors, relation, skip, phi, needs, precision)
    return (*cast_gradients(gradients, tensors[:5], needs), *[None] * 6)


_sum_op = define(
    "similarity_sum",
    f"{_PAIR}, Tensor? row_bias, {_RULE}, str phi, ScalarType precision",
    "Tensor",
    _sum,
    _sum_fake,
    setup_context=_sum_setup,
    backward=_sum_autograd,
)
_sum_gradient = define(
    "similarity_sum_backward",
    f"Tensor grad_rows, {_PAIR}, Tensor? row_bias, {_RULE}, str phi, bool[] needs, "
    "ScalarType precision",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sum_backward,
    _sum_backward_fake,
    **differentiate(reference.sum_gradients, needs_at=-2),
)


class TopK(NamedTuple):
    """What :func:`similarity_topk` returns."""

    indices: Tensor
    values: Tensor


def similarity_topk(
    queries: Tensor,
    keys: Tensor | None,
    scale: float | Tensor = 1.0,
    *,
    k: int,
    key_bias: Tensor | None = None,
    pairs: Pairs = ALL,
    below: Tensor | None = None,
    precision: torch.dtype | None = None,
) -> TopK:
    """The ``k`` best-scoring kept keys of each query, best first, ties to the lower index.

    A selection has no gradient: gather with the indices and differentiate that.

    Args:
        queries: [N, D], any float dtype.
        keys: [M, D]; ``None`` for the queries themselves.
        scale: a number or a 0-dim tensor; negative for the worst-scoring keys.
        k: how many.
        key_bias: [M], added to each key's scores.
        pairs, precision: as for :func:`similarity_logsumexp`.
        below: [N]; only scores strictly below it count (semi-hard negatives).

    Returns:
        Indices [N, k] (int64) and values [N, k] (fp32, fp64 for fp64 inputs); -1 and -inf where
        fewer than ``k`` pairs are kept.

    Raises:
        TypeError, ValueError: an operand of the wrong dtype, shape or device; k below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    n, m = check_operands(queries, keys, pairs)
    precision = precision_of(queries, keys, precision)
    query_ids, key_ids = pairs.ids(n, m)

    def detached(tensor):
        return None if tensor is None else tensor.detach()

    return TopK(
        *_topk_op(
            queries.detach(), detached(keys),
            as_scalar(scale, "scale", queries, precision).detach(),
            detached(as_vector(key_bias, "key_bias", m, queries, precision)),
            query_ids, key_ids, pairs.relation, list(pairs.skip), k,
            detached(as_vector(below, "below", n, queries, precision)), precision,
        )
    )  # fmt: skip


def _topk(queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, k, below, precision):
    return dispatch(
        "similarity_topk", "similarity_topk", queries, precision,
        queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, k, below,
    )  # fmt: skip


def _topk_fake(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, k, below, precision
):
    shape = (queries.shape[0], k)
    indices = queries.new_empty(shape, dtype=torch.int64)
    return indices, queries.new_empty(shape, dtype=accumulator(precision))


_topk_op = define(
    "similarity_topk",
    f"{_PAIR}, {_RULE}, SymInt k, Tensor? below, ScalarType precision",
    "(Tensor, Tensor)",
    _topk,
    _topk_fake,
)

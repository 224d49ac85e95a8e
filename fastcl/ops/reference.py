"""The dense oracle: each primitive as its definition, in float64 where the device has it.

It holds N x M numbers and is slow; every other backend is judged against it. The functions whose
names end in ``_gradients`` are ordinary differentiable PyTorch, and second derivatives of every
backend go through them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairs import keep_mask
from .registry import accumulator, stored_gradient


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _scores(queries: Tensor, keys, scale: Tensor, key_bias, row_bias=None) -> Tensor:
    dtype = _wide(queries)
    q = queries.to(dtype)
    s = scale.to(dtype) * (q @ (q if keys is None else keys.to(dtype)).mT)
    if key_bias is not None:
        s = s + key_bias.to(dtype)
    return s if row_bias is None else s + row_bias.to(dtype)[:, None]


def _kept(s: Tensor, query_ids, key_ids, relation: str, skip) -> Tensor:
    """The rule as a bool mask [N, M]."""
    rows, columns = range(s.shape[0]), range(s.shape[1])
    if key_ids is None:
        key_ids = query_ids
    mask = keep_mask(query_ids, key_ids, relation, list(skip), rows, columns, s.device)
    return torch.ones_like(s, dtype=torch.bool) if mask is None else mask


def _masked_logsumexp(s: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Log-sum-exp of kept entries; -inf with zero gradient where there are none."""
    empty = ~keep.any(dim, keepdim=True)
    safe = torch.where(empty, torch.zeros_like(s), s.masked_fill(~keep, float("-inf")))
    return torch.where(empty.squeeze(dim), float("-inf"), torch.logsumexp(safe, dim))


def _softmax(s: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Softmax over kept entries, 0 elsewhere and wherever nothing was kept."""
    sums = _masked_logsumexp(s, keep, dim)
    finite = torch.where(torch.isneginf(sums), torch.zeros_like(sums), sums).unsqueeze(dim)
    return torch.where(keep, (torch.where(keep, s, float("-inf")) - finite).exp(), 0.0)


def _products(w: Tensor, queries, keys, scale):
    """Gradients of queries, keys (``None`` if they are the queries) and scale from W."""
    q = queries.to(w.dtype)
    t = scale.to(w.dtype)
    product = w @ (q if keys is None else keys.to(w.dtype))
    transposed = t * (w.mT @ q)
    if keys is None:
        return t * product + transposed, None, (q * product).sum()
    return t * product, transposed, (q * product).sum()


def _only_needed(gradients, needs, acc: torch.dtype) -> tuple[Tensor, ...]:
    like = gradients[0]
    return tuple(
        g.to(acc).contiguous() if needed and g is not None else like.new_empty(0, dtype=acc)
        for g, needed in zip(gradients, needs, strict=True)
    )


def _stored(gradients, inputs, needs, precision) -> list[Tensor]:
    wide = _only_needed(gradients, needs, accumulator(precision))
    return [g.to(stored_gradient(x, precision)) for g, x in zip(wide, inputs, strict=True)]


def similarity_logsumexp(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, columns, maxima, save,
    precision,
):  # fmt: skip
    s = _scores(queries, keys, scale, key_bias)
    keep = _kept(s, query_ids, key_ids, relation, skip)
    masked = s.masked_fill(~keep, float("-inf"))
    none = s.new_empty(0)
    saved = none
    if save == "mean_keys":
        saved = _softmax(s, keep, 1) @ keys.to(s.dtype)
    elif save == "exponentials":
        saved = torch.zeros_like(s)
    outputs = (
        _masked_logsumexp(s, keep, 1),
        _masked_logsumexp(s, keep, 0) if columns else none,
        masked.amax(1) if maxima else none,
        masked.amax(0) if maxima and columns else none,
        saved,
        s.new_full((), float("nan")),  # nothing was kept: whoever runs backward recomputes
    )
    acc = accumulator(precision)
    return tuple(t.to(acc, copy=True) for t in outputs)


def logsumexp_gradients(
    grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip
):
    """Gradients of queries, keys, scale and key_bias, differentiable again."""
    s = _scores(queries, keys, scale, key_bias)
    keep = _kept(s, query_ids, key_ids, relation, skip)
    w = grad_rows.to(s.dtype)[:, None] * _softmax(s, keep, 1)
    if grad_columns is not None:
        w = w + grad_columns.to(s.dtype) * _softmax(s, keep, 0)
    return (*_products(w, queries, keys, scale), w.sum(0))


def similarity_logsumexp_backward(
    grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip,
    rows, columns, saved, offset, save, needs, precision,
):  # fmt: skip
    gradients = logsumexp_gradients(
        grad_rows, grad_columns, queries, keys, scale, key_bias, query_ids, key_ids, relation, skip
    )
    return _only_needed(gradients, needs, accumulator(precision))


def _phi(s: Tensor, phi: str) -> Tensor:
    if phi == "softplus":  # F.softplus turns linear at 20, an error of 2e-9
        return -F.logsigmoid(-s)
    return F.relu(s) if phi == "relu" else F.relu(s).square()


def _phi_gradient(s: Tensor, phi: str) -> Tensor:
    if phi == "softplus":
        return torch.sigmoid(s)
    return (s > 0).to(s.dtype) if phi == "relu" else 2.0 * F.relu(s)


def similarity_sum(
    queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi, precision
):
    s = _scores(queries, keys, scale, key_bias, row_bias)
    keep = _kept(s, query_ids, key_ids, relation, skip)
    return torch.where(keep, _phi(s, phi), 0.0).sum(1).to(accumulator(precision))


def sum_gradients(
    grad_rows, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi
):
    """Gradients of queries, keys, scale, key_bias and row_bias, differentiable again."""
    s = _scores(queries, keys, scale, key_bias, row_bias)
    keep = _kept(s, query_ids, key_ids, relation, skip)
    w = grad_rows.to(s.dtype)[:, None] * torch.where(keep, _phi_gradient(s, phi), 0.0)
    return (*_products(w, queries, keys, scale), w.sum(0), w.sum(1))


def similarity_sum_backward(
    grad_rows, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi,
    needs, precision,
):  # fmt: skip
    gradients = sum_gradients(
        grad_rows, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi
    )
    return _only_needed(gradients, needs, accumulator(precision))


def similarity_topk(
    queries, keys, scale, key_bias, query_ids, key_ids, relation, skip, k, below, precision
):
    s = _scores(queries, keys, scale, key_bias)
    keep = _kept(s, query_ids, key_ids, relation, skip)
    if below is not None:
        keep = keep & (s < below.to(s.dtype)[:, None])
    s = s.masked_fill(~keep, float("-inf"))
    values, indices = s.sort(dim=1, descending=True, stable=True)
    missing = max(0, k - s.shape[1])
    values = F.pad(values[:, :k], (0, missing), value=float("-inf"))
    indices = F.pad(indices[:, :k], (0, missing), value=-1)
    return indices.masked_fill(torch.isneginf(values), -1), values.to(accumulator(precision))


def l2_normalize(x: Tensor, eps: float, precision: torch.dtype):
    y, factor, _ = _unit(x, eps)
    acc = accumulator(precision)
    return y.to(acc).contiguous(), factor[:, 0].to(acc)


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows [N, D], their factors [N, 1], and whether each row was longer than eps [N, 1].

    An infinite eps leaves rows as they are.
    """
    rows = x.to(_wide(x))
    squares = rows.square().sum(1, keepdim=True)
    long = squares > eps * eps  # shorter rows are divided by the constant eps
    short = 1.0 if eps == math.inf else 1.0 / eps
    factor = torch.where(long, torch.where(long, squares, 1.0).rsqrt(), short)
    return rows * factor, factor, long


def normalize_gradient(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """Gradient with respect to ``x``, differentiable again."""
    g = grad.to(_wide(x))
    y, factor, long = _unit(x, eps)
    return (g - y * torch.where(long, (g * y).sum(1, keepdim=True), 0.0)) * factor


def l2_normalize_backward(grad, x, y, inverse, eps: float, precision) -> Tensor:
    return normalize_gradient(grad, x, eps).to(x.dtype).contiguous()


def l2_normalize_pair(a: Tensor, b: Tensor, eps: float, precision: torch.dtype):
    (unit_a, factor_a, _), (unit_b, factor_b, _) = _unit(a, eps), _unit(b, eps)
    outputs = (
        torch.cat([unit_a, unit_b]),
        (unit_a * unit_b).sum(1),
        torch.cat([factor_a, factor_b])[:, 0],
    )
    return tuple(t.to(accumulator(precision)) for t in outputs)


def normalize_pair_gradients(grad_rows, grad_cosines, a, b, eps: float):
    """Gradients with respect to ``a`` and ``b``, differentiable again."""
    from_a, from_b = grad_rows.to(_wide(a)).chunk(2)
    pull = grad_cosines.to(_wide(a))[:, None]
    return (
        normalize_gradient(from_a + pull * _unit(b, eps)[0], a, eps),
        normalize_gradient(from_b + pull * _unit(a, eps)[0], b, eps),
    )


def l2_normalize_pair_backward(grad_rows, grad_cosines, a, b, rows, factors, eps, precision):
    gradients = normalize_pair_gradients(grad_rows, grad_cosines, a, b, eps)
    return tuple(g.to(x.dtype).contiguous() for g, x in zip(gradients, (a, b), strict=True))


def _pair_problem(form: str, unit_a: Tensor, unit_b: Tensor):
    """Queries, keys and skipped offsets of a ``pair_softmax``; whether columns count too."""
    n = unit_a.shape[0]
    if form == "views":
        return torch.cat([unit_a, unit_b]), None, (0, n, -n), False
    return unit_a, unit_b, (0,), form == "both"


def _pair_terms(a, b, scale, form: str, mean: bool, eps: float):
    """Per row: the log-sum-exp over negatives less the positive's score [rows], the share of each
    in the loss; the cosines [N] and the similarity problem."""
    unit_a, unit_b = _unit(a, eps)[0], _unit(b, eps)[0]
    cosines = (unit_a * unit_b).sum(1)
    queries, keys, skip, columns = _pair_problem(form, unit_a, unit_b)
    s = _scores(queries, keys, scale, None)
    keep = _kept(s, None, None, "any", skip)
    positive = scale.to(s.dtype) * (torch.cat([cosines, cosines]) if keys is None else cosines)
    gaps = [_masked_logsumexp(s, keep, dim) - positive for dim in ((1, 0) if columns else (1,))]
    share = 1.0 / (len(positive) if mean else 1) / len(gaps)
    return gaps, share, cosines, (queries, keys, skip)


def pair_softmax(a, b, scale, form, mean, eps, needs, precision):
    gaps, share, *_ = _pair_terms(a, b, scale, form, mean, eps)
    loss = sum(-F.logsigmoid(-gap).sum() for gap in gaps) * share
    one = torch.ones((), dtype=loss.dtype, device=loss.device)
    gradients = pair_softmax_gradients(one, a, b, scale, form, mean, eps)
    acc = accumulator(precision)
    return (loss.to(acc), *_stored(gradients, (a, b, scale), needs, precision))


def pair_softmax_gradients(grad, a, b, scale, form: str, mean: bool, eps: float):
    """Gradients of both inputs and of the scale, differentiable again."""
    gaps, share, cosines, (queries, keys, skip) = _pair_terms(a, b, scale, form, mean, eps)
    dtype = cosines.dtype
    # of the log-sum-exps: what the negatives gain, the positive loses
    pulls = [grad.to(dtype) * share * torch.sigmoid(gap) for gap in gaps]
    dq, dk, dscale, _ = logsumexp_gradients(
        pulls[0], pulls[1] if len(pulls) > 1 else None, queries, keys, scale, None, None, None,
        "any", skip,
    )  # fmt: skip
    lost = -sum(part for pull in pulls for part in pull.split(len(cosines)))
    rows = dq if keys is None else torch.cat([dq, dk])
    return (
        *normalize_pair_gradients(rows, scale.to(dtype) * lost, a, b, eps),
        dscale + (lost * cosines).sum(),
    )


def _signed_scores(a, b, scale, bias, eps: float):
    """Unit rows, cosines [N, N], scores, and signs: -1 where a pair belongs together."""
    unit_a, unit_b = _unit(a, eps)[0], _unit(b, eps)[0]
    cosines = unit_a @ unit_b.mT
    scores = scale.to(cosines.dtype) * cosines + bias.to(cosines.dtype)
    own = torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
    return unit_a, unit_b, cosines, scores, 1.0 - 2.0 * own


def pair_sigmoid(a, b, scale, bias, mean, eps, needs, precision):
    *_, scores, signs = _signed_scores(a, b, scale, bias, eps)
    loss = -F.logsigmoid(-signs * scores).sum() / (len(scores) if mean else 1)
    one = torch.ones((), dtype=loss.dtype, device=loss.device)
    gradients = pair_sigmoid_gradients(one, a, b, scale, bias, mean, eps)
    acc = accumulator(precision)
    return (loss.to(acc), *_stored(gradients, (a, b, scale, bias), needs, precision))


def pair_sigmoid_gradients(grad, a, b, scale, bias, mean: bool, eps: float):
    """Gradients of both inputs, of the scale and of the bias, differentiable again."""
    unit_a, unit_b, cosines, scores, signs = _signed_scores(a, b, scale, bias, eps)
    share = grad.to(scores.dtype) / (len(scores) if mean else 1)
    w = share * signs * torch.sigmoid(signs * scores)
    t = scale.to(w.dtype)
    return (
        normalize_gradient(t * (w @ unit_b), a, eps),
        normalize_gradient(t * (w.mT @ unit_a), b, eps),
        (w * cosines).sum(),
        w.sum(),
    )

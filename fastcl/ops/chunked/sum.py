"""Sums of softplus, relu or squared relu over tiles."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..registry import accumulator
from .problem import Problem, accumulate, at


def _phi(s: Tensor, phi: str) -> Tensor:
    if phi == "softplus":  # F.softplus turns linear at 20, an error of 2e-9
        return -F.logsigmoid(-s)
    positive = F.relu(s)
    return positive if phi == "relu" else positive.square_()


def _phi_gradient(s: Tensor, phi: str) -> Tensor:
    if phi == "softplus":
        return s.sigmoid_()
    if phi == "relu":
        return (s > 0).to(s.dtype)
    return s.relu_().mul_(2.0)


def _biased(p: Problem, row_bias, rows: range, columns: range, keys: Tensor, out: Tensor) -> Tensor:
    s = p.score(rows, columns, keys, out)
    return s if row_bias is None else s.add_(at(row_bias, rows)[:, None])


def similarity_sum(
    queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi,
    precision,
):  # fmt: skip
    acc = accumulator(precision)
    rule = (query_ids, query_ids if keys is None else key_ids, relation, skip)
    p = Problem.of(queries, queries if keys is None else keys, scale, key_bias, rule, acc, 1.0)
    row_bias = None if row_bias is None else row_bias.to(acc)
    sums = p.queries.new_zeros(p.shape[0])
    for rows, columns, scratch in p.tiles():
        keys_block = p.keys_of(columns)
        values = _phi(_biased(p, row_bias, rows, columns, keys_block, scratch), phi)
        at(sums, rows).add_(p.drop(values, rows, columns, 0.0).sum(1))
    return sums


def similarity_sum_backward(
    grad_rows, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, phi,
    needs, precision,
):  # fmt: skip
    acc = accumulator(precision)
    rule = (query_ids, query_ids if keys is None else key_ids, relation, skip)
    p = Problem.of(queries, queries if keys is None else keys, scale, key_bias, rule, acc, 1.0)
    row_bias = None if row_bias is None else row_bias.to(acc)
    grad_rows = grad_rows.to(acc)

    def weigh(rows, columns, keys_block, scratch):
        w = _phi_gradient(_biased(p, row_bias, rows, columns, keys_block, scratch), phi)
        return p.drop(w, rows, columns, 0.0).mul_(at(grad_rows, rows)[:, None])

    if keys is not None:
        return accumulate(p, scale, weigh, 1.0, needs)
    both = [needs[0], needs[0], *needs[2:]]
    grad_queries, grad_keys, *others = accumulate(p, scale, weigh, 1.0, both)
    return (grad_queries.add_(grad_keys), p.queries.new_zeros(0), *others)

"""Operands for calls of the CPU backend below the dispatcher, and dense float64 truth for them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcl.ops import cpu, reference


@dataclass(frozen=True)
class Problem:
    """Arguments of one call; ``keys`` of ``None`` means the queries."""

    queries: Tensor
    keys: Tensor | None
    scale: Tensor
    key_bias: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    relation: str = "any"
    skip: tuple[int, ...] = ()

    @property
    def m(self) -> int:
        return (self.queries if self.keys is None else self.keys).shape[0]

    def arguments(self) -> tuple:
        return (
            self.queries, self.keys, self.scale, self.key_bias, self.query_ids, self.key_ids,
            self.relation, list(self.skip),
        )  # fmt: skip

    def double(self) -> Problem:
        tensors = ("queries", "keys", "scale", "key_bias")
        return replace(
            self,
            **{n: None if getattr(self, n) is None else getattr(self, n).double() for n in tensors},
        )


def unit(n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d), dim=1)


def make(n: int, m: int | None, d: int, temperature: float = 0.1, **fields) -> Problem:
    keys = None if m is None else unit(m, d)
    return Problem(unit(n, d), keys, torch.tensor(1.0 / temperature), **fields)


def logsumexp(p: Problem, columns=False, maxima=False, save="nothing", precision=torch.float32):
    columns = columns and p.keys is not None
    return cpu.similarity_logsumexp(*p.arguments(), columns, maxima, save, precision)


def truth(p: Problem, columns=False):
    """Rows, columns and their maxima in float64."""
    columns = columns and p.keys is not None
    return reference.similarity_logsumexp(
        *p.double().arguments(), columns, True, "nothing", torch.float64
    )


def gradients(
    p: Problem, out, g: Tensor, h: Tensor | None = None, save="nothing",
    needs=(True, True, True, True), precision=torch.float32,
):  # fmt: skip
    needs = [
        needs[0],
        needs[1] and p.keys is not None,
        needs[2],
        needs[3] and p.key_bias is not None,
    ]
    rows, columns, _, _, saved, offset = out
    return cpu.similarity_logsumexp_backward(
        g, h, *p.arguments(), rows, columns, saved, offset, save, needs, precision
    )


def true_gradients(p: Problem, g: Tensor, h: Tensor | None = None):
    """Gradients of <g, rows> + <h, columns> by autograd in float64."""
    d = p.double()
    wanted = [t for t in (d.queries, d.keys, d.scale, d.key_bias) if t is not None]
    leaves = [t.clone().requires_grad_() for t in wanted]
    by_id = dict(zip(map(id, wanted), leaves, strict=True))
    q, k, s, b = (by_id.get(id(t)) for t in (d.queries, d.keys, d.scale, d.key_bias))
    x = s * q @ (q if k is None else k).T
    x = x if b is None else x + b
    x = x.masked_fill(~keep(p), float("-inf"))
    total = (g.double() * _lse(x, 1)).sum()
    total = total if h is None else total + (h.double() * _lse(x, 0)).sum()
    found = iter(torch.autograd.grad(total, leaves))
    return [None if t is None else next(found) for t in (q, k, s, b)]


def _lse(x: Tensor, dim: int) -> Tensor:
    """Log-sum-exp whose empty rows count as zero, with zero gradient."""
    empty = torch.isinf(x).all(dim, keepdim=True)
    return torch.logsumexp(x.masked_fill(empty, 0.0), dim).masked_fill(empty.squeeze(dim), 0.0)


def keep(p: Problem) -> Tensor:
    i, j = torch.arange(p.queries.shape[0])[:, None], torch.arange(p.m)[None]
    kept = torch.ones(p.queries.shape[0], p.m, dtype=torch.bool)
    for offset in p.skip:
        kept &= j - i != offset
    if p.relation != "any":
        ids = p.query_ids if p.key_ids is None else p.key_ids
        equal = p.query_ids[:, None] == ids[None]
        kept &= equal if p.relation == "same" else ~equal
    return kept


def error(result: Tensor, exact: Tensor) -> float:
    """Largest deviation relative to the largest entry; infinities must agree."""
    assert result.shape == exact.shape
    result, exact = result.double(), exact.double()
    infinite = torch.isinf(exact)
    assert torch.equal(result[infinite], exact[infinite])
    assert not torch.isnan(result).any()
    if infinite.all():
        return 0.0
    difference = (result - exact)[~infinite].abs().max()
    return float(difference / exact[~infinite].abs().max().clamp_min(1e-30))

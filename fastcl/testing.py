"""Comparing a backend with the float64 oracle: what ``fastcl check`` and the tests both run.

:func:`check_distributed` compares a loss on several ranks with one process.

A result is judged against two references. The oracle (float64, dense, on the same inputs) gives
its error; plain PyTorch in the same dtype gives the error a user has today. A backend passes when
its error is at most twice plain PyTorch's, plus the round-off of its accumulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .distributed.check import check_distributed as check_distributed
from .ops import Pairs, use_backend
from .ops.fused import FORMS
from .ops.pairs import keep_mask
from .ops.registry import accumulator


@dataclass(frozen=True)
class Shape:
    """A problem size and the reason it is tested; ``m`` of ``None`` means keys are queries."""

    n: int
    m: int | None
    d: int
    why: str

    def __str__(self) -> str:
        return f"{self.n}x{'self' if self.m is None else self.m}x{self.d}"


SHAPES = (
    Shape(1, 1, 1, "nothing but one pair"),
    Shape(1, 70, 5, "one query"),
    Shape(67, 1, 130, "one key"),
    Shape(33, 65, 31, "one past a power of two, odd width"),
    Shape(128, 96, 64, "whole tiles"),
    Shape(300, 257, 17, "ragged tails on both sides"),
    Shape(40, 900, 24, "a strip: few queries, many keys"),
    Shape(17, 19, 1500, "wide rows"),
    Shape(2, None, 3, "the smallest symmetric problem"),
    Shape(129, None, 40, "symmetric, ragged"),
    Shape(400, None, 12, "symmetric, several tiles of a small backend"),
)
DATA = ("random", "aligned", "clustered", "outlier")
MORE_DATA = ("cone",)  # rows all alike, as an untrained encoder gives them; for GPUs
RULES = ("all", "offsets", "same", "different", "empty rows")
RULED = ("logsumexp", "columns", "softplus", "relu", "relu_squared", "topk")  # take a pair rule
SOFTMAX = tuple(f"{form} loss" for form in FORMS)
WHOLE = (*SOFTMAX, "sigmoid loss")
OPERATIONS = (*RULED, "normalize", "pair", *WHOLE)
BIASED = ("softplus", "relu", "relu_squared", "sigmoid loss")  # take row biases, or one of them
MORE_OPERATIONS = ("queue",)  # log-sum-exp over keys that need no gradient; for GPUs


@dataclass
class Problem:
    """Operands of one comparison, in the dtype under test."""

    queries: Tensor
    keys: Tensor | None
    scale: float
    key_bias: Tensor | None
    row_bias: Tensor | None  # of sums
    pairs: Pairs

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype."""

        def cast(tensor):
            return None if tensor is None else tensor.detach().to(dtype)

        return Problem(
            cast(self.queries), cast(self.keys), self.scale, cast(self.key_bias),
            cast(self.row_bias), self.pairs,
        )  # fmt: skip


def make_problem(
    shape: Shape, data: str, rule: str, temperature: float, dtype: torch.dtype,
    bias: bool = False, device: str = "cpu",
) -> Problem:  # fmt: skip
    """Operands of ``shape``, reproducible on one kind of device.

    One kind of :data:`DATA` (or :data:`MORE_DATA`) and of :data:`RULES` each.
    """
    generator = torch.Generator(device).manual_seed(shape.n * 7919 + shape.d)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64, device=device)

    m = shape.n if shape.m is None else shape.m
    queries, keys = normal(shape.n, shape.d), normal(m, shape.d)
    if data == "aligned":
        keys = queries[torch.arange(m, device=device) % shape.n] + 1e-3 * keys
    elif data == "clustered":
        centres = normal(4, shape.d)
        queries = centres[torch.arange(shape.n, device=device) % 4] + 0.1 * queries
        keys = centres[torch.arange(m, device=device) % 4] + 0.1 * keys
    elif data == "cone":
        axis = normal(1, shape.d)
        queries, keys = axis + 0.3 * queries, axis + 0.3 * keys
    queries, keys = F.normalize(queries), F.normalize(keys)
    if data == "outlier":
        queries[0] *= 40.0
        keys[-1] *= 25.0
    key_bias = normal(m).to(dtype) if bias and shape.m is not None else None
    row_bias = normal(shape.n).to(dtype) if bias else None
    return Problem(
        queries.to(dtype),
        None if shape.m is None else keys.to(dtype),
        1.0 / temperature,
        key_bias,
        row_bias,
        _make_rule(rule, shape, m, generator),
    )


def _make_rule(rule: str, shape: Shape, m: int, generator) -> Pairs:
    half = shape.n // 2
    if rule == "offsets":
        skip = (0, half, -half) if half else (0,)
        return Pairs(skip=tuple(dict.fromkeys(skip)))
    if rule in ("same", "different"):
        ids = torch.randint(0, 5, (shape.n + m,), generator=generator, device=generator.device)
        key_ids = None if shape.m is None else ids[shape.n :]
        return Pairs(rule, ids[: shape.n], key_ids, skip=(0,))
    if rule == "empty rows":  # even queries match no key at all
        ids = torch.arange(shape.n, device=generator.device) % 2 - 1
        keys = torch.zeros(m, dtype=torch.int64, device=generator.device)
        return Pairs("same", ids, None if shape.m is None else keys, skip=(0,))
    return Pairs()


def _mask(p: Problem) -> Tensor | None:
    n = p.queries.shape[0]
    m = n if p.keys is None else p.keys.shape[0]
    query_ids, key_ids = p.pairs.ids(n, m)
    skip = list(p.pairs.skip)
    return keep_mask(
        query_ids, key_ids, p.pairs.relation, skip, range(n), range(m), p.queries.device
    )


def _plain(operation: str, p: Problem, scale: Tensor) -> list[Tensor]:
    """What a user writes today, in the operands' dtype, N x M numbers and all."""
    if operation == "normalize":
        return [F.normalize(p.queries, dim=1)]
    if operation == "pair":
        a, b = (F.normalize(x, dim=1) for x in _pair(p))
        return [torch.cat([a, b]), (a * b).sum(1)]
    if operation in WHOLE:
        return [_plain_loss(operation, *_pair(p), scale, _bias(p))]
    keys = p.queries if p.keys is None else p.keys
    s = (p.queries @ keys.T) * scale.to(p.queries.dtype)
    if p.key_bias is not None:
        s = s + p.key_bias
    mask = _mask(p)
    if operation in ("logsumexp", "columns", "queue", "topk"):
        s = s if mask is None else s.masked_fill(~mask, float("-inf"))
        if operation == "topk":
            return [s.sort(dim=1, descending=True).values[:, : _k(p)]]
        outputs = [torch.logsumexp(s, 1)]
        return outputs + [torch.logsumexp(s, 0)] if operation == "columns" else outputs
    if p.row_bias is not None:
        s = s + p.row_bias[:, None]
    value = F.relu(s).square() if operation == "relu_squared" else getattr(F, operation)(s)
    return [(value if mask is None else value.masked_fill(~mask, 0.0)).sum(1)]


def _plain_loss(operation: str, a: Tensor, b: Tensor, scale: Tensor, bias) -> Tensor:
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    scale, targets = scale.to(a.dtype), torch.arange(len(a), device=a.device)
    if operation == "views loss":
        z = torch.cat([a, b])
        own = torch.eye(len(z), dtype=torch.bool, device=z.device)
        scores = (z @ z.T * scale).masked_fill(own, float("-inf"))
        return F.cross_entropy(scores, torch.cat([targets + len(a), targets]))
    scores = a @ b.T * scale
    if operation == "sigmoid loss":
        signs = 2 * torch.eye(len(a), dtype=a.dtype, device=a.device) - 1
        return -F.logsigmoid(signs * (scores + bias)).sum() / len(a)
    loss = F.cross_entropy(scores, targets)
    return loss if operation == "rows loss" else (loss + F.cross_entropy(scores.T, targets)) / 2


def _pair(p: Problem) -> tuple[Tensor, Tensor]:
    """As many queries as keys; a symmetric problem pairs the queries with themselves reversed."""
    keys = p.queries.flip(0) if p.keys is None else p.keys
    n = min(p.queries.shape[0], keys.shape[0])
    return p.queries[:n], keys[:n]


def _bias(p: Problem):
    """Of the sigmoid loss: a number, or one of the row biases."""
    return -2.0 if p.row_bias is None else p.row_bias[0]


def _k(p: Problem) -> int:
    return min(7, p.queries.shape[0] if p.keys is None else p.keys.shape[0])


def _fast(operation: str, p: Problem, scale: Tensor) -> list[Tensor]:
    common: dict[str, Any] = {"key_bias": p.key_bias, "pairs": p.pairs}
    if operation == "normalize":
        return [ops.l2_normalize(p.queries)[0]]
    if operation == "pair":
        return list(ops.l2_normalize_pair(*_pair(p))[:2])
    if operation == "sigmoid loss":
        return [ops.pair_sigmoid(*_pair(p), scale, _bias(p))]
    if operation in SOFTMAX:
        return [ops.pair_softmax(*_pair(p), scale, form=operation.split()[0])]
    if operation in ("logsumexp", "columns", "queue"):
        both = operation == "columns"
        result = ops.similarity_logsumexp(p.queries, p.keys, scale, columns=both, **common)
        return [result.rows, result.columns] if both else [result.rows]
    if operation == "topk":
        return [ops.similarity_topk(p.queries, p.keys, scale, k=_k(p), **common).values]
    return [
        ops.similarity_sum(p.queries, p.keys, scale, phi=operation, row_bias=p.row_bias, **common)
    ]


def _evaluate(function, operation: str, p: Problem) -> list[Tensor]:
    """Outputs, then the gradients of queries, keys, scale and biases under a fixed upstream."""
    leaves = [t for t in (p.queries, p.keys, p.key_bias) if t is not None]
    if operation == "queue":
        leaves = [p.queries]
    elif operation in BIASED and p.row_bias is not None:
        leaves.append(p.row_bias)
    for leaf in leaves:
        leaf.requires_grad_()
    scale = torch.tensor(
        p.scale, dtype=accumulator(p.queries.dtype), device=p.queries.device, requires_grad=True
    )
    outputs = function(operation, p, scale)
    if operation == "topk":
        return [o.detach() for o in outputs]
    finite = [torch.where(torch.isinf(o), 0.0, o).to(torch.float64) for o in outputs]
    weights = [
        torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype, device=o.device).view_as(o)
        for o in finite
    ]
    objective = torch.stack([(o * w).sum() for o, w in zip(finite, weights, strict=True)]).sum()
    wanted = leaves if operation in ("normalize", "pair") else [*leaves, scale]
    gradients = torch.autograd.grad(objective, wanted, allow_unused=True)
    return [t.detach() for t in (*outputs, *(g for g in gradients if g is not None))]


def _error(result: Tensor, truth: Tensor, least: float = 1e-30) -> float:
    """Largest deviation relative to the largest true entry or ``least``; infinities must agree.

    A true value beyond the result's dtype (an fp16 gradient above 65504) counts as infinite.
    """
    truth = torch.where(torch.isinf(truth.to(result.dtype)), truth.to(result.dtype), truth)
    result, truth = result.to(torch.float64), truth.to(torch.float64)
    same = torch.isinf(truth) & (result == truth)
    difference = torch.where(same, 0.0, (result - truth).abs())
    size = torch.where(torch.isinf(truth), 0.0, truth.abs()).max()
    worst = float(difference.max() / size.clamp_min(least))
    return worst if worst == worst else float("inf")


@dataclass(frozen=True)
class Verdict:
    """The worst of one comparison's results: its error, plain PyTorch's, and what is allowed."""

    error: float
    plain: float
    allowed: float
    repeats: bool = True  # bit for bit, in as many runs as were asked for

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed and self.repeats


def compare(
    backend: str,
    operation: str,
    shape: Shape,
    data: str = "random",
    rule: str = "all",
    temperature: float = 0.1,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    *,
    device: str = "cpu",
    oracle: str = "reference",
    runs: int = 1,
) -> Verdict:
    """Judge ``backend`` on one problem; the verdict is that of its worst output or gradient.

    ``oracle`` is the backend that gives the truth, in float64; the judged one runs ``runs`` times.
    """
    p = make_problem(shape, data, rule, temperature, dtype, bias, device)
    truth = p.to(torch.float64)
    with use_backend(oracle):
        expected = _evaluate(_fast, operation, truth)
    plain = _evaluate(_plain, operation, p.to(dtype))
    with use_backend(backend):
        several = [_evaluate(_fast, operation, p.to(dtype)) for _ in range(runs)]
    results = several[0]
    repeats = all(
        torch.equal(a, b) for other in several for a, b in zip(results, other, strict=True)
    )
    # scores carry round-off in proportion to their size, and exponentials pass it on
    round_off = torch.finfo(accumulator(dtype)).eps * max(8.0, 4.0 * p.scale)
    if data == "outlier":
        round_off *= 100.0
    verdicts = []
    for position, (result, exact, usual) in enumerate(zip(results, expected, plain, strict=True)):
        # a whole loss's gradients of scale and bias are differences between positives and
        # negatives, and judged by the size of these
        scalars = 2 if operation in BIASED and p.row_bias is not None else 1
        last = operation in WHOLE and position >= len(results) - scalars
        least = max(1e-30, min(1.0, float(expected[0]))) if last else 1e-30
        # a gradient comes back in its input's dtype, which rounds it; weights may have been
        # rounded to the precision of the products, which leaves a fraction of that in any sum
        rounding = max(2.0 * torch.finfo(result.dtype).eps, 0.25 * torch.finfo(dtype).eps)
        usual_error = _error(usual, exact, least)
        if usual_error == float("inf"):  # plain PyTorch fails here (empty rows, overflow)
            usual_error = 0.0
        allowed = 2.0 * usual_error + round_off + rounding
        verdicts.append(Verdict(_error(result, exact, least), usual_error, allowed, repeats))
    return max(verdicts, key=lambda v: v.error / v.allowed)


def served(
    backend: str,
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    device: str = "cpu",
    operations: tuple[str, ...] = OPERATIONS,
):
    """Those of ``operations``, and dtypes, that ``backend`` declares for tensors of ``device``."""
    declared = ops.backends()[backend]
    if declared.unavailable or (declared.devices is not None and device not in declared.devices):
        return []
    names = {"topk": "similarity_topk", "normalize": "l2_normalize", "pair": "l2_normalize"}
    names |= dict.fromkeys(("logsumexp", "columns", "queue"), "similarity_logsumexp")
    names |= dict.fromkeys(SOFTMAX, "pair_softmax") | {"sigmoid loss": "pair_sigmoid"}
    return [
        (operation, dtype)
        for operation in operations
        for dtype in dtypes
        if names.get(operation, "similarity_sum") in declared.ops and dtype in declared.precisions
    ]


def quick_cases() -> Iterator[tuple[Shape, str, str, float]]:
    """A few telling problems: shape, data, rule, temperature."""
    yield SHAPES[5], "random", "all", 0.1
    yield SHAPES[5], "aligned", "offsets", 0.07
    yield SHAPES[9], "random", "different", 0.1
    yield SHAPES[9], "clustered", "offsets", 0.02
    yield SHAPES[3], "outlier", "same", 0.5
    yield SHAPES[6], "random", "empty rows", 0.01

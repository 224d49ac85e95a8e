"""The Triton kernels through the interpreter, against float64; needs TRITON_INTERPRET=1.

A selection that meets every operator, dtype, rule and kind of data at least once, and the paths
that only large or awkward problems take, made small by narrowing the table's rules. The whole
matrix of tests/ops/test_backends.py runs under ``make test-triton-full``.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import fastcl
from fastcl.ops import Pairs, similarity_logsumexp, similarity_sum
from fastcl.testing import SHAPES, WHOLE, Shape, compare, served

CASES = served("triton")
pytestmark = pytest.mark.skipif(not CASES, reason="needs triton and TRITON_INTERPRET=1")

PROBLEMS = [
    (SHAPES[0], "random", "all", 0.5),
    (SHAPES[2], "random", "offsets", 0.1),
    (SHAPES[3], "outlier", "same", 0.5),
    (SHAPES[5], "aligned", "offsets", 0.07),
    (SHAPES[6], "random", "empty rows", 0.01),
    (SHAPES[9], "clustered", "different", 0.02),
    (SHAPES[9], "random", "offsets", 0.005),
]
WIDE = (
    Shape(70, 90, 300, "wider than an accumulator, ragged in every direction"),
    Shape(200, None, 300, "symmetric, three chunks and the last of two blocks"),
)


@pytest.fixture
def rules(monkeypatch):
    """Set rules of the configuration table for one test."""
    from fastcl.kernels.configs import RULES

    return lambda **values: [monkeypatch.setitem(RULES, k, v) for k, v in values.items()]


def _label(value):
    return str(value).removeprefix("torch.")


def _judge(*args, **kwargs):
    verdict = compare("triton", *args, **kwargs)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("operation", "dtype", "problem"),
    [  # a whole loss has no rule, and the primitives in it have been asked
        (operation, dtype, problem)
        for operation, dtype in CASES
        for problem in PROBLEMS[:: 3 if operation in WHOLE else 1]
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else _label(x),
)
def test_operations(operation, dtype, problem):
    shape, data, rule, temperature = problem
    bias = operation not in ("normalize", "pair")
    _judge(operation, shape, data, rule, temperature, dtype, bias)


@pytest.mark.parametrize(
    ("shape", "operation", "dtype", "bias"),
    [
        (WIDE[0], "logsumexp", torch.float32, True), (WIDE[0], "columns", torch.float16, True),
        (WIDE[0], "softplus", torch.float16, True), (WIDE[0], "topk", torch.float32, False),
        (WIDE[1], "logsumexp", torch.float32, False), (WIDE[1], "logsumexp", torch.float16, False),
        (WIDE[1], "columns", torch.float32, True), (WIDE[1], "softplus", torch.float32, True),
    ],
    ids=_label,
)  # fmt: skip
def test_wide_rows(rules, shape, operation, dtype, bias):
    """W leaves in several chunks and a library multiplies, for both sides at once; scores stream
    D in blocks. A bias leaves no triangle: W is not symmetric then."""
    rules(dense_pairs=0, chunk_bytes=64 * 90 * 2)
    _judge(operation, shape, "clustered", "offsets", 0.07, dtype, bias=bias)


@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[10]], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_blocks_that_share_slots(rules, shape, temperature):
    """What 46000 rows and more do, so that partial sums stay below a fixed size."""
    rules(slot_bytes=2 * 4 * 400)
    for operation in ("logsumexp", "columns"):
        _judge(operation, shape, "random", "offsets", temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=_label)
@pytest.mark.parametrize("width", [40, 300])
@pytest.mark.parametrize("scale", [10.0, 300.0])
@pytest.mark.parametrize("rule", ["all", "different"])
def test_a_queue(rules, dtype, width, scale, rule):
    """Keys without gradient: the forward keeps softmax(s) k, for any temperature and dtype."""
    rules(dense_pairs=0)
    q, k = F.normalize(torch.randn(70, width)), F.normalize(torch.randn(333, width))
    k[5] = -q[0]
    q, k = q.to(dtype), k.to(dtype)
    pairs = Pairs()
    if rule == "different":  # row 3 loses all of its keys, and then none may reach it
        pairs = Pairs("different", torch.arange(70) % 7, torch.full((333,), 3))

    def run(backend, dtype):
        leaf = q.detach().to(dtype).requires_grad_()
        with fastcl.use_backend(backend):
            result = similarity_logsumexp(leaf, k.to(dtype), scale, pairs=pairs, maxima=True)
            finite = torch.where(torch.isinf(result.rows), 0.0, result.rows)
            (grad,) = torch.autograd.grad((finite * torch.linspace(0, 1, 70)).sum(), leaf)
        return result.rows, result.row_max, grad.double()

    ours, exact = run("triton", dtype), run("reference", torch.float64)
    tolerance = max(2 * torch.finfo(dtype).eps, 2e-7 * scale)
    for a, b in zip(ours[:2], exact[:2], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=scale * 2e-6)
    assert float((ours[2] - exact[2]).norm() / exact[2].norm()) < tolerance


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("width", [24, 300])
def test_rows_out_of_the_offset_s_range(rules, symmetric, sign, width):
    """Sums that vanish (opposite rows) or overflow (long rows) under the fixed offset are done
    again, and the backward then takes two exponentials."""
    rules(dense_pairs=0)
    q = F.normalize(torch.randn(150, width))
    if sign > 0:
        q[3] *= 30.0
    else:
        q[1:] = F.normalize(q[1:2] + 0.05 * q[1:])
        q[0] = -q[1]
    k = None if symmetric else q[1:100].clone()

    def run(backend):
        a = q.clone().requires_grad_()
        b = None if k is None else k.clone().requires_grad_()
        with fastcl.use_backend(backend):
            result = similarity_logsumexp(
                a, b, 120.0, columns=not symmetric, pairs=Pairs(skip=(0,))
            )
            objective = result.rows.sum() + result.columns.square().sum()
            leaves = [a] if b is None else [a, b]
            return [*result[:2], *torch.autograd.grad(objective, leaves)]

    for ours, exact in zip(run("triton"), run("reference"), strict=True):
        assert float((ours - exact).norm()) <= 5e-5 * float(exact.norm())


@pytest.mark.parametrize("symmetric", [False, True])
def test_both_directions_fit_fp16(symmetric):
    """Rows and columns of one pair each weigh it twice with the gradient, here just below a power
    of two: their sum may not reach 65520, which fp16 takes for infinity."""
    q, k = F.normalize(torch.randn(2, 24)).half(), F.normalize(torch.randn(2, 24)).half()
    pairs = Pairs(skip=(0,))

    def run(backend, dtype):
        leaf = q.to(dtype).requires_grad_()
        with fastcl.use_backend(backend):
            keys = None if symmetric else k.to(dtype)
            sums = similarity_logsumexp(leaf, keys, 4.0, columns=not symmetric, pairs=pairs)
            total = sums.rows.sum() + sums.columns.sum()
            return torch.autograd.grad(total * (1 - 2.0**-20), leaf)[0].double()

    exact = run("reference", torch.float64)
    assert float((run("triton", torch.float16) - exact).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(80, torch.float32), (90, torch.float32), (100, torch.float32), (90, torch.bfloat16)],
    ids=_label,
)
def test_tables_of_gpus(monkeypatch, arch, dtype):
    """Tiles, folds and shares of the device as GPUs have them: the interpreter's own table does
    not hold every proportion. As many rows as make three blocks."""
    from fastcl.kernels import problem

    monkeypatch.setattr(problem, "device", lambda _: (arch, 132))
    rows = 90 if dtype == torch.float32 else 300
    _judge("logsumexp", Shape(rows, None, 40, "three own blocks"), "random", "offsets", 0.1, dtype)
    _judge("columns", Shape(rows, 90, 40, "the same"), "random", "offsets", 0.1, dtype, bias=True)


@pytest.mark.parametrize(("own", "other", "finish"), [(32, 64, 64), (32, 32, 64)])
def test_tiles_of_any_proportion(monkeypatch, own, other, finish):
    """Tables for GPUs hold blocks higher and lower than the tiles they meet, and than those that
    finish them; a triangle has other slots with each."""
    from fastcl.kernels.problem import Problem

    config = Problem.config

    def shaped(self, kernel):
        entry = config(self, kernel)
        if kernel == "finish":
            return dataclasses.replace(entry, own=finish)
        return dataclasses.replace(entry, own=own, other=other)

    monkeypatch.setattr(Problem, "config", shaped)
    _judge("logsumexp", SHAPES[10], "random", "offsets", 0.1)
    q = torch.randn(150, 24)
    with fastcl.use_backend("triton"):
        ours = similarity_logsumexp(q, None, 0.1, maxima=True, pairs=Pairs(skip=(0,))).row_max
    with fastcl.use_backend("reference"):
        exact = similarity_logsumexp(q, None, 0.1, maxima=True, pairs=Pairs(skip=(0,))).row_max
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_another_default_dtype():
    """Models are built under torch.set_default_dtype; no kernel takes what it makes of a number."""
    q, k = torch.randn(9, 24).half().requires_grad_(), torch.randn(20, 24).half()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with fastcl.use_backend("triton"):
            for columns in (False, True):
                similarity_logsumexp(q, k, 1.0, columns=columns).rows.sum().backward()
            similarity_sum(q, k, 1.0, phi="softplus").sum().backward()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("symmetric", [False, True])
def test_maxima_below_zero(symmetric):
    """Nearly opposite rows: what merges the maxima of tiles and slots must not begin at 0."""
    q = F.normalize(1.0 + 0.1 * torch.randn(150, 24))
    q[::2] *= -1.0
    k = None if symmetric else -q[::2][:70]
    odd = torch.arange(150) % 2
    pairs = Pairs("different", odd) if symmetric else Pairs("different", 1 - odd, odd[::2][:70])

    def run(backend):
        with fastcl.use_backend(backend):
            return similarity_logsumexp(q, k, 10.0, columns=True, maxima=True, pairs=pairs)

    ours, exact = run("triton"), run("reference")
    assert (exact.row_max < 0).any()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("phi", ["softplus", "relu_squared"])
def test_sums_in_fp16_leave_its_range(phi):
    """Weights of a sum have no bound: gradients of 1e-6, and of 300 a pair."""
    q, k = torch.randn(40, 24).half(), torch.randn(50, 24).half()

    def run(backend, dtype, size):
        leaf = q.to(dtype).requires_grad_()
        with fastcl.use_backend(backend):
            rows = similarity_sum(leaf, k.to(dtype), 4.0, phi=phi)
            return torch.autograd.grad(rows.sum() * size, leaf)[0].double()

    for size in (1e-6 if phi == "relu_squared" else 1e-4, 4.0):
        exact = run("reference", torch.float64, size)
        ours = run("triton", torch.float16, size)
        assert float((ours - exact).norm() / exact.norm()) < 2e-3


def test_long_selections_take_the_other_path():
    q, k = torch.randn(20, 8), torch.randn(300, 8)
    with fastcl.use_backend("triton"):
        ours = fastcl.ops.similarity_topk(q, k, 1.0, k=200)
    with fastcl.use_backend("reference"):
        exact = fastcl.ops.similarity_topk(q, k, 1.0, k=200)
    assert torch.equal(ours.indices, exact.indices)

"""Bit for bit the same: call after call, whatever lay in scratch memory, at any thread count."""

import pytest
import torch

from fastcl.ops import cpu
from fastcl.ops.fused import FORMS

from .problems import gradients, logsumexp, make

CASES = {
    "symmetric": lambda: make(700, None, 64, skip=(0, 350, -350)),
    "two sides": lambda: make(500, 900, 40),
    "cold": lambda: make(300, 400, 64, temperature=0.004),
    "strip": lambda: make(60, 5000, 32),
}
PRECISIONS = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)


def _everything(p, precision):
    g = torch.linspace(0.1, 1.0, p.queries.shape[0])
    columns = p.keys is not None
    out = logsumexp(p, columns, True, precision=precision)
    results = [*out[:4]]
    results += gradients(p, out, g, torch.ones(p.m) if columns else None, precision=precision)
    rows_only = logsumexp(p, precision=precision)
    results += gradients(p, rows_only, g, needs=(True, False, True, False), precision=precision)
    if columns:
        results += logsumexp(p, save="mean_keys", precision=precision)[:5]
    args = p.arguments()
    results += cpu.similarity_topk(*args, 5, None, precision)
    sums = (*args[:4], None, *args[4:], "softplus")
    results.append(cpu.similarity_sum(*sums, precision))
    needs = [True, columns, True, False, False]
    results += cpu.similarity_sum_backward(g, *sums, needs, precision)
    a, b = p.queries[::2], p.queries[1::2]
    for form in FORMS:
        results += cpu.pair_softmax(a, b, p.scale, form, True, 1e-12, [True] * 3, precision)
    bias = torch.tensor(-3.0)
    for needs in ([True] * 4, [False, True, True, True]):  # blocks that take turns, and rows alone
        results += cpu.pair_sigmoid(a, b, p.scale, bias, True, 1e-12, needs, precision)
    return results


def _assert_equal(first, second):
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), k


@PRECISIONS
@pytest.mark.parametrize("case", CASES)
def test_same_at_any_thread_count(case, precision):
    p = CASES[case]()
    first = _everything(p, precision)
    for threads in (2, 3, 5, 2):
        torch.set_num_threads(threads)
        _assert_equal(first, _everything(p, precision))


@PRECISIONS
@pytest.mark.parametrize("case", CASES)
def test_same_whatever_scratch_memory_held(isa, case, precision):
    p = CASES[case]()
    first = _everything(p, precision)
    poison = make(*([800, None, 70] if p.keys is None else [800, 5200, 70]))
    poison.queries.fill_(float("nan"))
    _everything(poison, precision)
    _assert_equal(first, _everything(p, precision))


@pytest.mark.parametrize("m", [None, 600], ids=["symmetric", "two sides"])
def test_threads_that_meet_on_the_same_rows_take_turns(m):
    """Few blocks, more threads than cores, many times: blocks are often waited for."""
    p = make(600, m, 8)
    g = torch.rand(600)
    out = logsumexp(p, columns=True)
    first = gradients(p, out, g, None if m is None else g)
    torch.set_num_threads(6)
    for _ in range(150):
        _assert_equal(first, gradients(p, out, g, None if m is None else g))

"""Sums with biases on either side, and selections: ties, few candidates, a ceiling."""

import pytest
import torch
import torch.nn.functional as F

from fastcl.ops import cpu

from .problems import Problem, error, keep, make

PHIS = {"softplus": F.softplus, "relu": F.relu, "relu_squared": lambda x: F.relu(x).square()}


def _dense(p, row_bias, phi, g):
    """Sums and the gradients of <g, sums> by autograd in float64."""
    d = p.double()
    leaves = {"q": d.queries, "k": d.keys, "s": d.scale, "b": d.key_bias,
              "r": None if row_bias is None else row_bias.double()}  # fmt: skip
    leaves = {n: t.clone().requires_grad_() for n, t in leaves.items() if t is not None}
    x = leaves["s"] * leaves["q"] @ leaves.get("k", leaves["q"]).T
    x = x + leaves.get("b", torch.zeros(p.m))
    x = x + leaves.get("r", torch.zeros(p.queries.shape[0]))[:, None]
    rows = torch.where(keep(p), PHIS[phi](x), 0.0).sum(1)
    found = torch.autograd.grad((g.double() * rows).sum(), list(leaves.values()))
    return rows.detach(), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("m", [None, 130], ids=["self", "keys"])
@pytest.mark.parametrize("biases", ["", "k", "r", "kr"])
@pytest.mark.parametrize("skip", [(0,), (3, -9)], ids=["closed", "one-sided"])
def test_sums(isa, phi, m, biases, skip):
    """Queries as their own keys are symmetric only without biases and with closed offsets."""
    n = 150
    p = make(n, m, 21, key_bias=torch.randn(m or n) if "k" in biases else None, skip=skip)
    row_bias = torch.randn(n) if "r" in biases else None
    a = p.arguments()
    arguments = (*a[:4], row_bias, *a[4:], phi)
    g = torch.randn(n)
    rows, exact = _dense(p, row_bias, phi, g)
    assert error(cpu.similarity_sum(*arguments, torch.float32), rows) < 1e-5
    needs = [True, m is not None, True, "k" in biases, "r" in biases]
    results = cpu.similarity_sum_backward(g, *arguments, needs, torch.float32)
    for name, result in zip("qksbr", results, strict=True):
        if name not in exact:
            assert result.shape == (0,)
        elif name == "s":
            size = (exact["q"] * p.queries).abs().sum()
            assert (result - exact["s"]).abs() <= 1e-5 * size
        else:
            assert error(result, exact[name]) < 1e-4, name


def _integers(n, m, d):
    """Small integers: products are exact in every precision, ties abound."""
    q, k = torch.randint(-2, 3, (n, d)).float(), torch.randint(-2, 3, (m, d)).float()
    return Problem(q, k, torch.tensor(1.0))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 5000), (70, 300), (300, 70), (5, 3)])
@pytest.mark.parametrize("k", [1, 6, 100])
@pytest.mark.parametrize("ceiling", [False, True])
def test_topk_is_exact_and_ties_go_to_the_lower_index(isa, precision, n, m, k, ceiling):
    p = _integers(n, m, 7)
    below = torch.randint(-3, 4, (n,)).float() if ceiling else None
    indices, values = cpu.similarity_topk(*p.arguments(), k, below, precision)
    scores = p.queries @ p.keys.T
    if ceiling:
        scores = scores.masked_fill(scores >= below[:, None], float("-inf"))
    best, order = scores.sort(dim=1, descending=True, stable=True)
    count = min(k, m)
    missing = torch.isinf(best[:, :count])
    assert torch.equal(values[:, :count], best[:, :count])
    assert torch.equal(indices[:, :count], order[:, :count].masked_fill(missing, -1))
    assert (indices[:, count:] == -1).all()
    assert torch.isinf(values[:, count:]).all()

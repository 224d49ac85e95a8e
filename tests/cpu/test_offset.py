"""The fixed exponent offset, when it suffices, and the true maximum that replaces it."""

import pytest
import torch

from .problems import Problem, error, gradients, logsumexp, make, true_gradients, truth, unit


def _check(p, may_use_offset, bound=1e-5, gradient_bound=2e-4):
    out = logsumexp(p, columns=True)
    assert bool(torch.isnan(out[5])) != may_use_offset
    exact = truth(p, columns=True)
    assert error(out[0], exact[0]) < bound
    h = None
    if p.keys is not None:
        assert error(out[1], exact[1]) < bound
        h = torch.randn(p.m)
    g = torch.randn(p.queries.shape[0])
    for result, wanted in zip(
        gradients(p, out, g, h)[:2], true_gradients(p, g, h)[:2], strict=True
    ):
        if wanted is not None:
            assert error(result, wanted) < gradient_bound


@pytest.mark.parametrize("m", [None, 150], ids=["symmetric", "two sides"])
@pytest.mark.parametrize("temperature", [0.1, 0.0125, 0.01])
def test_offset_serves_ordinary_temperatures(isa, m, temperature):
    _check(make(200, m, 64, temperature), may_use_offset=True)


@pytest.mark.parametrize("m", [None, 150], ids=["symmetric", "two sides"])
@pytest.mark.parametrize("temperature", [0.005, 0.001])
def test_maximum_serves_colder_ones(isa, m, temperature):
    skip = (0,) if m is None else ()
    _check(make(200, m, 64, temperature, skip=skip), may_use_offset=False, gradient_bound=1e-3)


@pytest.mark.parametrize("m", [None, 150], ids=["symmetric", "two sides"])
def test_outlier_rows_do_not_flush_the_others(isa, m):
    """Rows a thousand times as long; their own softmax is beyond fp32, the others' is not."""
    p = make(200, m, 64, skip=(0,))
    p.queries[::50] *= 1e3
    ordinary = torch.arange(200) % 50 != 0
    out, g = logsumexp(p), torch.rand(200)
    assert torch.isnan(out[5])
    assert error(out[0], truth(p)[0]) < 1e-6
    assert error(out[0][ordinary], truth(p)[0][ordinary]) < 1e-5
    result, exact = gradients(p, out, g)[0], true_gradients(p, g)[0]
    assert error(result[ordinary], exact[ordinary]) < 5e-3


def test_unnormalised_inputs(isa):
    _check(Problem(torch.randn(120, 64), torch.randn(90, 64), torch.tensor(10.0)), False,
           gradient_bound=1e-3)  # fmt: skip


def test_empty_rows_alone_do_not_give_up_the_offset(isa):
    """Cold enough to be looked at, but the rows without a sum have nothing to sum."""
    ids = torch.zeros(90, dtype=torch.int64)
    ids[::2] = 7
    p = Problem(unit(90, 8), unit(80, 8), torch.tensor(90.0), None, ids,
                torch.zeros(80, dtype=torch.int64), "same", ())  # fmt: skip
    p.keys.copy_(p.queries[torch.arange(80) % 45 * 2 + 1])  # no kept row flushes
    out = logsumexp(p)
    assert torch.isinf(out[0][::2]).all()
    assert not torch.isnan(out[5])


def test_scores_beyond_exponents(isa):
    """Scores of a million: exact in the limit, no overflow, no NaN."""
    p = Problem(unit(40, 16) * 1e4, unit(30, 16) * 1e3, torch.tensor(1.0))
    out = logsumexp(p, columns=True)
    assert error(out[0], truth(p, columns=True)[0]) < 1e-6
    assert all(
        torch.isfinite(t).all() for t in gradients(p, out, torch.ones(40), torch.ones(30))[:3]
    )


def test_nan_reaches_its_row(isa):
    p = make(40, 50, 16)
    p.queries[3, 2] = float("nan")
    rows = logsumexp(p)[0]
    assert torch.isnan(rows[3])

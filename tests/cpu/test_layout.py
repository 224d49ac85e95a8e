"""Inputs as they come: strided, expanded, mixed dtypes; and refusals in plain words."""

import pytest
import torch

from fastcl.ops import cpu

from .problems import Problem, error, gradients, logsumexp, make, true_gradients, truth, unit


def _strided(x):
    """The same numbers, rows apart."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), float("nan"))
    wide[:, 2 : 2 + x.shape[1]] = x
    return wide[:, 2 : 2 + x.shape[1]]


def _transposed(x):
    return x.T.contiguous().T


@pytest.mark.parametrize("layout", [_strided, _transposed])
@pytest.mark.parametrize("d", [32, 33])
def test_strides(isa, layout, d):
    p = make(90, 70, d)
    odd = Problem(layout(p.queries), layout(p.keys), p.scale)
    assert not odd.queries.is_contiguous()
    g = torch.rand(90)
    for a, b in zip(logsumexp(p, True), logsumexp(odd, True), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(p, logsumexp(p), g), gradients(odd, logsumexp(odd), g), strict=True):
        assert torch.equal(a, b)


def test_expanded_upstream_gradient(isa):
    p = make(50, 60, 16)
    out = logsumexp(p)
    expanded = torch.tensor(0.5).expand(50)
    assert error(gradients(p, out, expanded)[0], true_gradients(p, expanded)[0]) < 1e-5


@pytest.mark.parametrize("keys", [torch.bfloat16, torch.float16])
def test_queries_and_a_queue_of_another_dtype(isa, keys):
    p = make(64, 500, 40)
    p = Problem(p.queries, p.keys.to(keys), p.scale)
    assert error(logsumexp(p)[0], truth(p)[0]) < 1e-6


def test_a_slice_of_the_queries_as_keys(isa):
    """Same memory, fewer rows: not the symmetric problem."""
    z = unit(100, 24)
    p = Problem(z, z[:37], torch.tensor(10.0))
    out = logsumexp(p, columns=True)
    exact = truth(p, columns=True)
    assert error(out[0], exact[0]) < 1e-6
    assert error(out[1], exact[1]) < 1e-6


def test_inputs_are_not_written():
    p = make(70, 80, 24, key_bias=torch.randn(80))
    before = [t.clone() for t in (p.queries, p.keys, p.scale, p.key_bias)]
    out = logsumexp(p, columns=True)
    gradients(p, out, torch.rand(70), torch.rand(80))
    for a, b in zip(before, (p.queries, p.keys, p.scale, p.key_bias), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"keys": torch.randn(4, 3)}, "features"),
        (lambda a: a | {"scale": torch.tensor(1.0).double()}, "scale must be one float32"),
        (lambda a: a | {"key_bias": torch.randn(5)}, "key_bias must hold 6 float32"),
        (lambda a: a | {"relation": 1}, "needs query_ids and key_ids"),
        (lambda a: a | {"skip": [1, 2, 3, 4]}, "at most 3 offsets"),
        (lambda a: a | {"queries": torch.randn(0, 2)}, "queries must not be empty"),
    ],
)
def test_refusals(change, message):
    arguments = {
        "queries": torch.randn(4, 2), "keys": torch.randn(6, 2), "scale": torch.tensor(1.0),
        "key_bias": None, "query_ids": None, "key_ids": None, "relation": 0, "skip": [],
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastcl._cpu_logsumexp(*change(arguments).values(), False, False, 0, False)


def test_the_backend_declares_what_it_leaves_to_others():
    assert torch.float64 not in cpu.BACKEND.precisions

"""Gradients of every order, operator registration, torch.compile, autocast."""

import pytest
import torch

import fastcl
from fastcl import Pairs
from fastcl.ops import (
    l2_normalize,
    l2_normalize_pair,
    similarity_logsumexp,
    similarity_sum,
    similarity_topk,
)

F64 = torch.float64
QUERY_IDS = torch.tensor([0, 1, 2, 0, 1, 2, 3])
KEY_IDS = torch.tensor([0, 1, 1, 2, 0])
RULES = {
    "all": Pairs(),
    "offsets": Pairs(skip=(0, 3, -3)),
    "same": Pairs("same", QUERY_IDS, KEY_IDS),
    "different": Pairs("different", QUERY_IDS, KEY_IDS, skip=(0,)),
}
SYMMETRIC = {
    "all": Pairs(),
    "offsets": Pairs(skip=(0, 3, -3)),
    "same": Pairs("same", QUERY_IDS, skip=(0,)),
    "different": Pairs("different", QUERY_IDS),
}


def leaf(*shape):
    return torch.randn(shape, dtype=F64, requires_grad=True)


def check_both_orders(function, inputs):
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def finite(x):
    return torch.where(torch.isinf(x), 0.0, x)


@pytest.fixture(params=["chunked", "reference"])
def backend(request):
    with fastcl.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("workspace", [0, 64])
def test_logsumexp(backend, rule, workspace):
    fastcl.set_workspace(workspace)

    def both(q, k, scale, bias):
        result = similarity_logsumexp(q, k, scale, key_bias=bias, pairs=RULES[rule], columns=True)
        return finite(result.rows), finite(result.columns)

    check_both_orders(both, (leaf(7, 3), leaf(5, 3), leaf(), leaf(5)))


@pytest.mark.parametrize("rule", SYMMETRIC)
@pytest.mark.parametrize("workspace", [0, 64])
def test_symmetric_logsumexp(backend, rule, workspace):
    fastcl.set_workspace(workspace)
    check_both_orders(
        lambda z, s: finite(similarity_logsumexp(z, None, s, pairs=SYMMETRIC[rule]).rows),
        (leaf(7, 3), leaf()),
    )


@pytest.mark.parametrize("rule", RULES)
def test_logsumexp_of_keys_without_gradient(backend, rule):
    keys = torch.randn(5, 3, dtype=F64)
    check_both_orders(
        lambda q, s: finite(similarity_logsumexp(q, keys, s, pairs=RULES[rule]).rows),
        (leaf(7, 3), leaf()),
    )


@pytest.mark.parametrize("phi", ["softplus", "relu", "relu_squared"])
@pytest.mark.parametrize("rule", RULES)
def test_sum(backend, phi, rule):
    check_both_orders(
        lambda q, k, s, b, r: similarity_sum(
            q, k, s, phi=phi, key_bias=b, row_bias=r, pairs=RULES[rule]
        ),
        (leaf(7, 3), leaf(5, 3), leaf(), leaf(5), leaf(7)),
    )


def test_normalize(backend):
    check_both_orders(lambda x: l2_normalize(x)[0], (leaf(4, 3),))
    check_both_orders(lambda a, b: l2_normalize_pair(a, b)[:2], (leaf(4, 3), leaf(4, 3)))
    short = torch.full((1, 3), 1e-14, dtype=F64, requires_grad=True)
    l2_normalize(short)[0].sum().backward()
    assert torch.equal(short.grad, torch.full((1, 3), 1e12, dtype=F64))


def test_rows_without_pairs_have_no_gradient():
    z = leaf(4, 3)
    rule = Pairs("same", torch.tensor([0, 0, 1, 2]), skip=(0,))
    rows = similarity_logsumexp(z, None, 2.0, pairs=rule).rows
    assert torch.isneginf(rows[2:]).all()
    torch.nn.functional.softplus(rows).sum().backward()
    assert (z.grad[2:] == 0).all()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("save", ["nothing", "mean_keys", "exponentials"])
def test_opcheck_logsumexp(save):
    q, k = leaf(6, 3), torch.randn(5, 3, dtype=F64, requires_grad=save != "mean_keys")
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)
    columns = save != "mean_keys"
    ids = (QUERY_IDS[:6], KEY_IDS)
    torch.library.opcheck(
        torch.ops.fastcl.similarity_logsumexp.default,
        (q, k, scale, None, *ids, "different", [0], columns, True, save, F64),
    )
    torch.library.opcheck(
        torch.ops.fastcl.similarity_logsumexp.default,
        (q, None, scale, None, None, None, "any", [0, 2, -2], False, False,
         "nothing" if save == "mean_keys" else save, F64),
    )  # fmt: skip


def test_opcheck_others():
    q, k, scale = leaf(6, 3), leaf(5, 3), torch.tensor(2.0, dtype=F64, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fastcl.similarity_sum.default,
        (q, k, scale, leaf(5), leaf(6), None, None, "any", [1], "softplus", F64),
    )
    torch.library.opcheck(
        torch.ops.fastcl.similarity_topk.default,
        (q.detach(), k.detach(), scale.detach(), None, None, None, "any", [0], 3, None, F64),
    )
    torch.library.opcheck(torch.ops.fastcl.l2_normalize.default, (q, 1e-12, F64))
    torch.library.opcheck(torch.ops.fastcl.l2_normalize_pair.default, (q, leaf(6, 3), 1e-12, F64))


def test_opcheck_backwards():
    q, k, scale = leaf(6, 3), leaf(5, 3), torch.tensor(2.0, dtype=F64)
    g, h = torch.randn(6, dtype=F64), torch.randn(5, dtype=F64)
    rule = (None, None, "any", [0])
    rows, columns, _, _, saved, offset = torch.ops.fastcl.similarity_logsumexp(
        q.detach(), k.detach(), scale, None, *rule, True, False, "nothing", F64
    )
    torch.library.opcheck(
        torch.ops.fastcl.similarity_logsumexp_backward.default,
        (g, h, q, k, scale, None, *rule, rows, columns, saved, offset, "nothing",
         [True, True, True, False], F64),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fastcl.similarity_sum_backward.default,
        (g, q, k, scale, None, None, *rule, "relu_squared", [True, True, False, False, False], F64),
    )
    y, inverse = l2_normalize(q.detach())
    torch.library.opcheck(
        torch.ops.fastcl.l2_normalize_backward.default, (leaf(6, 3), q, y, inverse, 1e-12, F64)
    )
    rows, _, factors = l2_normalize_pair(q.detach(), q.detach().flip(0))
    torch.library.opcheck(
        torch.ops.fastcl.l2_normalize_pair_backward.default,
        (leaf(12, 3), leaf(6), q, leaf(6, 3), rows, factors, 1e-12, F64),
    )


def test_compile_is_one_graph_and_follows_use_backend():
    def objective(q, k, s):
        both = similarity_logsumexp(q, k, s, columns=True, maxima=True)
        selected = similarity_topk(q, k, s, k=2).values
        sums = similarity_sum(l2_normalize(q)[0], k, s, phi="softplus")
        return both.rows.sum() + both.columns.sum() + both.row_max.sum() + sums.sum(), selected

    inputs = leaf(9, 4), leaf(8, 4), torch.tensor(1.5, dtype=F64, requires_grad=True)
    compiled = torch.compile(objective, fullgraph=True)
    expected, best = objective(*inputs)
    wanted = torch.autograd.grad(expected, inputs)
    for backend in ("chunked", "reference"):
        with fastcl.use_backend(backend):
            value, selected = compiled(*inputs)
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(selected, best)
            for ours, theirs in zip(torch.autograd.grad(value, inputs), wanted, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_autocast_does_not_reach_into_an_operator():
    q, k = torch.randn(20, 64), torch.randn(30, 64)
    exact = similarity_logsumexp(q.double(), k.double(), 5.0).rows
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = similarity_logsumexp(q, k, 5.0).rows
    assert rows.dtype == torch.float32
    # the chunked backend forms fp32 products even when asked for bf16 ones
    with torch.autocast("cpu", dtype=torch.bfloat16), fastcl.use_backend("chunked"):
        chunked = similarity_logsumexp(q, k, 5.0).rows
    torch.testing.assert_close(chunked, exact.float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(rows, exact.float(), rtol=5e-2, atol=0.5)


def test_gradients_come_in_the_inputs_dtype():
    q = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(5, 8, dtype=torch.float16, requires_grad=True)
    rows = similarity_logsumexp(q, k, 2.0).rows
    assert rows.dtype == torch.float32
    rows.sum().backward()
    assert q.grad.dtype == torch.bfloat16
    assert k.grad.dtype == torch.float16

"""Every backend, as it declares itself, against the float64 oracle and plain PyTorch."""

import pytest
import torch

import fastcl
from fastcl.testing import BIASED, DATA, RULED, RULES, SHAPES, compare, served

BACKENDS = [name for name in fastcl.backends() if name != "reference" and served(name)]
CASES = [(name, operation, dtype) for name in BACKENDS for operation, dtype in served(name)]
RULED_CASES = [case for case in CASES if case[1] in RULED]


def _label(value):
    return str(value).removeprefix("torch.")


def _judge(*args, **kwargs):
    verdict = compare(*args, **kwargs)
    assert verdict.passed, verdict


@pytest.mark.parametrize(("backend", "operation", "dtype"), CASES, ids=_label)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, operation, dtype, shape):
    _judge(backend, operation, shape, dtype=dtype, bias=operation in (*RULED, *BIASED))


@pytest.mark.parametrize(("backend", "operation", "dtype"), RULED_CASES, ids=_label)
@pytest.mark.parametrize("rule", RULES)
def test_rules(backend, operation, dtype, rule):
    for shape in (SHAPES[5], SHAPES[9]):
        _judge(backend, operation, shape, rule=rule, dtype=dtype)


@pytest.mark.parametrize(("backend", "operation", "dtype"), CASES, ids=_label)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01, 0.005])
def test_data_and_temperatures(backend, operation, dtype, data, temperature):
    if operation in ("normalize", "pair") and temperature != 0.5:
        pytest.skip("normalisation knows no temperature")
    for shape in (SHAPES[3], SHAPES[9]):
        _judge(backend, operation, shape, data, "offsets", temperature, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [0, 64])
@pytest.mark.parametrize("temperature", [0.1, 0.008, 0.004])
def test_kept_and_recomputed_exponentials(backend, workspace, temperature):
    fastcl.set_workspace(workspace)
    for shape in (SHAPES[5], SHAPES[9]):
        _judge(backend, "columns", shape, "clustered", "offsets", temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_several_tiles(backend, symmetric, monkeypatch):
    """Sizes beyond one tile, so that partial results of tiles are merged."""
    from fastcl.ops.chunked import problem

    monkeypatch.setitem(problem._TILE, "cpu", 32 * 32)
    shape = SHAPES[10] if symmetric else SHAPES[5]
    for rule in RULES:
        for operation in ("logsumexp", "columns", "softplus", "topk"):
            for temperature in (0.1, 0.005):
                _judge(backend, operation, shape, "random", rule, temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tail_rows_that_underflow(backend):
    """Rows opposite to every key, at a temperature where a fixed offset would flush them."""
    queries = torch.nn.functional.normalize(torch.randn(40, 16))
    queries[7] = -queries[0]
    keys = queries[:1].repeat(30, 1)
    with fastcl.use_backend("reference"):
        truth = fastcl.ops.similarity_logsumexp(queries, keys, 150.0, columns=True, maxima=True)
    with fastcl.use_backend(backend):
        result = fastcl.ops.similarity_logsumexp(queries, keys, 150.0, columns=True, maxima=True)
    for ours, exact in zip(result, truth, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_ties_and_threshold(backend):
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[1.0, 0.0], [0.5, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.5]])
    with fastcl.use_backend(backend):
        plain = fastcl.ops.similarity_topk(queries, keys, 1.0, k=4)
        below = fastcl.ops.similarity_topk(queries, keys, 1.0, k=3, below=torch.tensor([1.0, 0.5]))
        many = fastcl.ops.similarity_topk(queries, keys, 1.0, k=7)
    assert plain.indices.tolist() == [[0, 2, 4, 1], [1, 4, 0, 2]]
    assert below.indices.tolist() == [[1, 3, -1], [0, 2, 3]]
    assert below.values[0].tolist() == [0.5, 0.0, float("-inf")]
    assert many.indices[0].tolist() == [0, 2, 4, 1, 3, -1, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_among_many_ties(backend):
    """Quantised scores: the k-th place is shared, and the lowest indices must win it."""
    queries, keys = torch.randint(-2, 3, (30, 3)).float(), torch.randint(-2, 3, (500, 3)).float()
    with fastcl.use_backend("reference"):
        truth = fastcl.ops.similarity_topk(queries, keys, 1.0, k=20)
    with fastcl.use_backend(backend):
        result = fastcl.ops.similarity_topk(queries, keys, 1.0, k=20)
    assert torch.equal(result.values, truth.values)
    assert torch.equal(result.indices, truth.indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    queries, keys = torch.randn(16, 20).T, torch.randn(64, 50)[::2, ::3][:, :16]
    assert not queries.is_contiguous()
    assert not keys.is_contiguous()
    with fastcl.use_backend(backend):
        strided = fastcl.ops.similarity_logsumexp(queries, keys, 2.0, columns=True)
        dense = fastcl.ops.similarity_logsumexp(
            queries.contiguous(), keys.contiguous(), 2.0, columns=True
        )
    assert torch.equal(strided.rows, dense.rows)
    assert torch.equal(strided.columns, dense.columns)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [0, 64])
def test_runs_repeat_bit_for_bit(backend, workspace):
    fastcl.set_workspace(workspace)
    torch.set_num_threads(2)
    x = torch.randn(700, 48)

    def run():
        z = x.clone().requires_grad_()
        with fastcl.use_backend(backend):
            rows = fastcl.ops.similarity_logsumexp(z, None, 0.3, pairs=fastcl.Pairs(skip=(0,))).rows
            rows.sum().backward()
        return rows.detach(), z.grad

    first, second = run(), run()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_forced_backend_that_cannot_serve_says_why():
    with pytest.raises(ValueError, match="backend is 'magic'; expected one of"):
        fastcl.use_backend("magic").__enter__()
    from fastcl.ops.registry import Backend, register, unregister

    register(Backend("narrow", None, devices=("xpu",), precisions=(torch.float32,)))
    try:
        with (
            fastcl.use_backend("narrow"),
            pytest.raises(RuntimeError, match=r"narrow: runs on xpu, not on cpu; computes in"),
        ):
            fastcl.ops.similarity_logsumexp(torch.ones(2, 2).double(), None, 1.0)
    finally:
        unregister("narrow")


@pytest.mark.parametrize("forward", [*BACKENDS, "reference"])
@pytest.mark.parametrize("backward", [*BACKENDS, "reference"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [10.0, 200.0])
def test_one_backend_finishes_what_another_began(forward, backward, symmetric, scale):
    """What is saved between the passes has one meaning, whoever wrote it."""
    from fastcl.ops import similarity_logsumexp

    q = torch.nn.functional.normalize(torch.randn(203, 24)).requires_grad_()
    k = None if symmetric else torch.nn.functional.normalize(torch.randn(77, 24)).requires_grad_()

    def gradients(first, second):
        with fastcl.use_backend(first):
            result = similarity_logsumexp(q, k, scale, columns=not symmetric)
            objective = sum((t * t).sum() for t in result[:2])
        with fastcl.use_backend(second):
            return torch.autograd.grad(objective, [q] if symmetric else [q, k])

    pairs = zip(gradients(forward, backward), gradients("reference", "reference"), strict=True)
    for ours, exact in pairs:
        assert float((ours - exact).norm() / exact.norm()) < 1e-5 + 5e-7 * scale


def _gradient(backend, q, k, scale, upstream):
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    with fastcl.use_backend(backend):
        rows = fastcl.ops.similarity_logsumexp(q, k, scale).rows
        return torch.autograd.grad(rows, (q, k), upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [0, 64])
def test_tiny_gradients_of_huge_sums(backend, workspace):
    """Confident rows: sums of e^73 and gradients of 1e-15, whose quotient is subnormal in fp32."""
    fastcl.set_workspace(workspace)
    centre = torch.nn.functional.normalize(torch.randn(1, 32))
    q, k = (torch.nn.functional.normalize(centre + 0.05 * torch.randn(n, 32)) for n in (50, 60))
    upstream = 1e-15 * torch.rand(50)
    pairs = zip(
        _gradient(backend, q, k, 77.0, upstream),
        _gradient("reference", q, k, 77.0, upstream),
        strict=True,
    )
    for ours, exact in pairs:
        difference = (ours.double() - exact.double()).norm() / exact.double().norm()
        assert float(difference) < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [10.0, 500.0])
def test_upstream_of_empty_rows_is_ignored(backend, scale):
    """-inf has no useful gradient, and whatever a loss makes of it must not reach the features."""
    z = torch.nn.functional.normalize(torch.randn(6, 8)).requires_grad_()
    rule = fastcl.Pairs("same", torch.tensor([0, 0, 0, 1, 1, 2]), skip=(0,))
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, float("nan")])
    with fastcl.use_backend(backend):
        rows = fastcl.ops.similarity_logsumexp(z, None, scale, pairs=rule).rows
        (gradient,) = torch.autograd.grad(rows, z, upstream)
    assert torch.isneginf(rows[5])
    assert (gradient[5] == 0).all()
    assert torch.isfinite(gradient).all()
    assert gradient[:5].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_upstream_breaks_its_row_alone(backend, broken):
    """Weights are formed in units of the largest gradient, which it must not become."""
    queries, keys = (torch.nn.functional.normalize(torch.randn(n, 16)) for n in (70, 60))
    queries.requires_grad_()
    keys.requires_grad_()
    others = torch.arange(70) != 5
    upstream = torch.where(others, 1.0, broken)
    with fastcl.use_backend(backend):
        rows = fastcl.ops.similarity_logsumexp(queries, keys, 4.0).rows
        (gradient,) = torch.autograd.grad(rows, queries, upstream, retain_graph=True)
        (whole,) = torch.autograd.grad(rows, queries, torch.ones(70))
    assert not torch.isfinite(gradient[5]).any()
    torch.testing.assert_close(gradient[others], whole[others], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [4.0, 400.0])
@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_a_broken_entry_breaks_its_row_alone(backend, scale, entry):
    """As an empty sum (-inf), which has no gradient, it would pass unseen."""
    queries, keys = (torch.nn.functional.normalize(torch.randn(n, 16)) for n in (70, 60))
    queries[5, 3] = entry
    others = torch.arange(70) != 5
    with fastcl.use_backend(backend):
        rows = fastcl.ops.similarity_logsumexp(queries, keys, scale).rows
    truth = (queries.double() @ keys.double().T * scale).logsumexp(1)
    assert rows[5].isnan() or rows[5] == float("inf")
    torch.testing.assert_close(rows[others].double(), truth[others], rtol=1e-5, atol=1e-5)
    for phi in ("softplus", "relu", "relu_squared"):
        with fastcl.use_backend(backend):
            sums = fastcl.ops.similarity_sum(queries, keys, scale, phi=phi)
        assert torch.isfinite(sums).tolist() == others.tolist()

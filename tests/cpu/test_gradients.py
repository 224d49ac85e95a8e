"""Every combination of what may be asked of a backward pass, and what the forward may have kept."""

import itertools

import pytest
import torch

from fastcl.ops import cpu, reference

from .problems import Problem, error, gradients, keep, logsumexp, make, true_gradients, truth, unit

BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def _ids(n, m):
    """Ids far beyond 32 bits, so that they must be ranked."""
    names = torch.randint(-(2**62), 2**62, (5,))
    return names[torch.randint(0, 5, (n,))], names[torch.randint(0, 5, (m,))]


@pytest.mark.parametrize("precision", BOUND, ids=["fp32", "bf16"])
@pytest.mark.parametrize("save", ["nothing", "exponentials"])
def test_two_sided(isa, precision, save):
    n, m, d = 270, 310, 40
    query_ids, key_ids = _ids(n, m)
    p = make(n, m, d, key_bias=torch.randn(m), query_ids=query_ids, key_ids=key_ids,
             relation="different", skip=(0, 7, -300))  # fmt: skip
    out = logsumexp(p, columns=True, save=save, precision=precision)
    g, h = torch.randn(n), torch.randn(m)
    exact = true_gradients(p, g, h)
    for needs in itertools.product([True, False], repeat=4):
        for name, need, result, wanted in zip(
            ("queries", "keys", "scale", "bias"), needs,
            gradients(p, out, g, h, save, needs, precision), exact, strict=True,
        ):  # fmt: skip
            if not need:
                assert result.shape == (0,), name
            elif name == "scale":
                size = (exact[0] * p.queries).abs().sum()
                assert (result - wanted).abs() <= BOUND[precision] * size
            else:
                assert error(result, wanted) < BOUND[precision], (name, needs)


@pytest.mark.parametrize("precision", BOUND, ids=["fp32", "bf16"])
@pytest.mark.parametrize("save", ["nothing", "exponentials"])
@pytest.mark.parametrize("skip", [(), (0,), (0, 150, -150)], ids=str)
def test_symmetric(isa, precision, save, skip):
    """The diagonal itself counts where no offset removes it."""
    ids, _ = _ids(300, 1)
    for relation in ("any", "same"):
        p = make(300, None, 37, skip=skip, relation=relation,
                 query_ids=None if relation == "any" else ids)  # fmt: skip
        out = logsumexp(p, save=save, precision=precision)
        g = torch.rand(300)
        dq, _, dscale, _ = gradients(p, out, g, save=save, precision=precision)
        exact = true_gradients(p, g)
        assert error(dq, exact[0]) < BOUND[precision]
        assert error(dscale, exact[2]) < 10 * BOUND[precision]


def test_ids_that_agree_in_their_low_bits_differ(isa):
    ids = torch.tensor([0, 2**32, -(2**40), 5])[torch.arange(60) % 4]
    p = make(60, None, 8, query_ids=ids, relation="same", skip=(0,))
    assert error(logsumexp(p)[0], truth(p)[0]) < 1e-6


@pytest.mark.parametrize("n", [3, 100, 700])
def test_rows_only_cut_keys_into_chunks(isa, n):
    p = make(n, 3000, 24)
    g = torch.rand(n)
    out = logsumexp(p)
    dq, dk, _, _ = gradients(p, out, g, needs=(True, False, True, False))
    assert error(dq, true_gradients(p, g)[0]) < BOUND[torch.float32]
    assert dk.shape == (0,)


@pytest.mark.parametrize("n", [1, 100, 700])
@pytest.mark.parametrize("temperature", [0.1, 0.002], ids=["offset", "maximum"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_keys(isa, n, temperature, storage):
    ids = torch.arange(n) % 3
    key_ids = torch.arange(2000) % 2
    p = make(n, 2000, 40, temperature, query_ids=ids, key_ids=key_ids, relation="same", skip=(5,))
    p = Problem(p.queries, p.keys.to(storage), *p.arguments()[2:])
    rows, _, row_max, _, mean, offset = logsumexp(p, maxima=True, save="mean_keys")
    exact = truth(p)
    assert torch.isnan(offset) == (temperature == 0.002)
    assert error(rows, exact[0]) < 1e-5
    assert error(row_max, exact[2]) < 1e-5
    scores = p.scale.double() * p.queries.double() @ p.keys.double().T
    weights = torch.softmax(scores.masked_fill(~keep(p), float("-inf")), 1).nan_to_num(0.0)
    assert error(mean, weights @ p.keys.double()) < 2e-4


def test_maxima_do_not_disturb_what_is_saved(isa):
    p = make(100, 90, 16, skip=(0,))
    plain = logsumexp(p, columns=True, save="exponentials")
    both = logsumexp(p, columns=True, maxima=True, save="exponentials")
    for k in (0, 1, 4, 5):
        assert torch.equal(plain[k], both[k])
    exact = truth(p, columns=True)
    assert error(both[2], exact[2]) < 1e-6
    assert error(both[3], exact[3]) < 1e-6


@pytest.mark.parametrize("save", ["nothing", "exponentials"])
def test_small_losses_keep_relative_accuracy(isa, save):
    """Aligned views at temperature 0.013: losses about 1e-15, upstream gradients likewise."""
    n, d = 64, 24
    z = unit(n, d)
    z = torch.nn.functional.normalize(torch.cat([z, z + 1e-4 * torch.randn(n, d)]), dim=1)
    p = Problem(z, None, torch.tensor(1 / 0.013), skip=(0, n, -n))
    positive = (z.double() * z.double().roll(n, 0)).sum(1) / 0.013
    g = torch.exp(truth(p)[0] - positive)  # the sigmoid's tail, per row
    assert g.max() < 1e-8
    assert g.median() < 1e-13
    dq = gradients(p, logsumexp(p, save=save), g.float(), save=save)[0].double()
    exact = true_gradients(p, g)[0]
    assert ((dq - exact).norm(dim=1) / exact.norm(dim=1)).median() < 2e-5
    assert (dq - exact).norm() / exact.norm() < 2e-4


def test_small_sigmoid_losses_keep_relative_accuracy(isa):
    """Aligned rows, scale 40, bias -20: every e^x is near 1e-8, and lost where 1 is added to it."""
    z = unit(70, 256)
    needs = [True] * 4
    static = (True, 1e-12, needs)
    inputs = (z, z.clone(), torch.tensor(40.0), torch.tensor(-20.0))
    exact = reference.pair_sigmoid(*(x.double() for x in inputs), *static, torch.float64)
    assert exact[0] < 1e-4
    for ours, theirs in zip(cpu.pair_sigmoid(*inputs, *static, torch.float32), exact, strict=True):
        assert error(ours, theirs) < 1e-5


def test_tiny_upstream_gradients_do_not_vanish(isa):
    """1e-30 times sums near 2^120: without a power of two in between everything is subnormal."""
    p = make(50, 40, 16, temperature=0.0121)
    out = logsumexp(p)
    one = gradients(p, out, torch.ones(50))
    tiny = gradients(p, out, torch.full((50,), 1e-30))
    for a, b in zip(one[:2], tiny[:2], strict=True):
        assert error(b.double() * 1e30, a) < 1e-5

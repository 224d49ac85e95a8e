"""MemoryBank and its losses: known answers, exactness, duplicates, state."""

import copy
import math

import pytest
import torch

import fastcl
from fastcl import CMCLoss, MemoryBank, MemoryBankLoss
from fastcl import functional as f

F64 = torch.float64


def _unit(x):
    return torch.nn.functional.normalize(x)


_k, _j = torch.arange(1, 13, dtype=F64), torch.arange(1, 16, dtype=F64)
A0, Q0 = torch.sin(_k).reshape(4, 3), torch.cos(_j / 3).reshape(5, 3)
A, Q = _unit(A0), _unit(Q0)
B = _unit(A0 + 0.5 * torch.cos(_k / 2).reshape(4, 3))
Q_AB = _unit(Q0 + 0.3 * torch.sin(_j).reshape(5, 3))
DRAWN = torch.tensor([[0, 3, 4, 1], [1, 0, 2, 2], [2, 4, 4, 3], [3, 0, 1, 2]])
INDICES, NEGATIVES = DRAWN[:, 0], DRAWN[:, 1:]


def bank_of(rows, **options):
    bank = MemoryBank(*rows.shape, dtype=F64, **options)
    bank.features.copy_(rows)
    return bank


def test_known_answers():
    expected = [
        ("softmax", 0.0, 10.221121776837),
        ("sampled_softmax", 0.0, 5.747559114010),
        ("nce", 1e-7, 10.435225522610),
        ("nce", 0.0, 10.435224958049),
    ]
    for form, eps, value in expected:
        bank = bank_of(Q)
        loss = f.memory_bank(A, INDICES, bank, form=form, negatives=NEGATIVES, eps=eps)
        assert float(loss) == pytest.approx(value, rel=1e-11)
        if form == "nce":
            assert math.exp(bank.log_normalizer) == pytest.approx(913137.349906, rel=1e-11)
        bank.update(INDICES, A)
        row = [0.698590136440, 0.666116967422, 0.261266161188]
        assert bank.features[0].tolist() == pytest.approx(row, abs=1e-11)
        assert torch.equal(bank.features[4], Q[4])


@pytest.mark.parametrize(
    ("form", "value"), [("nce", 17.780348005361), ("sampled_softmax", 11.608351857882)]
)
def test_cmc_known_answers(form, value):
    loss = CMCLoss(5, 3, form=form, dtype=F64)
    for bank, rows in zip(loss.banks, (Q, Q_AB), strict=True):
        bank.features.copy_(rows)
    ours = loss(A, B, indices=INDICES, negatives=NEGATIVES)
    assert float(ours) == pytest.approx(value, rel=1e-11)
    for bank, old, new in zip(loss.banks, (Q, Q_AB), (A, B), strict=True):
        torch.testing.assert_close(bank.features[:4], _unit(old[:4] + new))


def dense(features, indices, bank, scale, form, drawn):
    """The definitions on a matrix of scores."""
    s = _unit(features) @ bank.T * scale
    positive = s.gather(1, indices[:, None])[:, 0]
    if form == "softmax":
        return torch.logsumexp(s, 1) - positive
    scores = torch.cat([positive[:, None], s.gather(1, drawn)], 1)
    if form == "sampled_softmax":
        return torch.logsumexp(scores, 1) - positive
    n, k = len(bank), drawn.shape[1]
    probability = scores.exp() / (scores.detach().exp().mean() * n)
    noise, eps = k / n, 1e-7
    shares = probability[:, 0] / (probability[:, 0] + noise + eps)
    return -shares.log() - (noise / (probability[:, 1:] + noise + eps)).log().sum(1)


@pytest.mark.parametrize("form", ["softmax", "sampled_softmax", "nce"])
def test_gradient_is_the_dense_definitions_although_the_bank_moves(form, monkeypatch):
    """97 drawn rows, two at a time, for features and a learnable temperature."""
    monkeypatch.setattr(fastcl.losses.bank, "_GATHER_BYTES", 2 * 98 * 8 * 8)
    x = torch.randn(7, 8, dtype=F64, requires_grad=True)
    indices, drawn = torch.randint(0, 50, (7,)), torch.randint(0, 50, (7, 97))
    weight = torch.rand(7, dtype=F64)
    loss = MemoryBankLoss(50, 8, 0.2, form=form, dtype=F64, learnable=True).double()
    rows = loss.bank.features.clone()
    ours = loss(x, indices, negatives=drawn, weight=weight)
    assert not torch.equal(loss.bank.features, rows)
    inputs = (x, loss.logit_scale)
    theirs = dense(x, indices, rows, loss.logit_scale.exp(), form, drawn)
    theirs = (theirs * weight).sum() / weight.sum()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-11)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_the_constant_is_fixed_once_and_kept():
    loss = MemoryBankLoss(30, 8, form="nce", negatives=16)
    loss.eval()(torch.randn(4, 8), torch.arange(4))
    assert math.isnan(loss.bank.log_normalizer)
    loss.train()(torch.randn(4, 8), torch.arange(4))
    fixed = float(loss.bank.log_normalizer)
    assert not math.isnan(fixed)
    loss(torch.randn(4, 8), torch.arange(4))
    assert float(loss.bank.log_normalizer) == fixed
    twin = MemoryBankLoss(30, 8, form="nce", negatives=16)
    twin.load_state_dict(loss.state_dict())
    for a, b in zip(loss.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    exact = loss.bank.log_normalizer.clone()
    assert loss.bfloat16().bank.features.dtype == torch.bfloat16
    assert torch.equal(loss.bank.log_normalizer, exact)
    with pytest.raises(RuntimeError, match=r"bank.features has shape \(30, 8\).*\(30, 9\)"):
        MemoryBankLoss(30, 9).load_state_dict(loss.state_dict())


def test_repeats_are_averaged_in_any_order():
    bank = MemoryBank(9, 5, momentum=0.3, dtype=F64)
    old = bank.features.clone()
    indices = torch.tensor([4, 2, 4, 4, 0])
    new = torch.randn(5, 5, dtype=F64)
    other = copy.deepcopy(bank)
    bank.update(indices, new)
    mean = _unit(new)[indices == 4].mean(0)
    expected = _unit((0.3 * old[4] + 0.7 * mean)[None])[0]
    torch.testing.assert_close(bank.features[4], expected)
    assert torch.equal(bank.features[[1, 3, 5, 6, 7, 8]], old[[1, 3, 5, 6, 7, 8]])
    order = torch.tensor([3, 4, 0, 1, 2])
    other.update(indices[order], new[order])
    torch.testing.assert_close(other.features, bank.features)
    bank.eval().update(indices, new)
    torch.testing.assert_close(other.features, bank.features)


def test_metrics_and_sixteen_bit_storage():
    bank = MemoryBank(40, 8, dtype=torch.bfloat16)
    x, indices = torch.randn(6, 8), torch.arange(6)
    loss, metrics = f.memory_bank(x, indices, bank, return_metrics=True)
    s = _unit(x) @ bank.features.float().T
    own = torch.zeros_like(s, dtype=torch.bool)
    own[indices, indices] = True
    assert float(loss) == pytest.approx(
        float(torch.nn.functional.cross_entropy(s / 0.07, indices)), rel=1e-5
    )
    torch.testing.assert_close(metrics["positive_similarity"], s[own].mean())
    torch.testing.assert_close(metrics["negative_similarity"], s[~own].mean())
    torch.testing.assert_close(
        metrics["accuracy"], (s.argmax(1) == indices).float().mean()
    )  # fmt: skip


def test_compiles_to_one_graph():
    loss = MemoryBankLoss(40, 8)
    plain = copy.deepcopy(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, indices = torch.randn(6, 8, requires_grad=True), torch.randint(0, 40, (6,))
        a, b = compiled(x, indices), plain(x, indices)
        torch.testing.assert_close(a, b)
        for one, other in zip(torch.autograd.grad(a, x), torch.autograd.grad(b, x), strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(loss.bank.features, plain.bank.features)

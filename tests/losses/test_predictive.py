"""Prediction, blocks and transitions: known answers, axes, modules, small batches."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl import functional as f

_spec = importlib.util.spec_from_file_location("known", Path(__file__).with_name("known.py"))
known = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(known)
A, B, Q = known.A, known.B, known.Q

F64 = torch.float64
SWAPPED = A[:, [1, 0, 2]]  # W_2 A
PREDICTIONS, TARGETS = torch.stack([A, SWAPPED], 1), torch.stack([B, Q[:4]], 1)
POSITIVES = torch.stack([B, B.roll(-1, 0)], 1)
NEGATIVES = torch.stack([Q[:4], Q[1:]], 1)
STATE, EFFECT, NEXT = (
    torch.stack(pair, 1)[..., :2] for pair in ((A, B), (0.1 * B, 0.1 * A), (Q[:4], Q[1:]))
)
ORDER = torch.tensor([2, 0, 3, 1])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda: f.cpc(PREDICTIONS, TARGETS), 1.130547190622),
        (lambda: f.cpc(PREDICTIONS[:, :1], TARGETS[:, :1]), 0.821407872602),
        (lambda: f.cpc(PREDICTIONS[:, 1:], TARGETS[:, 1:]), 1.439686508642),
        # the axis of contexts is the other axis
        (lambda: f.cpc(TARGETS, PREDICTIONS), 1.132470349192),
        (lambda: f.cpc_bce(PREDICTIONS, TARGETS, torch.tensor([1, 1, 0, 0])), 0.681805509614),
        (lambda: f.block_contrastive(A, B, Q[:4], form="hinge"), 0.510366431921),
        (lambda: f.block_contrastive(A, B, Q[:4]), 0.665988356771),
        (lambda: f.block_contrastive(A, B, Q[:4], form="hinge", shared=True), 0.989007376862),
        (lambda: f.block_contrastive(A, B, Q[:4], shared=True), 1.620198032550),
        (lambda: f.block_contrastive(A, POSITIVES, NEGATIVES, form="hinge"), 1.130169467289),
        (lambda: f.block_contrastive(A, POSITIVES, NEGATIVES), 1.164112882624),
        (lambda: f.cswm(STATE, EFFECT, NEXT, ORDER, margin=-99.0), 2.545726560213),
        (lambda: f.cswm(STATE, EFFECT, NEXT, ORDER, form="repository"), 2.960268667967),
        (lambda: f.cswm(STATE, EFFECT, NEXT, ORDER), 2.884693068551),
        (lambda: f.mi_lower_bound(f.info_nce(A, B), 4), math.log(4) - 0.659508134847),
        (lambda: f.mi_lower_bound(f.info_nce(A, B), torch.tensor(4.0).double()),
         math.log(4) - 0.659508134847),
    ],
)  # fmt: skip
def test_known_answers(loss, expected):
    assert float(loss()) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_cpc_metrics():
    p, z = torch.nn.functional.normalize(torch.randn(2, 9, 4, 2, 5, dtype=F64), dim=4)
    z[:, :, 0] = p[:, :, 0]  # the first step is predicted well
    for where in fastcl.losses.predictive.NEGATIVES:
        _, metrics = f.cpc(p, z, negatives=where, return_metrics=True)
        assert metrics["step_accuracy"].shape == (2,)
        assert float(metrics["step_accuracy"][0]) > 0.99 > float(metrics["step_accuracy"][1])
        assert float(metrics["accuracy"]) == pytest.approx(float(metrics["step_accuracy"].mean()))
    s = torch.einsum("btkd,ctkd->tkbc", p, z)
    right = (s.argmax(3) == torch.arange(9)).double().mean((0, 2))
    _, metrics = f.cpc(p, z, return_metrics=True)
    torch.testing.assert_close(metrics["step_accuracy"], right)
    _, metrics = f.cpc_bce(p[:, 0], z[:, 0], torch.ones(9).long(), return_metrics=True)
    wanted = ((p[:, 0] * z[:, 0]).mean((1, 2)) > 0).double().mean()
    assert float(metrics["accuracy"]) == float(wanted)


def test_groups_of_many_rows_are_swept_one_by_one(monkeypatch):
    p, z = (torch.randn(7, 3, 2, 5, dtype=F64, requires_grad=True) for _ in range(2))
    batched = [f.cpc(p, z, negatives=w, return_metrics=True) for w in ("batch", "sequence", "all")]
    monkeypatch.setattr(fastcl.losses.groups, "_BATCHED", 2)
    swept = [f.cpc(p, z, negatives=w, return_metrics=True) for w in ("batch", "sequence", "all")]
    for (a, x), (b, y) in zip(batched, swept, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(x, y)
        for one, other in zip(
            torch.autograd.grad(a, (p, z)), torch.autograd.grad(b, (p, z)), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_modules_predict_from_every_time():
    module = fastcl.CPCLoss(7, 5, steps=2, negatives="all").double()
    context, features = torch.randn(6, 9, 7, dtype=F64), torch.randn(6, 9, 5, dtype=F64)
    weights = module.predictors.weight.view(2, 5, 7)
    predictions = torch.einsum("kdc,btc->btkd", weights, context[:, :7])
    targets = torch.stack([features[:, 1:8], features[:, 2:9]], 2)
    torch.testing.assert_close(
        module(context, features), f.cpc(predictions, targets, negatives="all")
    )
    module = fastcl.CPCLoss(7, 5, steps=2, learnable=True).double()
    module(context[:, 0], features[:, 1:3]).backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    module = fastcl.CPCBCELoss(7, 5, steps=3).double()
    labels = torch.arange(6) % 2
    loss = module(context[:, 0], features[:, 1:4], labels)
    theirs = f.cpc_bce(module.predictors(context[:, 0]), features[:, 1:4], labels)
    torch.testing.assert_close(loss, theirs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(context[:, 0], features[:, 1:4], labels), loss)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: f.cpc(x[:, None], x[:, None]),
        lambda x: f.cpc(x[:, None, None], x[:, None, None], negatives="all"),
        lambda x: f.cpc(x[:, None, None], x[:, None, None], negatives="other_sequences"),
        lambda x: f.cpc_bce(x[:, None], x[:, None], torch.ones(1).long()),
        lambda x: f.block_contrastive(x, x, x),
        lambda x: f.cswm(x[:, None], x[:, None], x[:, None]),
        lambda x: f.transe(x, x, x, x, x),
    ],
)
def test_batch_of_one(loss):
    x = torch.randn(1, 4, dtype=F64, requires_grad=True)
    value = loss(x)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, x)[0]).all()


def test_default_negatives_are_never_the_state_itself():
    for n in (2, 3, 17):
        order = fastcl.losses.world._without_fixed_points(n, torch.device("cpu"))
        assert sorted(order.tolist()) == list(range(n))
        assert (order != torch.arange(n)).all()
    _, metrics = f.cswm(STATE, EFFECT, NEXT, ORDER, return_metrics=True)
    assert float(metrics["positive_energy"]) == pytest.approx(2.545726560213, rel=1e-10)


def test_transe_without_relation_in_the_negative():
    h, r, t, h2, t2 = torch.randn(5, 6, 3, dtype=F64)
    ours = f.transe(h, r, t, h2, t2, negative_relation=torch.zeros_like(r), distance="squared")
    true, false = (h + r - t).square().sum(1), (h2 - t2).square().sum(1)
    torch.testing.assert_close(ours, (1.0 + true - false).clamp(min=0).mean())

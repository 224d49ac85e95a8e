"""Known answers, computed independently in float64, on small fixed inputs."""

import math

import pytest
import torch

from fastcl import functional as f

F64 = torch.float64


def _unit(x):
    return x / x.norm(dim=1, keepdim=True)


_k, _j = torch.arange(1, 13, dtype=F64), torch.arange(1, 16, dtype=F64)
A0 = torch.sin(_k).reshape(4, 3)
A = _unit(A0)
B = _unit(A0 + 0.5 * torch.cos(_k / 2).reshape(4, 3))
Q = _unit(torch.cos(_j / 3).reshape(5, 3))
Y = torch.tensor([0, 1, 0, 1])
VIEWS = torch.stack([A, B], 1)
# SimCSE: in-batch negatives plus four hard ones, as each query's own list
HARD = torch.cat([B, Q[:4]])
OWN = torch.stack([HARD[[j for j in range(8) if j != i]] for i in range(4)])
SAME, AXES = torch.ones(6, 4, dtype=F64), torch.eye(2, dtype=F64)
CLAMPED = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=F64)


def test_inputs():
    torch.testing.assert_close(
        A[0], torch.tensor([0.67483946, 0.72923464, 0.11317485], dtype=F64), rtol=0, atol=1e-8
    )
    torch.testing.assert_close(
        Q[0], torch.tensor([0.70384286, 0.58536121, 0.40243942], dtype=F64), rtol=0, atol=1e-8
    )


VALUES = {
    "InfoNCE": (lambda a, b: f.info_nce(a, b), 0.659508134847),
    "InfoNCE, own temperature": (lambda a, b: f.info_nce(a, b, temperature=0.5), 0.697021766442),
    "InfoNCE, shared negatives": (lambda a, b: f.info_nce(a, b, Q.to(a)), 0.804117796214),
    "MoCo 0.07": (lambda a, b: f.info_nce(a, b, Q.to(a), 0.07), 0.779116901835),
    "MoCo 0.2": (lambda a, b: f.info_nce(a, b, Q.to(a), 0.2), 0.857080516564),
    "SimCSE": (lambda a, b: f.info_nce(a, b, temperature=0.05), 0.726958124731),
    "SimCSE, hard": (lambda a, b: f.info_nce(a, b, OWN.to(a), 0.05), 1.128606323046),
    "PatchNCE": (lambda a, b: f.info_nce(a, b.detach(), temperature=0.07), 0.679811012581),
    "NT-Xent 0.5": (lambda a, b: f.nt_xent(a, b, 0.5), 1.087425336873),
    "NT-Xent 0.1": (lambda a, b: f.nt_xent(a, b, 0.1), 0.961055788859),
    "NT-Xent 0.07": (lambda a, b: f.nt_xent(a, b, 0.07), 0.944112675543),
    "CLIP": (lambda a, b: f.clip(a, b, 0.07), 0.658966024685),
    "CLIP, scale 100": (lambda a, b: f.clip(a, b, logit_scale=100.0), 1.815586079342),
    "SigLIP": (lambda a, b: f.siglip(a, b), 1.374854933893),
    "SigLIP, bias": (lambda a, b: f.siglip(a, b, bias=-2.71), 6.738679244360),
    "DCL": (lambda a, b: f.dcl(a, b, 0.1), 0.416783482168),
    "DCL, A only": (lambda a, b: f.dcl(a, b, 0.1, reduction="none")[:4].mean(), 0.622203260961),
    "DCL, B only": (lambda a, b: f.dcl(a, b, 0.1, reduction="none")[4:].mean(), 0.211363703376),
    "DCLW": (lambda a, b: f.dcl(a, b, 0.1, sigma=0.5), 0.428365178884),
    "debiased": (lambda a, b: f.debiased(a, b), 0.922479194821),
    "hard negatives": (lambda a, b: f.hard_negative(a, b), 1.847944416426),
    "hard negatives 0.5": (lambda a, b: f.hard_negative(a, b, beta=0.5), 1.644615405107),
    "SupCon": (lambda a, b: f.sup_con(torch.stack([a, b], 1), Y), 1.182669632557),
    "SupCon, in": (lambda a, b: f.sup_con(torch.stack([a, b], 1), Y, form="in"), 1.098612296418),
    "SupCon, unique": (
        lambda a, b: f.sup_con(torch.stack([a, b], 1), torch.arange(4)), 0.961055788859
    ),
    "SupCon, no labels": (lambda a, b: f.sup_con(torch.stack([a, b], 1)), 0.961055788859),
    "SupCon, lone anchors": (
        lambda a, b: f.sup_con(a, torch.tensor([0, 1, 1, 2])), 9.774448900424
    ),
    "NT-Xent of equal rows": (lambda a, b: f.nt_xent(SAME.to(a), SAME.to(a)), math.log(11)),
    "DCL of equal rows": (lambda a, b: f.dcl(SAME.to(a), SAME.to(a)), math.log(10)),
    "CLIP of equal rows": (lambda a, b: f.clip(SAME.to(a), SAME.to(a)), math.log(6)),
    "NT-Xent of axes": (lambda a, b: f.nt_xent(AXES.to(a), AXES.to(a), 0.5), 0.2395447662218846),
    "debiased, clamped": (lambda a, b: f.debiased(CLAMPED.to(a), CLAMPED.to(a)), 0.035976299748),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_value(name):
    function, expected = VALUES[name]
    assert float(function(A, B)) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert float(function(A.float(), B.float())) == pytest.approx(expected, rel=1e-5)


# |gradient| with respect to the unit rows of A; "inside" means through the normalisation
GRADIENTS = {
    "InfoNCE": (lambda a: f.info_nce(a, B), 1.077153584252),  # inside
    "NT-Xent": (lambda a: f.nt_xent(a[:4], a[4:], 0.5, normalize=False), 0.323642481027),
    "MoCo": (lambda a: f.info_nce(a, B, Q, 0.07, normalize=False), 1.800374294204),
    "CLIP": (lambda a: f.clip(a, B, 0.07, normalize=False), 1.498947624027),
    "SigLIP": (lambda a: f.siglip(a, B, normalize=False), 1.570320425385),
    "SupCon": (
        lambda a: f.sup_con(torch.stack([a, B], 1), Y, normalize=False), 0.551635120519
    ),
    "hard negatives": (lambda a: f.hard_negative(a, B, normalize=False), 0.433259595154),
    "DCL": (
        lambda a: f.dcl(a, B, 0.1, reduction="none", normalize=False)[:4].mean(), 3.605678724713
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_norm(name):
    function, expected = GRADIENTS[name]
    a = (torch.cat([A, B]) if name == "NT-Xent" else A).clone().requires_grad_()
    function(a).backward()
    assert float(a.grad.norm()) == pytest.approx(expected, rel=1e-10)


def test_gradient_rows():
    a = torch.cat([A, B]).requires_grad_()
    f.nt_xent(a[:4], a[4:], 0.5, normalize=False).backward()
    expected = [-0.115518720425, 0.034056204946, 0.077546491360]
    assert a.grad[0].tolist() == pytest.approx(expected, abs=1e-11)
    a, keys, queue = A.clone().requires_grad_(), B.clone(), Q.clone()
    f.info_nce(a, keys, queue, 0.07, normalize=False).backward()
    expected = [-0.032912246421, -0.104769348658, 0.356024009222]
    assert a.grad[0].tolist() == pytest.approx(expected, abs=1e-11)


def test_learnable_scale_and_bias():
    log_scale = torch.tensor(math.log(1 / 0.07), dtype=F64, requires_grad=True)
    f.clip(A, B, logit_scale=log_scale.exp()).backward()
    assert float(log_scale.grad) == pytest.approx(0.060381827490, rel=1e-9)
    log_scale = torch.tensor(math.log(10.0), dtype=F64, requires_grad=True)
    bias = torch.tensor(-10.0, dtype=F64, requires_grad=True)
    f.siglip(A, B, logit_scale=log_scale.exp(), bias=bias).backward()
    assert float(log_scale.grad) == pytest.approx(-2.020977894106, rel=1e-10)
    assert float(bias.grad) == pytest.approx(-0.209205937326, rel=1e-10)


def test_dcl_of_separated_rows_is_exact_and_negative():
    z = 8.0 * torch.eye(3, dtype=F64)
    expected = math.log(4) - 64 / 0.5  # four negatives of score 0
    assert float(f.dcl(z, z, 0.5, normalize=False)) == pytest.approx(expected, rel=1e-12)


def test_supcon_with_nothing_to_learn_is_zero_not_nan():
    a = A.clone().requires_grad_()
    loss = f.sup_con(a, torch.arange(4))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert (a.grad == 0).all()

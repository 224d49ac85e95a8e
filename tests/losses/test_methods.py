"""Sentences, captions, views, images, codes, labels, scores: known answers and what is special."""

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
A, B, Q, Y = known.A, known.B, known.Q, known.Y

F64 = torch.float64


def wide(*rows):
    return torch.tensor(rows, dtype=F64)


CODE = wide([0, 1]), wide([1, 0.5])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda: f.nce(wide(1, -0.5), wide([0.2, -1], [0.3, 0.8]), math.log(0.25)), 2.780939606855),
        (lambda: f.caption_contrastive(
            wide(-8, -10), wide(-9, -9.5), wide([-14, -13], [-12, -15]),
            wide([-12, -13.5], [-12.5, -13])), 1.194171833461),
        (lambda: f.sim_cse(A, B), 0.726958124731),
        (lambda: f.sim_cse(A, B, Q[:4]), 1.128606323046),
        (lambda: f.sim_cse(A, B, Q[:4], hard_negative_weight=1.0), 1.293496858508),
        (lambda: f.patch_nce(A, B), 0.679811012581),
        (lambda: f.conditional_contrastive(A, Y, B[:2]), 0.020293673080),
        (lambda: f.mib_compression(*CODE, wide([0.5, 1]), wide([1, 1])), 0.6875),
        (lambda: f.vib_compression(*CODE), 0.818147180560),
        (lambda: f.zlpr(wide([1, -1, 0.5]), torch.tensor([[1, 0, 1]])), 0.993531358160),
        (lambda: f.cmc([A, B], 0.07), 2 * 0.658966024685),
        # a domain against itself, its only positive kept out of the sum
        (lambda: f.domain_sup_con(A, B, torch.arange(4), torch.arange(4)), 0.659508134847),
    ],
)  # fmt: skip
def test_known_answers(loss, expected):
    assert float(loss()) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_nce_takes_the_noise_of_each_sample():
    positive, negative = torch.randn(5, dtype=F64), torch.randn(5, 3, dtype=F64)
    one, other = torch.randn(5, dtype=F64), torch.randn(5, 3, dtype=F64)
    ours = f.nce(positive, negative, one, other, reduction="none")
    s, t = positive - one - math.log(3), negative - other - math.log(3)
    theirs = -torch.sigmoid(s).log() - (1 - torch.sigmoid(t)).log().sum(1)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", ["softmax", "nce"])
def test_cmc_is_the_banks_where_the_banks_hold_the_batch(form):
    views = [torch.randn(6, 5, dtype=F64, requires_grad=True) for _ in range(3)]
    own = torch.arange(6)
    others = torch.stack([own[own != i] for i in range(6)])
    total = 0.0
    for a, b in ((a, b) for a in range(3) for b in range(3) if a != b):
        bank = fastcl.MemoryBank(6, 5, dtype=F64)
        bank.features.copy_(torch.nn.functional.normalize(views[b].detach()))
        total = total + f.memory_bank(
            views[a], own, bank, 0.3, form=form, negatives=others, eps=0.0
        )
    ours = f.cmc(views, 0.3, form=form)
    assert float(ours.detach()) == pytest.approx(float(total.detach()), rel=1e-10)


def test_sequences_are_summed_with_their_end_and_without_padding():
    logits, tokens = torch.randn(3, 5, 7, dtype=F64), torch.randint(0, 7, (3, 5))
    mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
    each = torch.log_softmax(logits, 2).gather(2, tokens[:, :, None])[:, :, 0]
    torch.testing.assert_close(f.sequence_log_prob(logits, tokens), each.sum(1))
    padded = torch.where(mask, tokens, -100)  # as loaders of text mark what is no token
    ours = f.sequence_log_prob(logits, padded, mask)
    torch.testing.assert_close(ours, torch.where(mask, each, 0.0).sum(1))
    # a confident model keeps its gradient, which a clipped probability would lose
    gap = torch.tensor([-500.0], dtype=F64, requires_grad=True)
    zero = torch.zeros(1, dtype=F64)
    f.caption_contrastive(gap, zero, zero, zero).backward()
    assert float(gap.grad) == -1.0


def test_sim_cse_metrics():
    q, k, h = torch.randn(3, 9, 4, dtype=F64)
    _, metrics = f.sim_cse(q, k, h, return_metrics=True)
    q, k, h = (torch.nn.functional.normalize(x) for x in (q, k, h))
    s, t = q @ k.T, q @ h.T
    own = torch.eye(9, dtype=torch.bool)
    right = s.diagonal() > torch.maximum(s.masked_fill(own, -9.0).amax(1), t.amax(1))
    torch.testing.assert_close(metrics["accuracy"], right.double().mean())
    negative = (s[~own].sum() + t.sum()) / (9 * 17)
    torch.testing.assert_close(metrics["negative_similarity"], negative)
    torch.testing.assert_close(metrics["positive_similarity"], s.diagonal().mean())


def test_patch_nce_leaves_keys_alone_and_tells_accuracy():
    q, k = (torch.randn(2, 9, 4, dtype=F64, requires_grad=True) for _ in range(2))
    loss, metrics = f.patch_nce(q, k, return_metrics=True)
    assert torch.autograd.grad(loss, k, allow_unused=True)[0] is None
    a, b = (torch.nn.functional.normalize(x.detach(), dim=2) for x in (q, k))
    right = (torch.einsum("bpd,bqd->bpq", a, b).argmax(2) == torch.arange(9)).double().mean()
    torch.testing.assert_close(metrics["accuracy"], right)


def test_beta_grows_exponentially_between_two_plateaus():
    values = [fastcl.losses.exponential_beta(i) for i in (0, 50_000, 100_000, 150_000, 10**6)]
    assert values == pytest.approx([1e-3, 1e-3, math.sqrt(1e-3), 1.0, 1.0])


@pytest.mark.parametrize(
    "score",
    [
        fastcl.Score(),
        fastcl.Score(normalize=True),
        fastcl.Score(torch.nn.Linear(5, 3, bias=False), normalize=False),
        fastcl.Score(torch.nn.Linear(5, 4), torch.nn.Linear(3, 4)),
    ],
    ids=["dot", "cosine", "bilinear", "asymmetric"],
)
def test_scores_stream_through_losses_as_explicit_logits(score):
    score = score.double()
    mapped = score.query_map is not None
    x, y = torch.randn(7, 5 if mapped else 3, dtype=F64), torch.randn(7, 3, dtype=F64)
    logits = torch.stack([score(x, y[[j] * 7]) for j in range(7)], 1)
    ours = f.info_nce(*score.sides(x, y), temperature=1.0, normalize=False)
    theirs = torch.nn.functional.cross_entropy(logits, torch.arange(7))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(score(x, y), logits.diagonal())
    if mapped:
        ours.backward()
        assert all(p.grad is not None for p in score.parameters())


def test_nothing_to_choose_from_costs_nothing():
    x = torch.randn(1, 4, dtype=F64)
    for loss in (
        f.cmc([x, 2 * x]),
        f.cmc([x, -x], form="nce"),
        f.sim_cse(x, -x),
        f.patch_nce(x, -x),
    ):
        assert float(loss) == 0.0


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: f.sim_cse(x, x),
        lambda x: f.sim_cse(x, 2 * x, -x),
        lambda x: f.cmc([x, 2 * x, -x]),
        lambda x: f.cmc([x, 2 * x], form="nce"),
        lambda x: f.patch_nce(x, x),
        lambda x: f.conditional_contrastive(x, torch.zeros(1).long(), x),
        lambda x: f.domain_sup_con(x, x, torch.zeros(1).long(), torch.zeros(1).long()),
        lambda x: f.domain_sup_con(x, x, torch.zeros(1).long(), torch.ones(1).long(), form="in"),
        lambda x: f.vib_compression(x, x.exp()),
        lambda x: f.zlpr(100 * x, torch.ones(1, 4).long()),
    ],
)
def test_batch_of_one(loss):
    x = torch.randn(1, 4, dtype=F64, requires_grad=True)
    value = loss(x)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, x)[0]).all()


@pytest.mark.parametrize("temperature", [0.005, 5.0])
def test_extreme_temperatures_are_finite(temperature):
    x, y, z = (torch.randn(9, 4, requires_grad=True) for _ in range(3))
    labels = torch.arange(9) % 3
    losses = [
        f.sim_cse(x, y, z, temperature),
        f.cmc([x, y, z], temperature),
        f.cmc([x, y, z], temperature, form="nce"),
        f.patch_nce(x, y, temperature),
        f.conditional_contrastive(x, labels, y[:3], temperature),
        f.domain_sup_con(x, y, labels, labels, temperature),
        f.cpc(x[:, None], y[:, None], temperature),
    ]
    for loss in losses:
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


class Codes(torch.nn.Module):
    """Gaussian codes of Gaussian inputs, for which I(x; z) has a closed form."""

    def __init__(self, width, codes):
        super().__init__()
        self.map = torch.nn.Linear(width, codes, bias=False, dtype=F64)
        self.log_std = torch.nn.Parameter(torch.zeros(codes, dtype=F64))

    def forward(self, x):
        mean = self.map(x)
        return mean, self.log_std.exp().expand_as(mean)

    def information(self, covariance):
        """I(x; z) = 1/2 ln det(1 + S^-2 W C W^T) in nats, whatever was trained."""
        weight = self.map.weight.detach() / self.log_std.detach().exp()[:, None]
        return 0.5 * torch.logdet(torch.eye(len(weight)) + weight @ covariance @ weight.T).item()


def trained_codes(compression, beta):
    """Two noisy views of a signal (of four inputs, two are noise alone); seed and steps fixed."""
    torch.manual_seed(0)
    codes = Codes(4, 2)
    judge = torch.nn.Linear(2, 2, dtype=F64)
    optimizer = torch.optim.Adam([*codes.parameters(), *judge.parameters()], lr=0.02)
    for _ in range(250):
        signal = torch.randn(128, 2, dtype=F64)
        first, second = (
            torch.cat([signal, torch.zeros_like(signal)], 1)
            + torch.randn(128, 4, dtype=F64) * torch.tensor([0.3, 0.3, 1.0, 1.0])
            for _ in range(2)
        )
        (mean1, std1), (mean2, std2) = codes(first), codes(second)
        z1, z2 = (m + s * torch.randn_like(m) for m, s in ((mean1, std1), (mean2, std2)))
        if compression == "vib":
            label = (signal[:, 0] > 0).long()
            loss = torch.nn.functional.cross_entropy(judge(z1), label)
            loss = loss + beta * f.vib_compression(mean1, std1)
        else:
            loss = f.info_nce(z1, z2, temperature=1.0, normalize=False)
            loss = loss + beta * f.mib_compression(mean1, std1, mean2, std2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return codes.information(torch.diag(torch.tensor([1.09, 1.09, 1.0, 1.0], dtype=F64)))


@pytest.mark.parametrize("compression", ["vib", "mib"])
def test_compression_lowers_what_codes_know_of_noisy_views(compression):
    free, some, much = (trained_codes(compression, beta) for beta in (0.0, 0.03, 1.0))
    assert free > some + 0.1 > much + 0.2 > 0.1


def test_generator_and_discriminator_take_finite_steps():
    """A toy CUT and a toy ContraGAN: gradients are finite and reach whom they should."""
    torch.manual_seed(0)
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    generator = torch.nn.Conv2d(1, 1, 3, padding=1)
    trunk = torch.nn.Conv2d(1, 8, 4, stride=4)
    judge, proxies = torch.nn.Linear(8, 1), torch.nn.Embedding(3, 8)
    theirs = [*trunk.parameters(), *judge.parameters(), *proxies.parameters()]

    def patches(x):
        return trunk(x).flatten(2).transpose(1, 2)

    made = generator(images)
    ours = f.patch_nce(patches(made), patches(images))
    ours = ours + f.conditional_contrastive(patches(made).mean(1), labels, proxies.weight)
    ours = ours - judge(patches(made).mean(1)).mean()
    steps = torch.autograd.grad(ours, tuple(generator.parameters()))
    real, fake = patches(images).mean(1), patches(made.detach()).mean(1)
    squares = (1 - judge(real)).square().mean() + (1 + judge(fake)).square().mean()
    against = squares + f.conditional_contrastive(real, labels, proxies.weight)
    steps += torch.autograd.grad(against, theirs)
    assert all(torch.isfinite(step).all() and step.abs().sum() > 0 for step in steps)

"""Pairs and triplets: known answers, nothing to learn, mining, memory."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl import functional as f
from fastcl import mining

_spec = importlib.util.spec_from_file_location("known", Path(__file__).with_name("known.py"))
known = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(known)
A0, B0, A, B, Q = known.A0, known.B0, known.A, known.B, known.Q

F64 = torch.float64
E, LABELS = torch.cat([A, B]), torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
SIMILAR = torch.tensor([1, 0, 1, 0])


def mined(mining, distance="squared"):
    return f.mined_triplet(E, LABELS, mining=mining, distance=distance)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda: f.pairwise_contrastive(A0, B0, SIMILAR), 0.107802452092),
        (lambda: f.pairwise_contrastive(A0, B0, SIMILAR, eps=1e-9), 0.107802451951),
        (lambda: f.pairwise_contrastive(A0, B0, SIMILAR, form="squared"), 0.222375593007),
        (lambda: f.triplet(A, B, Q[:4]), 0.084588782041),
        (lambda: f.triplet(A, B, Q[:4], distance=torch.pairwise_distance), 0.063601456561),
        (lambda: mined("batch_hard"), 4.078422473786),
        (lambda: mined("batch_hard", "euclidean"), 1.940291111195),
        (lambda: mined("batch_all"), 1.777881463701),
        (lambda: mined("batch_all", "euclidean"), 0.908277246301),
        (lambda: mined("semi_hard"), 0.158071973314),
        (lambda: mined("semi_hard", "euclidean"), 0.147978642662),
        (lambda: mined("semi_hard_all"), 0.130772379569),
        (lambda: mined("semi_hard_all", "euclidean"), 0.165984984913),
    ],
)
def test_known_answers(loss, expected):
    assert float(loss()) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_known_fractions_and_numbers():
    for mining_, distance, fraction, number in [
        ("batch_all", "squared", 0.80208, 77), ("batch_all", "euclidean", 0.78125, 75),
        ("semi_hard_all", "squared", 22 / 96, 22), ("semi_hard_all", "euclidean", 20 / 96, 20),
    ]:  # fmt: skip
        _, metrics = f.mined_triplet(
            E, LABELS, mining=mining_, distance=distance, return_metrics=True
        )
        assert float(metrics["active_fraction"]) == pytest.approx(fraction, abs=1e-5)
        assert float(metrics["triplets"]) == number
    _, metrics = f.triplet(A, B, Q[:4], return_metrics=True)
    active = ((A - B).square().sum(1) - (A - Q[:4]).square().sum(1) + 0.2 > 0).double().mean()
    assert float(metrics["active_fraction"]) == float(active)
    assert float(metrics["positive_distance"]) == pytest.approx(
        float((A - B).square().sum(1).mean())
    )


@pytest.mark.parametrize("mining_", fastcl.losses.triplets.MINING)
@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 1, 0, 1] * 2), torch.zeros(8).long(), torch.arange(8)],
    ids=["satisfied", "no negatives", "no positives"],
)
def test_nothing_to_learn_is_zero_not_nan(mining_, labels):
    rows = E.clone()
    if len(labels.unique()) == 2:  # as METHODS' second labels: all margins hold
        rows = torch.eye(4, dtype=F64)[labels] + 1e-3 * torch.randn(8, 4, dtype=F64)
    rows.requires_grad_()
    for distance in ("squared", "euclidean"):
        loss = f.mined_triplet(rows, labels, mining=mining_, distance=distance)
        (grad,) = torch.autograd.grad(loss, rows)
        assert float(loss.detach()) == 0.0
        assert (grad == 0).all()


def test_second_labels_of_the_known_answers_are_satisfied():
    labels = torch.tensor([0, 1, 0, 1] * 2)
    for mining_ in ("batch_all", "semi_hard", "semi_hard_all"):
        assert float(f.mined_triplet(E, labels, mining=mining_)) == 0.0


def test_semi_hard_negatives_are_strictly_farther():
    """A negative where the positive is counts as no farther; a margin below 0 leaves none."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.1]], dtype=F64)
    labels = torch.tensor([0, 0, 1, 2])
    _, metrics = f.mined_triplet(x, labels, mining="semi_hard_all", return_metrics=True)
    assert float(metrics["triplets"]) == 0.0
    nearest = f.mined_triplet(x, labels, 9.0, mining="semi_hard", reduction="none")
    d = torch.cdist(*[torch.nn.functional.normalize(x)] * 2).square()
    assert float(nearest[0]) == pytest.approx(float(d[0, 1] - d[0, 3] + 9.0))
    _, metrics = f.mined_triplet(E, LABELS, -0.1, mining="semi_hard_all", return_metrics=True)
    assert float(metrics["triplets"]) == 0.0


def test_coinciding_pairs_have_finite_gradients():
    x = torch.randn(4, 3, dtype=F64).repeat(2, 1).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    losses = [
        f.pairwise_contrastive(x[:4], x[4:], SIMILAR),
        f.triplet(x[:4], x[4:], x[:4], distance="euclidean", normalize=False),
        f.lifted_structure(x, labels),
        *(
            f.mined_triplet(x, labels, 5.0, mining=m, distance="euclidean")
            for m in fastcl.losses.triplets.MINING
        ),
    ]
    for loss in losses:
        assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


@pytest.mark.parametrize("name", ["lifted_structure", "multi_similarity"])
@pytest.mark.parametrize("labels", [torch.zeros(5).long(), torch.arange(5)], ids=str)
def test_one_sided_batches_are_finite(name, labels):
    x = torch.randn(5, 3, dtype=F64, requires_grad=True)
    loss = getattr(f, name)(x, labels)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_mining_finds_what_a_distance_matrix_would():
    x, labels = torch.randn(50, 4, dtype=F64), torch.randint(0, 6, (50,))
    labels[0] = 77
    d = torch.cdist(x, x)
    same = labels[:, None] == labels
    positive = same & ~torch.eye(50, dtype=torch.bool)
    positives, negatives = mining.batch_hard(x, labels)
    assert positives[0] == -1
    assert torch.equal(positives[1:], d.masked_fill(~positive, -1.0).argmax(1)[1:])
    assert torch.equal(negatives, d.masked_fill(same, 99.0).argmin(1))
    anchors, partners = positive.nonzero(as_tuple=True)
    chosen = mining.semi_hard(x, labels, anchors, partners)
    far, near = d[anchors], d[anchors, partners][:, None]
    farther = far.masked_fill(same[anchors] | (far <= near), 99.0)
    some = (farther < 99.0).any(1)
    fallback = far.masked_fill(same[anchors], -1.0).argmax(1)
    assert 0 < int(some.sum()) < len(some)
    assert torch.equal(chosen, torch.where(some, farther.argmin(1), fallback))
    loss = f.triplet(x[anchors], x[partners], x[chosen], distance="euclidean", normalize=False)
    theirs = f.mined_triplet(x, labels, mining="semi_hard", distance="euclidean", normalize=False)
    torch.testing.assert_close(loss, theirs)


@pytest.mark.parametrize("size", [2**17, 3 * 7])
def test_second_derivatives(size, monkeypatch):
    """In one block of anchors and in several."""
    monkeypatch.setattr(fastcl.losses.distances, "_BLOCK", {"cpu": size})
    x, labels = torch.randn(7, 3, dtype=F64, requires_grad=True), torch.arange(7) % 3
    for loss in (
        lambda x: f.lifted_structure(x, labels),
        lambda x: f.mined_triplet(x, labels, 5.0, mining="batch_all", distance="euclidean"),
    ):
        assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)
        (gradient,) = torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(torch.func.grad(loss)(x.detach()), gradient)


def test_several_blocks_compile_to_one_graph(monkeypatch):
    monkeypatch.setattr(fastcl.losses.distances, "_BLOCK", {"cpu": 20 * 7})
    x, labels = torch.randn(20, 3, requires_grad=True), torch.arange(20) % 4
    loss = fastcl.LiftedStructureLoss()
    ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, labels)
    theirs = loss(x, labels)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (ours, theirs)))


MEMORY = """
import resource, sys, torch, fastcl
torch.set_num_threads(1)
losses = [fastcl.MinedTripletLoss(mining=m) for m in ("batch_hard", "batch_all")]
losses += [fastcl.LiftedStructureLoss(), fastcl.MultiSimilarityLoss()]
def peak(n):
    x = torch.randn(n, 16, requires_grad=True)
    for loss in losses:
        loss(x, torch.arange(n) % (n // 4)).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = peak(512)
print(peak(int(sys.argv[1])) - small)
"""


def test_mining_holds_no_matrix():
    """Of 2048 rows it would be 16 MB in fp32 (of 8192, in `make test-mining-full`, 256 MB)."""
    n = int(os.environ.get("FASTCL_MINING_ROWS", "2048"))
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(n)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=590)
    assert int(out.stdout) * 1024 < 4 * n * n

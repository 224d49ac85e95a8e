"""The losses beyond two views: one table, each row against its plain float64 definition.

Values, gradients, reductions, weights, precisions, strides, copies and compilation are asked of
every row; what is particular to one loss stands in the file of its family.
"""

import copy
import importlib.util
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fastcl

_spec = importlib.util.spec_from_file_location("oracle", Path(__file__).parent / "oracle.py")
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

F64 = torch.float64
N, D = 22, 6
# four classes of several, one sample without a positive
LABELS = torch.tensor([0, 1, 2, 3] * 5 + [0, 9])
EVEN = LABELS % 2 == 0


@dataclass
class Row:
    """A module, the shapes of its float inputs, what else it takes, and its definition.

    The definition returns losses per sample, or their sums and how many tuples each sums.
    """

    module: Callable
    shapes: list
    definition: Callable
    extra: tuple = ()
    weighted: bool = True

    def inputs(self, dtype=F64, noise=0.7):
        """Rows near those of the first input, so that something is left to learn."""
        generator = torch.Generator().manual_seed(1)
        base = torch.randn(N, D, generator=generator, dtype=F64)
        found = []
        for i, shape in enumerate(self.shapes):
            new = torch.randn(shape, generator=generator, dtype=F64)
            if shape[0] == N and shape[-1] == D:
                middle = [1] * (len(shape) - 2)
                new = base.view(N, *middle, D) + noise * i * new
            found.append(new.to(dtype).requires_grad_())
        return found


ROWS = {
    "contrastive": Row(
        lambda **o: fastcl.PairwiseContrastiveLoss(2.0, **o), [(N, D)] * 2,
        lambda a, b: oracle.pairwise_contrastive(a, b, EVEN, 2.0), (EVEN,),
    ),
    "contrastive squared": Row(
        lambda **o: fastcl.PairwiseContrastiveLoss(2.0, form="squared", **o), [(N, D)] * 2,
        lambda a, b: oracle.pairwise_contrastive(a, b, EVEN, 2.0, "squared"), (EVEN,),
    ),
    "triplet": Row(fastcl.TripletLoss, [(N, D)] * 3, oracle.triplet),
    "triplet euclidean": Row(
        lambda **o: fastcl.TripletLoss(1.0, distance="euclidean", normalize=False, **o),
        [(N, D)] * 3, lambda a, p, n: oracle.triplet(a, p, n, 1.0, "euclidean", False),
    ),
    "triplet scores": Row(
        lambda **o: fastcl.TripletScoreLoss(0.5, **o), [(N,), (N, 3)],
        lambda p, n: (0.5 - oracle.up(p)[:, None] + oracle.up(n)).clamp(min=0).sum(1),
    ),
    "lifted": Row(
        fastcl.LiftedStructureLoss, [(N, D)], lambda x: oracle.lifted_structure(x, LABELS),
        (LABELS,),
    ),
    "multi-similarity": Row(
        fastcl.MultiSimilarityLoss, [(N, D)], lambda x: oracle.multi_similarity(x, LABELS),
        (LABELS,),
    ),
    "multi-similarity all": Row(
        lambda **o: fastcl.MultiSimilarityLoss(epsilon=None, **o), [(N, D)],
        lambda x: oracle.multi_similarity(x, LABELS, epsilon=None), (LABELS,),
    ),
    **{
        f"triplets {mining} {distance}": Row(
            lambda mining=mining, distance=distance, **o: fastcl.MinedTripletLoss(
                mining=mining, distance=distance, **o
            ),
            [(N, D)],
            lambda x, mining=mining, distance=distance: oracle.mined_triplet(
                x, LABELS, 0.2, mining, distance
            ),
            (LABELS,),
        )
        for mining in ("batch_hard", "batch_all", "semi_hard", "semi_hard_all")
        for distance in ("squared", "euclidean")
    },
}  # fmt: skip


def defined(row, inputs, weight=None):
    """Losses per sample, their sum and their mean."""
    found = row.definition(*inputs)
    sums, counts = found if isinstance(found, tuple) else (found, torch.ones_like(found))
    counts = counts.to(sums.dtype)
    weight = torch.ones_like(sums) if weight is None else weight
    sums = sums * weight
    mean = sums.sum() / (counts * weight).sum()
    return {"none": sums / counts.clamp(min=1), "sum": sums.sum(), "mean": mean}


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@pytest.mark.parametrize("name", ROWS)
def test_definition(name, monkeypatch):
    """Value, gradient, reductions and weights; in one block of anchors and in several."""
    row = ROWS[name]
    inputs = row.inputs()
    weights = [None]
    if row.weighted:
        weight = torch.rand(len(defined(row, inputs)["none"]), dtype=F64)
        weight[3] = 0.0
        weights.append(weight)
    for block in (2**19, 5 * N):
        monkeypatch.setattr(fastcl.losses.distances, "_BLOCK", {"cpu": block})
        for weight in weights:
            options = {} if weight is None else {"weight": weight}
            for reduction, theirs in defined(row, inputs, weight).items():
                ours = row.module(reduction=reduction)(*inputs, *row.extra, **options)
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
                pairs = zip(
                    gradients(ours.square().sum(), inputs),
                    gradients(theirs.square().sum(), inputs), strict=True,
                )  # fmt: skip
                for a, b in pairs:
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    if row.weighted:
        nothing = row.module()(*inputs, *row.extra, weight=0 * weight)
        assert float(nothing.detach()) == 0.0


@pytest.mark.parametrize("name", ROWS)
def test_gradcheck(name):
    row = ROWS[name]
    inputs = row.inputs()
    assert torch.autograd.gradcheck(lambda *x: row.module()(*x, *row.extra), inputs, fast_mode=True)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise", [0.05, 30.0])
def test_precision(name, dtype, noise):
    """At most twice plain PyTorch's error in the same dtype, plus round-off; strided inputs."""
    row = ROWS[name]
    inputs = [x.detach() for x in row.inputs(dtype, noise)]
    inputs = [x.mT.contiguous().mT if x.dim() > 1 else x for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    loss = row.module()(*inputs, *row.extra)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = defined(row, exact_inputs)["mean"]
    with oracle.in_precision(dtype):
        plain = defined(row, inputs)["mean"]
    round_off = 40 * torch.finfo(torch.float32).eps + 0.1 * torch.finfo(dtype).eps
    assert_no_worse(loss, plain, exact, round_off)
    usual = gradients(plain, inputs)
    for triple in zip(gradients(loss, inputs), usual, gradients(exact, exact_inputs), strict=True):
        assert triple[0].dtype == dtype
        assert torch.isfinite(triple[0]).all()
        assert_no_worse(*triple, 10 * round_off + 2 * torch.finfo(dtype).eps)


def assert_no_worse(ours, plain, exact, round_off):
    exact = exact.detach()
    error, usual = ((x.detach().double() - exact).norm() for x in (ours, plain))
    usual = usual if torch.isfinite(usual) else torch.tensor(0.0)
    tiny = torch.finfo(torch.float32).smallest_normal * math.sqrt(exact.numel())
    assert float(error) <= 2 * float(usual) + round_off * (float(exact.norm()) + tiny)


@pytest.mark.parametrize("name", ROWS)
def test_module_travels_and_compiles_to_one_graph(name):
    row = ROWS[name]
    inputs = row.inputs(torch.float32)
    module = row.module()
    expected = module(*inputs, *row.extra)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*inputs, *row.extra), expected)
    assert "reduction='mean'" in repr(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs, *row.extra)
    torch.testing.assert_close(compiled, expected)
    pairs = zip(gradients(compiled, inputs), gradients(expected, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)

"""The sm_90a kernels on the emulated machine, against float64.

What this leaves to a GPU is the instructions themselves: the emulated tensor cores and copy engine
(tests/cuda/emulation_hopper.h) follow their documentation, at the worst moments it allows.
"""

import pytest
import torch
import torch.nn.functional as F

from fastcl.ops import Backend, hopper, register, similarity_logsumexp, use_backend
from fastcl.ops.registry import unregister
from fastcl.testing import Shape, compare

from .launchers import LogSumExp, Machine, Mean, Pairing, Product, Rows

DTYPES = (torch.bfloat16, torch.float16)


class Problem:
    """Two sides, their rule, and the truth in float64."""

    def __init__(self, n, m, d, dtype, temperature, skip, unit=True):
        generator = torch.Generator().manual_seed(n * 31 + d)

        def rows(count):
            x = torch.randn(count, d, generator=generator)
            return (F.normalize(x) if unit else x).to(dtype)

        self.queries, self.symmetric = rows(n), m is None
        self.keys = self.queries if m is None else rows(m)
        self.scale, self.skip = torch.tensor(1 / temperature), skip
        self.gradients = [
            torch.randn(len(x), generator=generator) for x in (self.queries, self.keys)
        ]

    def scores(self, queries, keys):
        apart = torch.arange(len(keys)) - torch.arange(len(queries))[:, None]
        out = torch.isin(apart, torch.tensor(self.skip, dtype=apart.dtype))
        return (queries @ keys.T * self.scale.double()).masked_fill(out, float("-inf"))

    def truth(self):
        scores = self.scores(self.queries.double(), self.keys.double())
        return scores.logsumexp(1), scores.logsumexp(0), scores.softmax(1) @ self.keys.double()

    def true_gradients(self, of_rows, of_columns):
        queries = self.queries.double().requires_grad_()
        keys = queries if self.symmetric else self.keys.double().requires_grad_()
        scores = self.scores(queries, keys)
        total = sum(
            (scores.logsumexp(dim).nan_to_num(neginf=0.0) * gradient.double()).sum()
            for dim, gradient, wanted in zip(
                (1, 0), self.gradients, (of_rows, of_columns), strict=True
            )
            if wanted
        )
        return torch.autograd.grad(total, [queries] if self.symmetric else [queries, keys])

    def logsumexp(self, machine, columns=False):
        keys = None if self.symmetric else self.keys
        return machine.logsumexp(self.queries, keys, self.scale, self.skip, columns)

    def products(self, machine, rows, columns, offset):
        """Gradients of the queries and, where they differ, of the keys, given log-sum-exps; of
        those of columns none where they are empty."""
        queries, keys, of_rows = self.queries, self.keys, (self.gradients[0], rows, len(rows))
        has_columns = len(columns) > 0
        of_columns = (self.gradients[1], columns) if has_columns else (None, None)
        own, other, unit = machine.gains(*of_rows, *of_columns, len(keys), self.scale, offset)
        if self.symmetric:
            other = own
        common = offset, unit[1]
        of_queries = machine.product(queries, keys, self.scale, self.skip, own, other, *common)
        if self.symmetric:
            return (of_queries,)
        back = [-s for s in self.skip]
        return of_queries, machine.product(keys, queries, self.scale, back, other, own, *common)


def check_sums(result, truth, scale):
    """Scores carry round-off in proportion to their size, and exponentials pass it on."""
    finite = truth.isfinite()
    assert torch.equal(result[~finite].double(), truth[~finite])
    error = (result - truth)[finite].abs()
    assert error.numel() == 0 or error.max() < 2.0**-23 * max(8.0, 4.0 * float(scale))


def check_products(result, truth, dtype):
    """Weights are rounded once to the rows' dtype, with errors of either sign."""
    assert (result - truth).norm() <= 0.5 * torch.finfo(dtype).eps * truth.norm()
    assert (result - truth).abs().max() <= torch.finfo(dtype).eps * truth.abs().max()


# n, m (None: symmetric), d, dtype, temperature, skip, both sides' gradients, multiprocessors, why
CASES = (
    (300, 257, 64, torch.bfloat16, 0.1, [0], True, 3, "ragged on both sides; D in one panel"),
    (300, 700, 128, torch.float16, 0.07, [], False, 5, "rows only; blocks shared by workers"),
    (140, 200, 256, torch.bfloat16, 0.1, [0], True, 2, "D of four panels"),
    (65, 130, 200, torch.float16, 0.1, [5], True, 1, "D that ends within a panel; one worker"),
    (530, 380, 256, torch.bfloat16, 0.1, [0], True, 1, "a single own buffer, filled three times"),
    (520, 40, 72, torch.float16, 0.5, [3, -2], True, 2, "few other rows; two offsets"),
    (
        1040,
        130,
        8,
        torch.bfloat16,
        0.1,
        [0],
        True,
        2,
        "more blocks than workers: slots are added to",
    ),
    (700, None, 64, torch.bfloat16, 0.1, [0, 350, -350], True, 4, "round robin of an odd number"),
    (1030, None, 16, torch.float16, 0.05, [0], True, 3, "and of an odd number, slots per worker"),
    (
        800,
        None,
        16,
        torch.bfloat16,
        0.02,
        [0],
        True,
        7,
        "of an even one; an offset",
    ),
    (1900, None, 8, torch.bfloat16, 0.1, [0], True, 2, "of an even one, slots added to"),
    (2, None, 8, torch.float16, 0.1, [0], True, 9, "one meeting"),
    (1, 1, 8, torch.bfloat16, 0.1, [0], True, 2, "nothing but a pair that is left out"),
    (120, 150, 128, torch.float16, 0.003, [0], True, 3, "sums leave the offset's range"),
    (130, None, 64, torch.bfloat16, 0.003, [0], True, 3, "likewise, symmetric"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[-1])
def test_float64(case, emulated):
    n, m, d, dtype, temperature, skip, both, processors, _ = case
    problem = Problem(n, m, d, dtype, temperature, skip)
    machine = Machine(emulated, processors, seed=n)
    rows, columns, offset = problem.logsumexp(machine, columns=both and m is not None)
    true_rows, true_columns, _ = problem.truth()
    check_sums(rows, true_rows, problem.scale)
    if len(columns):
        check_sums(columns, true_columns, problem.scale)
    assert bool(offset.isnan()) == (temperature < 0.01 or not rows.isfinite().all())
    results = problem.products(machine, rows, columns, offset)
    truths = problem.true_gradients(True, len(columns) > 0)
    for result, truth in zip(results, truths, strict=True):
        check_products(result, truth, dtype)


# d; buffers of own and of other rows; of a product, other rows of a tile and their buffers
RINGS = ((64, 2, 8, 128, 6), (128, 2, 5, 128, 4), (256, 1, 3, 64, 4))


@pytest.mark.parametrize(("d", "own", "other", "tile", "tiles"), RINGS)
def test_descriptors_are_those_of_cutlass(d, own, other, tile, tiles, emulated):
    """What tensor cores are told of operands in shared memory, against code that runs on Hopper:
    the emulated ones read a descriptor as the kernels' author did.

    The numbers are cute::make_gmma_desc's and DescriptorIterator's, evaluated on the host (CUTLASS
    4.2.0 and 4.7.0, include/cute/atom/mma_traits_sm90_gmma.hpp), for matrices of bfloat16 in
    Layout_K_SW128_Atom and, by columns, the same memory in Layout_MN_SW128_Atom. Triton 3.6 and
    3.9 write them too, but 0 for the leading offset by rows, which this swizzle does not use.
    """

    def by_rows(begin, buffers, rows, parts=1):
        size = 128 * rows
        starts = [
            begin + d // 64 * size * b + size // parts * part
            for b in range(buffers) for part in range(parts)
        ]  # fmt: skip
        return {
            0x4000004000010000 + (start + size * panel) // 16 + step
            for start in starts for panel in range(d // 64) for step in (0, 2, 4, 6)
        }  # fmt: skip

    def by_columns(begin, buffers, rows):
        first = {64: 0x4000004002000000, 128: 0x4000004004000000}[rows]
        starts = [begin + 2 * d * rows * b for b in range(buffers)]
        return {first + start // 16 + 128 * step for start in starts for step in range(rows // 16)}

    problem = Problem(300, 520, d, torch.bfloat16, 0.1, [])  # every buffer is used
    machine = Machine(emulated, 1)
    machine.operands()
    sums, _, offset = problem.logsumexp(machine)
    assert machine.operands() == [
        by_rows(512 * d * own, other, 64), by_rows(0, own, 256, parts=2), set()
    ]  # fmt: skip
    gains = machine.gains(torch.ones(300), sums, 300, None, None, 520, problem.scale, offset)
    common = problem.scale, [], *gains[:2], offset, gains[2][1]
    machine.product(problem.queries, problem.keys, *common)
    *found, columns = machine.operands()
    begin = 256 * d * own
    assert found == [by_rows(0, own, 128, parts=2), by_rows(begin, tiles, tile)]
    used = ~(0x3FFF << 16 if d == 64 else 0)  # CUTLASS gives 0 where there is no next panel
    assert {x & used for x in columns} == {x & used for x in by_columns(begin, tiles, tile)}


@pytest.mark.parametrize(
    ("n", "m", "d", "temperature", "skip", "processors"),
    [(100, 700, 128, 0.1, [], 3), (300, 400, 64, 0.01, [1], 9), (130, 200, 256, 0.003, [0], 2)],
    ids=["a queue, shared by workers", "more workers than tiles", "sums leave the offset's range"],
)
def test_mean(n, m, d, temperature, skip, processors, emulated):
    problem = Problem(n, m, d, torch.bfloat16, temperature, skip)
    rows, mean, offset = Machine(emulated, processors).mean(
        problem.queries, problem.keys, problem.scale, problem.skip
    )
    true_rows, _, true_mean = problem.truth()
    check_sums(rows, true_rows, problem.scale)
    check_products(mean, true_mean, torch.bfloat16)
    assert bool(offset.isnan()) == (temperature < 0.01 or not rows.isfinite().all())


def test_lengths_apart_from_one(emulated):
    """Rows that are not normalised: some sums overflow under the offset, others do not."""
    problem = Problem(90, 170, 32, torch.float16, 0.5, [], unit=False)
    problem.queries[:7] *= 30
    machine = Machine(emulated, 2)
    rows, columns, offset = problem.logsumexp(machine, columns=True)
    assert offset.isnan()
    for result, truth in zip((rows, columns), problem.truth()[:2], strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)


def test_what_is_not_a_number_stays_so(emulated):
    """One broken entry: never an empty sum, which would pass unseen, and no other row's concern."""
    problem = Problem(70, 90, 16, torch.bfloat16, 0.1, [])
    for entry in (float("nan"), float("inf")):
        problem.queries[5, 3] = entry
        machine = Machine(emulated, 2)
        rows, columns, offset = problem.logsumexp(machine, columns=True)
        mean_rows, mean, _ = machine.mean(problem.queries, problem.keys, problem.scale, [])
        others = torch.arange(70) != 5
        for sums in (rows, mean_rows):
            assert sums[5].isnan()
            check_sums(sums[others], problem.truth()[0][others], problem.scale)
        assert mean[5].isnan().all()
        assert mean[others].isfinite().all()
        assert not columns.isneginf().any()
        gradients = problem.products(machine, rows, columns, offset)
        assert all(gradient[5].isnan().any() for gradient in gradients[:1])


def test_any_order_of_events_gives_the_same_bits(emulated):
    """Threads, copies and products in other orders: one result, and none that is not a number."""
    problem = Problem(600, None, 136, torch.bfloat16, 0.1, [0])
    results = []
    for seed in range(6):
        machine = Machine(emulated, 3, seed)
        rows, columns, offset = problem.logsumexp(machine)
        results.append([rows, *problem.products(machine, rows, columns, offset)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_use_their_range(dtype, emulated):
    """Gradients as small as a mean over many rows gives, and certain pairs in both directions,
    whose weights add: neither vanishes nor overflows in 16 bits."""
    problem = Problem(64, 64, 16, dtype, 0.05, [])
    problem.keys.copy_(F.one_hot(torch.arange(64) % 16, 16))
    problem.queries.copy_(problem.keys)
    for size in (1.999, 3e-9):
        problem.gradients = [torch.full((64,), size)] * 2
        machine = Machine(emulated, 2)
        results = problem.products(machine, *problem.logsumexp(machine, columns=True))
        truths = problem.true_gradients(True, True)
        for result, truth in zip(results, truths, strict=True):
            check_products(result, truth, dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"d": 12}, b"features must be a multiple of 8, 256 at most"),
        ({"d": 264}, b"features must be a multiple of 8, 256 at most"),
        ({"type": 0}, b"rows must be bfloat16 or float16"),
        ({"skips": 4}, b"at most 3 offsets can be skipped"),
        ({"own": Rows(8, 4, 16)}, b"multiple of 16 bytes"),
        ({"other": Rows(16, 4, 20)}, b"multiple of 16 bytes"),
        ({"other": Rows(16, 0, 16)}, b"must number 1 to 2^24"),
    ],
    ids=["odd width", "wide", "type", "skips", "own stride", "other stride", "no rows"],
)
def test_refusals(change, reason, emulated):
    """A launcher says why it does not serve a problem, before it touches the device."""
    machine = Machine(emulated, 2)
    problem = Problem(4, 5, 16, torch.bfloat16, 0.1, [])
    pairing = Pairing.of(problem.queries, problem.keys, problem.scale, problem.skip)
    for name, value in change.items():
        setattr(pairing, name, value)
    for name, call in (
        ("logsumexp", LogSumExp(pairing)), ("product", Product(pairing)), ("mean", Mean(pairing))
    ):  # fmt: skip
        assert reason in machine.call(name, call)


@pytest.fixture
def operators(emulated):
    """A backend "emulated" that is fastcl/ops/hopper.py over the emulated machine."""
    machine = Machine(emulated, 3)
    library = torch.library.Library("fastcl", "IMPL")
    for name in ("logsumexp", "gains", "product", "mean"):
        library.impl(f"_cuda_{name}", getattr(machine, name), "CPU")
    register(
        Backend(
            "emulated", hopper, ops=("similarity_logsumexp",), devices=("cpu",), precisions=DTYPES,
            partial=True, keeps_exponentials=lambda *_: False,
        )
    )  # fmt: skip
    yield
    unregister("emulated")
    library._destroy()


OPERATOR_CASES = (
    ("columns", Shape(129, 70, 17, "a width that is padded"), "aligned", "offsets", 0.07),
    ("logsumexp", Shape(140, None, 40, "symmetric"), "random", "offsets", 0.1),
    ("logsumexp", Shape(70, 50, 300, "too wide, and declined"), "random", "all", 0.1),
    ("columns", Shape(70, 50, 8, "a rule on ids, and declined"), "random", "different", 0.1),
    ("queue", Shape(100, 300, 24, "keys without a gradient"), "random", "all", 0.05),
    ("queue", Shape(30, 90, 64, "sums that leave the range"), "outlier", "all", 0.05),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OPERATOR_CASES, ids=lambda case: case[1].why)
def test_operators(case, dtype, operators):
    """What is around the kernels: padding, forms of the gradient, those of scale and keys."""
    operation, shape, data, rule, temperature = case
    verdict = compare("emulated", operation, shape, data, rule, temperature, dtype)
    assert verdict.passed, verdict


def test_operators_take_rows_as_they_lie(operators):
    """Strided, misaligned and fp32 rows, without columns, gradients of some inputs only."""
    generator = torch.Generator().manual_seed(0)
    wide = F.normalize(torch.randn(60, 33, generator=generator)).bfloat16()
    keys = F.normalize(torch.randn(70, 32, generator=generator))
    for queries in (wide[:, 1:], wide[::2, :32], wide[:1, :32].expand(4, 32), wide[:32].T):
        k = keys[:, : queries.shape[1]].clone().requires_grad_()
        q, scale = queries.double(), torch.tensor(9.0, requires_grad=True)
        with use_backend("emulated"):
            result = similarity_logsumexp(queries, k, scale, precision=torch.bfloat16).rows
        truth = (q @ k.bfloat16().double().T * 9).logsumexp(1)
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)
        with use_backend("emulated"):
            gradient, slope = torch.autograd.grad(result.sum(), [k, scale])
        weights = (q @ k.detach().bfloat16().double().T * 9).softmax(1)
        check_products(gradient, 9 * weights.T @ q, torch.bfloat16)
        expected = (weights * (q @ k.detach().bfloat16().double().T)).sum()
        torch.testing.assert_close(slope.double(), expected, rtol=1e-2, atol=1e-2)

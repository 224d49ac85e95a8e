"""The sm_90a kernels on the emulated machine, against float64.

What this leaves to a GPU is the instructions themselves: the emulated tensor cores and copy engine
(tests/cuda/emulation_hopper.h) follow their documentation, at the worst moments it allows.
"""

import ctypes

import pytest
import torch
import torch.nn.functional as F

TYPES = {torch.bfloat16: 1, torch.float16: 2}
SOURCES = ("logsumexp_sm90a", "product_sm90a", "finish", "gains")
SHARED = 227 * 1024
P = ctypes.c_void_p


class Rows(ctypes.Structure):
    """``fastcl::cuda::Rows`` of csrc/cuda/pairing.h, as the others below of their headers."""

    _fields_ = (("data", P), ("count", ctypes.c_int64), ("stride", ctypes.c_int64))


class Pairing(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int), ("own", Rows), ("other", Rows), ("d", ctypes.c_int64),
        ("scale", P), ("skip", ctypes.c_int64 * 3), ("skips", ctypes.c_int),
    )  # fmt: skip


class LogSumExp(ctypes.Structure):
    _fields_ = (
        ("pairing", Pairing), ("symmetric", ctypes.c_bool), ("workspace", P), ("rows", P),
        ("columns", P), ("offset", P),
    )  # fmt: skip


class Side(ctypes.Structure):
    _fields_ = (
        ("gradient", P), ("logsum", P), ("count", ctypes.c_int64), ("gain", P), ("shift", P),
        ("ratio", P),
    )  # fmt: skip


class Gains(ctypes.Structure):
    _fields_ = (("sides", Side * 2), ("scale", P), ("offset", P), ("unit", P))


class Product(ctypes.Structure):
    _fields_ = (
        ("pairing", Pairing), ("own", Side), ("other", Side), ("offset", P), ("factor", P),
        ("workspace", P), ("out", P),
    )  # fmt: skip


class Mean(ctypes.Structure):
    _fields_ = (("pairing", Pairing), ("workspace", P), ("logsum", P), ("mean", P), ("offset", P))


class Machine:
    """The launchers, on an emulated device."""

    def __init__(self, emulated, processors, seed=0):
        self.library = emulated(*SOURCES)
        self.library.fastcl_emulate(processors, 1, SHARED, seed)

    def call(self, name, argument, stream=True):
        """``fastcl::cuda::name(const Argument&, void* stream)``, by its mangled name."""
        kind = type(argument).__name__
        mangled = f"_ZN6fastcl4cuda{len(name)}{name}ERKNS0_{len(kind)}{kind}E" + "Pv" * stream
        function = getattr(self.library, mangled)
        function.restype = ctypes.c_char_p if stream else ctypes.c_int64
        return function(ctypes.byref(argument), *[None] * stream)

    def run(self, name, argument):
        assert self.call(name, argument) is None

    def workspace(self, name, argument):
        return unset(self.call(f"{name}_workspace", argument, stream=False))


def unset(*shape):
    """What no kernel has written to is not a number."""
    return torch.full(shape, float("nan"))


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

    def pairing(self, flip=False):
        own, other = (self.keys, self.queries) if flip else (self.queries, self.keys)
        sides = [Rows(x.data_ptr(), len(x), x.stride(0)) for x in (own, other)]
        skip = [-s if flip else s for s in self.skip] + [0] * (3 - len(self.skip))
        return Pairing(
            TYPES[own.dtype], *sides, own.shape[1], self.scale.data_ptr(),
            (ctypes.c_int64 * 3)(*skip), len(self.skip),
        )  # fmt: skip

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
        rows, offset = unset(len(self.queries)), unset()
        column_sums = unset(len(self.keys)) if columns else None
        call = LogSumExp(
            self.pairing(), self.symmetric, None, rows.data_ptr(),
            column_sums.data_ptr() if columns else None, offset.data_ptr(),
        )  # fmt: skip
        workspace = machine.workspace("logsumexp", call)
        call.workspace = workspace.data_ptr()
        machine.run("logsumexp", call)
        return rows, column_sums, offset

    def products(self, machine, rows, columns, offset):
        """Gradients of the queries and of the keys, given the log-sum-exps that have a gradient."""
        kept = []

        def side(gradient, logsum):
            kept.append(unset(3, -(-len(gradient) // 128) * 128))
            inputs = [None if logsum is None else x.data_ptr() for x in (gradient, logsum)]
            return Side(*inputs, len(gradient), *(x.data_ptr() for x in kept[-1]))

        own = side(self.gradients[0], rows)
        other = own if self.symmetric else side(self.gradients[1], columns)
        unit = unset(2)
        both = (Side * 2)(own, Side() if self.symmetric else other)
        pointers = self.scale.data_ptr(), offset.data_ptr(), unit.data_ptr()
        machine.run("gains", Gains(both, *pointers))
        results = []
        for flip in (False,) if self.symmetric else (False, True):
            pairing, x = self.pairing(flip), self.keys if flip else self.queries
            workspace, out = machine.workspace("product", pairing), unset(*x.shape)
            sides = (other, own) if flip else (own, other)
            factor = unit[1:].data_ptr()
            call = Product(
                pairing, *sides, offset.data_ptr(), factor, workspace.data_ptr(), out.data_ptr()
            )
            machine.run("product", call)
            results.append(out)
        return results

    def mean(self, machine):
        pairing = self.pairing()
        workspace = machine.workspace("mean", pairing)
        rows, mean, offset = unset(len(self.queries)), unset(*self.queries.shape), unset()
        outputs = (x.data_ptr() for x in (workspace, rows, mean, offset))
        machine.run("mean", Mean(pairing, *outputs))
        return rows, mean, offset


def check_sums(result, truth, scale):
    """Scores carry round-off in proportion to their size, and exponentials pass it on."""
    finite = truth.isfinite()
    assert torch.equal(result[~finite].double(), truth[~finite])
    error = (result - truth)[finite].abs()
    assert error.numel() == 0 or error.max() < 2.0**-23 * max(8.0, 4.0 * float(scale))


def check_products(result, truth, dtype):
    """Weights are rounded once to the rows' dtype, with errors of either sign."""
    assert (result - truth).norm() < 0.5 * torch.finfo(dtype).eps * truth.norm()
    assert (result - truth).abs().max() < torch.finfo(dtype).eps * truth.abs().max()


# n, m (None: symmetric), d, dtype, temperature, skip, both sides' gradients, multiprocessors, why
CASES = (
    (300, 257, 64, torch.bfloat16, 0.1, [0], True, 3, "ragged on both sides; D in one panel"),
    (300, 700, 128, torch.float16, 0.07, [], False, 5, "rows only; blocks shared by workers"),
    (140, 200, 256, torch.bfloat16, 0.1, [0], True, 2, "D of four panels, a single own buffer"),
    (65, 130, 200, torch.float16, 0.1, [5], True, 1, "D that ends within a panel; one worker"),
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
        "of an even one; an offset in the exponents",
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
    if columns is not None:
        check_sums(columns, true_columns, problem.scale)
    assert bool(offset.isnan()) == (temperature < 0.01 or not rows.isfinite().all())
    results = problem.products(machine, rows, columns, offset)
    truths = problem.true_gradients(True, columns is not None)
    for result, truth in zip(results, truths, strict=True):
        check_products(result, truth, dtype)


@pytest.mark.parametrize(
    ("n", "m", "d", "temperature", "skip", "processors"),
    [(100, 700, 128, 0.1, [], 3), (300, 400, 64, 0.01, [1], 9), (130, 200, 256, 0.003, [0], 2)],
    ids=["a queue, shared by workers", "more workers than tiles", "sums leave the offset's range"],
)
def test_mean(n, m, d, temperature, skip, processors, emulated):
    problem = Problem(n, m, d, torch.bfloat16, temperature, skip)
    rows, mean, offset = problem.mean(Machine(emulated, processors))
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


@pytest.mark.parametrize("dtype", TYPES, ids=str)
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
        ({"other": Rows(16, 0, 16)}, b"must number 1 to 2^30"),
    ],
    ids=str,
)
def test_refusals(change, reason, emulated):
    """A launcher says why it does not serve a problem, before it touches the device."""
    machine = Machine(emulated, 2)
    pairing = Problem(4, 5, 16, torch.bfloat16, 0.1, []).pairing()
    for name, value in change.items():
        setattr(pairing, name, value)
    for name, call in (
        ("logsumexp", LogSumExp(pairing)), ("product", Product(pairing)), ("mean", Mean(pairing))
    ):  # fmt: skip
        assert reason in machine.call(name, call)

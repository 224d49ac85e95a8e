"""The whole loss in one launch, on the emulated machine, as a backend like any other."""

import ctypes
import itertools

import pytest
import torch

from fastcl import testing
from fastcl.ops import reference, registry, small_batch
from fastcl.testing import DATA, SOFTMAX, Shape

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPES = {F32: 0, BF16: 1, F16: 2}
FORMS = {"views": 0, "rows": 1, "both": 2}
KB = 1024
LARGE = (
    24,
    1,
    227 * KB,
    0,
)  # multiprocessors, blocks on each, shared memory, seed: see conftest.py


class SmallBatch(ctypes.Structure):
    """``fastcl::cuda::SmallBatch`` of csrc/cuda/small_batch.h."""

    _fields_ = (
        ("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("a_type", ctypes.c_int),
        ("b_type", ctypes.c_int), ("a_stride", ctypes.c_int64), ("b_stride", ctypes.c_int64),
        ("n", ctypes.c_int64), ("d", ctypes.c_int64), ("precision", ctypes.c_int),
        ("form", ctypes.c_int), ("mean", ctypes.c_bool), ("eps", ctypes.c_float),
        ("scale", ctypes.c_void_p), ("loss", ctypes.c_void_p), ("grad_a", ctypes.c_void_p),
        ("grad_b", ctypes.c_void_p), ("grad_scale", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )  # fmt: skip


class Emulated:
    """A backend's implementation: the kernel on ``machine``."""

    def __init__(self, library):
        self.machine = LARGE
        self.emulate = library.fastcl_emulate
        self.launch = library._ZN6fastcl4cuda11small_batchERKNS0_10SmallBatchEPv
        self.launch.restype = ctypes.c_char_p
        self.workspace = library._ZN6fastcl4cuda21small_batch_workspaceEllNS0_10SmallBatch4FormE
        self.workspace.restype = ctypes.c_size_t
        self.workspace.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int)

    def pair_softmax(self, a, b, scale, form, mean, eps, needs, precision):
        n, d = a.shape
        self.emulate(*self.machine)
        loss, grad_a, grad_b, grad_scale = torch.empty(()), *torch.empty(2, n, d), torch.empty(())
        floats = self.workspace(n, d, FORMS[form]) // 4
        workspace = torch.empty(floats + 64)
        workspace[floats:] = 7.0
        wanted = [x.data_ptr() if n else None for x, n in
                  zip((grad_a, grad_b, grad_scale), needs, strict=True)]  # fmt: skip
        call = SmallBatch(
            a.data_ptr(), b.data_ptr(), TYPES[a.dtype], TYPES[b.dtype], a.stride(0), b.stride(0),
            n, d, TYPES[precision], FORMS[form], mean, eps, scale.data_ptr(), loss.data_ptr(),
            *wanted, workspace.data_ptr(),
        )  # fmt: skip
        error = self.launch(ctypes.byref(call), None)
        if error is not None:
            raise RuntimeError(error.decode())
        assert bool((workspace[floats:] == 7.0).all())
        gradients = (grad_a, grad_b, grad_scale)
        assert all(bool(x.isnan().all()) for x, n in zip(gradients, needs, strict=True) if not n)
        return loss, *(x if n else x.new_empty(0) for x, n in zip(gradients, needs, strict=True))


@pytest.fixture
def kernel(emulated):
    implementation = Emulated(emulated("small_batch"))
    registry.register(
        registry.Backend(
            "emulated", implementation, ops=("pair_softmax",), devices=("cpu",),
            precisions=tuple(TYPES),
        )
    )  # fmt: skip
    yield implementation
    registry.unregister("emulated")


def accept(form, n, d, dtype, data="random", temperature=0.1):
    verdict = testing.compare(
        "emulated", form, Shape(n, n, d, ""), data, temperature=temperature, dtype=dtype
    )
    assert verdict.passed, verdict


SHAPES = (
    (1, 1, LARGE, "no negatives"),
    (2, 3, LARGE, "one or two negatives"),
    (67, 31, LARGE, "a few rows beyond a block, rows that cannot be copied in pieces"),
    (130, 40, (12, 1, 227 * KB, 1), "two tiles of keys, at once in two stages or in two blocks"),
    (200, 16, (3, 1, 227 * KB, 2), "more items than blocks, more tiles than stages"),
    (131, 136, (5, 1, 130 * KB, 3), "wide rows; in fp32 one stage, many items"),
)


@pytest.mark.parametrize("form", SOFTMAX)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "machine", "why"), SHAPES, ids=str)
def test_shapes(kernel, form, dtype, n, d, machine, why):
    kernel.machine = machine
    accept(form, n, d, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.005])
def test_temperatures(kernel, dtype, data, temperature):
    """Scores of 200 overflow any fixed offset; aligned rows leave weights below fp16's range."""
    form = SOFTMAX[(DATA.index(data) + TYPES[dtype]) % 3]
    accept(form, 40, 24, dtype, data, temperature)


def exact(a, b, scale, form, mean=True, eps=1e-12):
    scale = scale.double()
    needs = [True] * 3
    return reference.pair_softmax(
        a.double(), b.double(), scale, form, mean, eps, needs, torch.float64
    )


def worst(results, truth):
    """The largest relative error, in norm, of what is there."""
    return max(
        float((x.double() - y).norm() / y.norm())
        for x, y in zip(results, truth, strict=True) if x.numel()
    )  # fmt: skip


def pair(n, d, noise=0.7):
    a = torch.randn(n, d)
    return a, a + noise * torch.randn(n, d)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_confident_rows_keep_their_gradient(kernel, dtype, form):
    """Losses near 1e-10, where a positive within the softmax leaves nothing of a gradient."""
    a, b = (x.to(dtype) for x in pair(48, 64, noise=0.02))
    scale = torch.tensor(40.0)
    truth = exact(a, b, scale, form)
    assert float(truth[0]) < 1e-6
    results = kernel.pair_softmax(a, b, scale, form, True, 1e-12, [True] * 3, dtype)
    assert worst(results[:1] + results[3:], truth[:1] + truth[3:]) < 1e-4
    assert worst(results[1:3], truth[1:3]) < 3e-3


INPUTS = {
    "one side wider": (BF16, F32, F32, 1e-5),
    "16-bit formats that differ": (F16, BF16, F32, 1e-5),
    "autocast to bf16": (F32, F32, BF16, 2e-2),
    "autocast to fp16, lengths beyond its range": (F32, F32, F16, 2e-3),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("form", FORMS)
def test_mixed_precisions(kernel, name, form):
    a_type, b_type, precision, tolerance = INPUTS[name]
    a, b = pair(35, 40)
    if precision == F16:
        a, b = 1e6 * a, 1e-9 * b
    a, b, scale = a.to(a_type), b.to(b_type), torch.tensor(5.0)
    results = kernel.pair_softmax(a, b, scale, form, True, 1e-12, [True] * 3, precision)
    truth = exact(a, b, scale, form)
    assert worst(results[:1] + results[3:], truth[:1] + truth[3:]) < tolerance
    for x, y in zip(results[1:3], truth[1:3], strict=True):
        assert worst([x], [y]) < tolerance


PLACES = {
    "apart": lambda x: x[:70, 8:40],
    "off by an entry": lambda x: x[:70, 1:33],
    "every second": lambda x: x[::2, 8:40],
    "one row repeated": lambda x: x[:1, 8:40].expand(70, 32),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_where_rows_lie(kernel, dtype, place):
    """What is copied in pieces of 16 bytes must be aligned to them. The sum over rows."""
    a, b = PLACES[place](torch.randn(140, 56).to(dtype)), torch.randn(70, 32).to(dtype)
    scale = torch.tensor(3.0)
    results = kernel.pair_softmax(a, b, scale, "both", False, 1e-12, [True] * 3, dtype)
    tolerance = 1e-5 if dtype == F32 else 1e-2
    assert worst(results, exact(a, b, scale, "both", False)) < tolerance


@pytest.mark.parametrize("machine", [LARGE, (3, 1, 227 * KB, 4)], ids=["kept", "formed again"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_wanted(kernel, machine, form):
    kernel.machine = machine
    a, b = pair(70, 32)
    scale = torch.tensor(4.0)
    truth = exact(a, b, scale, form)
    for needs in itertools.product([False, True], repeat=3):
        results = kernel.pair_softmax(a, b, scale, form, True, 1e-12, needs, F32)
        assert worst(results, truth) < 1e-5


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_short_rows(kernel, dtype):
    """Rows shorter than eps, and of zeros, are divided by it, and so are their gradients."""
    a, b = pair(20, 32)
    a[::3] *= 0.01
    b[1] = 0.0
    a, b, scale = a.to(dtype), b.to(dtype), torch.tensor(3.0)
    results = kernel.pair_softmax(a, b, scale, "views", True, 0.5, [True] * 3, dtype)
    assert worst(results, exact(a, b, scale, "views", eps=0.5)) < (1e-5 if dtype == F32 else 1e-2)


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(kernel, entry):
    a, b = pair(20, 32)
    a[3, 5] = entry
    loss, grad_a, _, grad_scale = kernel.pair_softmax(
        a, b, torch.tensor(3.0), "both", True, 1e-12, [True] * 3, F32
    )
    assert bool(torch.stack([loss, grad_scale, *grad_a.sum(1)]).isnan().all())


def test_repeats(kernel):
    """Bit for bit, in whatever order threads run and however many blocks are resident."""
    a, b = (x.to(BF16) for x in pair(130, 32))
    several = []
    for seed, blocks, shared in ((0, 1, 227), (1, 1, 227), (2, 1, 227), (3, 4, 227), (4, 1, 60)):
        kernel.machine = (4, blocks, shared * KB, seed)
        scale = torch.tensor(20.0)
        several.append(kernel.pair_softmax(a, b, scale, "views", True, 1e-12, [True] * 3, BF16))
    for other in several[1:]:
        assert all(torch.equal(x, y) for x, y in zip(several[0], other, strict=True))


def test_refusals(kernel):
    """What the kernel refuses the backend declines."""

    def call(n, d, precision=F32):
        x = torch.zeros(n, d)
        kernel.pair_softmax(x, x, torch.tensor(1.0), "rows", True, 1e-12, [True] * 3, precision)

    for n, d, error in (
        (0, 4, "n is not in 1 to 2048"), (2049, 4, "n is not in 1 to 2048"),
        (4, 257, "d is not in 1 to 256"), (4, 0, "d is not in 1 to 256"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=error):
            call(n, d)
    assert not small_batch.fits(2049, 4, BF16, 227 * KB)
    assert not small_batch.fits(4, 257, BF16, 227 * KB)
    kernel.machine = (0, 1, 227 * KB, 0)
    with pytest.raises(RuntimeError, match="no device"):
        call(4, 4)


def test_exact_shared_memory(kernel):
    """What ``fits`` asks for is what the launch takes, to the byte."""
    x = torch.zeros(2, 160)
    for precision in TYPES:
        needed = next(s for s in range(0, 227 * KB, 16) if small_batch.fits(2, 160, precision, s))
        arguments = (x, x, torch.tensor(1.0), "rows", True, 1e-12, [True] * 3, precision)
        kernel.machine = (1, 1, needed, 0)
        kernel.pair_softmax(*arguments)
        kernel.machine = (1, 1, needed - 16, 0)
        with pytest.raises(RuntimeError, match="do not fit into this device's shared"):
            kernel.pair_softmax(*arguments)

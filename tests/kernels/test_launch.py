"""What reaches a GPU's launch, seen without one: grids, alignment, precision, options."""

import math

import pytest
import torch

pytest.importorskip("triton")

from fastcl.kernels import launch, problem, product, sweep, topk

_LARGEST = (2**31 - 1, 65535, 65535)


def problem_of(queries, keys, dtype):
    scale = queries.new_ones(())
    return launch.Problem.of(queries, keys, scale, None, None, None, None, "any", [], dtype)


@pytest.mark.parametrize("width", [16, 320])
@pytest.mark.parametrize(("n", "m"), [(2**24, 2**12), (2**8, 2**24), (2**18, 2**18)])
def test_grids_of_large_problems(monkeypatch, width, n, m):
    """A grid ends at 65535 in its second dimension: 4.2 million blocks of 64 rows are more."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: grids.append((*grid, 1, 1))

    for module, name in (
        (sweep, "sweep"), (sweep, "finish"), (product, "product"), (product, "write_weights"),
        (product, "add_slots"), (topk, "topk"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Kernel())
    monkeypatch.setattr(problem, "device", lambda _: (90, 132))
    monkeypatch.setattr(launch, "matmul", lambda a, b, out, add: None)
    with torch.device("meta"):
        q, k = torch.empty(n, width), torch.empty(m, width)
        scale, vector = torch.empty(()), torch.empty(n)
    p = problem_of(q, k, torch.bfloat16)
    launch.logsumexp(p, scale, False, True, True)
    assert math.prod(grids[0]) >= 132  # blocks that share slots still fill the device
    launch.largest(p, 5, None)
    weights = [launch.Weights("own", own_gain=vector, own_shift=vector)]
    launch.multiply(p, weights, scale, scale, True, True)
    assert len(grids) >= 5
    too_large = [grid for grid in grids if any(a > b for a, b in zip(grid, _LARGEST, strict=False))]
    assert too_large == []


def test_rows_begin_where_vectors_do():
    """Kernels are compiled, and looked at, for rows that begin at multiples of 16 bytes."""
    buffer = torch.randn(1 + 5 * 32)
    for dtype in (torch.float32, torch.bfloat16):
        rows = buffer.to(dtype)[1:].view(5, 32)
        p = problem_of(rows, None, dtype)
        assert p.own.rows.data_ptr() % 16 == 0
        assert torch.equal(p.own.rows, rows)


@pytest.mark.parametrize("new_way", [False, True])
def test_precision_of_fp32_products(monkeypatch, new_way):
    """One TF32 product where PyTorch's own may be, whichever of its two ways said so."""
    monkeypatch.setattr(problem, "INTERPRETED", False)
    p = problem_of(torch.randn(4, 16), None, torch.float32)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    assert p.precision == "tf32x3"
    try:
        if new_way:
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert p.precision == "tf32"
    finally:
        if not new_way:
            torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
    assert p.precision == "tf32x3"

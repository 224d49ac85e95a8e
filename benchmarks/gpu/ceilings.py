"""What this machine can do, by which the other stages' figures are to be read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from .. import report
from ..measure import interleave, products, summary
from .stage import Stage

_MM = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


@triton.jit
def exponentials(out, repeats, BLOCK: tl.constexpr):
    """2^-x again and again, in registers: it tends to 0.64, so nothing overflows."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = index.to(tl.float32) * 1e-9
    for _ in range(repeats):
        x = tl.math.exp2(-x)
    tl.store(out + index, x)


@triton.jit
def read(source, out, size, blocks, BLOCK: tl.constexpr):
    """Sum ``blocks`` blocks of a buffer of ``size`` numbers from the L2, each program's own way."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    start = tl.program_id(0) * 7 * BLOCK
    for block in range(blocks):
        first = tl.multiple_of((start + block * BLOCK) % size, BLOCK)  # size is a multiple too
        total += tl.load(source + first + lane, cache_modifier=".cg")  # not through L1
    tl.store(out + tl.program_id(0) * BLOCK + lane, total)


@triton.jit
def nothing(x):
    """A launch and no more."""


def run(stage: Stage) -> None:
    """Everything of this stage."""
    side = 64 if stage.toy else 8192
    shapes = [(side, side, side)]
    if not stage.toy:
        # scores of NT-Xent, and a chunk of weights times the rows, at three widths
        shapes += [(16384, 16384, d) for d in (128, 512, 1024)]
        shapes += [(4096, d, 16384) for d in (512, 1024)]
    mms = [f"{dtype} {m}x{n}x{k}" for m, n, k in shapes for dtype in _MM]
    stage.each(stage.chosen(mms), partial(_product, stage), "product")
    stage.each(stage.chosen(list(_OTHERS)), lambda name: _OTHERS[name](stage), "machine")


def _sample(stage: Stage, work: Callable) -> dict[str, float]:
    """Statistics of ``work``'s time, in ms."""
    work()
    rounds = 3 if stage.toy else 30
    runs = {"it": partial(stage.device.seconds, work)}
    return summary(interleave(runs, rounds, 1.0)["it"])


def _product(stage: Stage, name: str) -> dict:
    dtype, shape = name.split()
    m, n, k = map(int, shape.split("x"))
    a = torch.randn(m, k, device=stage.device.name).to(_MM[dtype])
    b = torch.randn(n, k, device=stage.device.name).to(_MM[dtype])
    with products(dtype):
        times = _sample(stage, lambda: torch.mm(a, b.T))
    return times | {"tflops": 2e-9 * m * n * k / times["median_ms"]}


def _copy(stage: Stage) -> dict:
    size = 2**16 if stage.toy else 2**31
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=stage.device.name)
    target = torch.empty_like(source)
    times = _sample(stage, lambda: target.copy_(source))
    return times | {"TB/s read and written": 2e-9 * size / times["median_ms"]}


def _exponentials(stage: Stage) -> dict:
    programs, repeats, block = (2, 4, 64) if stage.toy else (132 * 16, 4096, 1024)
    out = torch.empty(programs * block, device=stage.device.name)
    times = _sample(stage, lambda: exponentials[(programs,)](out, repeats, BLOCK=block))
    if not bool((out.min() > 0.2) & (out.max() < 1.0)):
        return times | {"failed": "not a power of two"}
    return times | {"T exponentials/s": 1e-9 * programs * repeats * block / times["median_ms"]}


def _l2(stage: Stage) -> dict:
    # 12 MiB stay in the L2 of any recent device, on both of its halves
    size, blocks, programs, block = (2**12, 4, 2, 64) if stage.toy else (3 * 2**20, 768, 1056, 4096)
    source = torch.rand(size, device=stage.device.name)
    out = torch.empty(programs * block, device=stage.device.name)
    times = _sample(stage, lambda: read[(programs,)](source, out, size, blocks, BLOCK=block))
    return times | {"TB/s from L2": 4e-9 * programs * blocks * block / times["median_ms"]}


def _gaps(stage: Stage) -> dict:
    """Microseconds from launch to launch: of Triton, of PyTorch, and in a graph."""
    x, count = torch.ones(16, device=stage.device.name), 5 if stage.toy else 500

    def launches() -> None:
        for _ in range(count):
            nothing[(1,)](x)

    def additions() -> None:
        for _ in range(count):
            x.add_(1.0)

    replay, _ = stage.device.capture(launches)
    works = {"triton": launches, "pytorch": additions, "graph": replay}
    found = {}
    for name, work in works.items():
        times = _sample(stage, work)
        found[f"{name} us"] = 1e3 * times["median_ms"] / count
        found[name] = times
    return found


_OTHERS = {"copy": _copy, "exponentials": _exponentials, "l2": _l2, "launch gap": _gaps}


def lines(records: list[dict]) -> list[str]:
    """One line per ceiling."""
    rows = []
    for record in records:
        if "failed" in record:
            continue
        hidden = ("kind", "case", "took_s", "median_ms", "p10_ms", "p90_ms", "rounds")
        figures = {k: v for k, v in record.items() if k not in hidden and isinstance(v, float)}
        text = ", ".join(f"{report.number(value)} {name}" for name, value in figures.items())
        rows.append((f"{record['kind']} {record['case']}", text))
    return [report.plain("", ("ceiling", "rate"), rows)] if rows else []

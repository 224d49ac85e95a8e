"""Errors first, then time and peak memory; each function here runs in a fresh process."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .cases import DTYPES, TOLERANCES, Case, Truth, truth
from .contestants import PEERS, Contestant, Step, fastcl_backends
from .device import CPU, Cpu

_MOST_ROUNDS = 300
_CEILING_SIDES = (1024, 2048)  # of the square products whose best speed is the ceiling


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        threads: of torch, 0 for torch's own choice.
        rounds: for every contestant; ``None`` adapts them to ``seconds``.
        seconds: aimed at for the timing of one case in one process.
        backends: of fastcl; ``None`` for all usable ones.
        against: parts of the other contestants' names; ``None`` for all of them.
        peers: the other contestants.
        least: rounds that even a slow contestant gets.
    """

    threads: int = 2
    rounds: int | None = None
    least: int = 3
    seconds: float = 8.0
    backends: tuple[str, ...] | None = None
    against: tuple[str, ...] | None = None
    peers: tuple[Contestant, ...] = PEERS

    def contestants(self) -> list[Contestant]:
        """fastcl's backends, then the others."""
        others = self.peers
        if self.against is not None:
            others = tuple(c for c in others if any(part in c.name for part in self.against))
        return [*fastcl_backends(self.backends), *others]


def reason_of(error: BaseException) -> str:
    """The first line of an error without paths, for a table."""
    if isinstance(error, ImportError):
        kind = "not installed" if isinstance(error, ModuleNotFoundError) else "does not import"
    else:
        kind = f"fails: {type(error).__name__}"
    line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{kind}: {re.sub(r'[^ ]*/[^ ]*', '...', line)[:110]}"


def prepare(settings: Settings, tuned: bool = False) -> None:
    """Threads, and oneDNN's fp32 products if ``tuned``."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if tuned:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"


# ---------------------------------------------------------------------------------------- gate


def save_truth(case: Case, file: str, settings: Settings) -> None:
    """Write the float64 truth of ``case`` to ``file``."""
    prepare(settings)
    torch.save(truth(case), file)


def differentiate(step: Step, contestant: Contestant, inputs: list[Tensor]) -> list[Tensor]:
    """Forward and backward: the loss, then the gradients of the leaves."""
    leaves = [x for x in inputs if x.requires_grad]
    with contestant.scope():
        loss = step(*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@contextmanager
def products(dtype: str) -> Iterator[None]:
    """fp32 products as a case's ``dtype`` says: rounded to TF32 for ``"tf32"``, else exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def admit(
    contestant: Contestant, case: Case, inputs: list[Tensor], exact: Truth, memory: int
) -> tuple[Step | None, dict]:
    """The step if it may be timed, and its errors or the reason why it may not."""
    reason = contestant.refusal(case, memory)
    if reason:
        return None, {"reason": reason}
    try:
        step = contestant.builders[case.task](case)
        loss, *gradients = differentiate(step, contestant, inputs)
    except Exception as error:  # whatever another library raises is its row's text
        return None, {"reason": reason_of(error)}
    errors = exact.errors(loss, gradients)
    record = {"loss_error": errors[0], "gradient_error": errors[1]}
    allowed = TOLERANCES[case.dtype]
    if not all(error <= limit for error, limit in zip(errors, allowed, strict=True)):
        record["reason"] = f"wrong: errors {errors[0]:.1e}, {errors[1]:.1e} above {allowed}"
        return None, record
    return step, record


# -------------------------------------------------------------------------------------- timing


def ceiling(dtype: torch.dtype, seconds: float = 0.3) -> dict[str, float]:
    """GFLOP/s of torch.mm on square matrices: ``best`` and ``median`` sample of the best side."""
    results = []
    for side in _CEILING_SIDES:
        a, b, out = (torch.randn(side, side).to(dtype) for _ in range(3))
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while len(samples) < 4 or time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            samples.append(2e-9 * side**3 / (time.perf_counter() - start))
        kept = torch.tensor(samples[1:])
        results.append({"best": float(kept.max()), "median": float(kept.median())})
    return max(results, key=lambda r: r["best"])


def interleave(
    runs: dict[str, Callable[[], float]], rounds: int | None, seconds: float, least: int = 3
) -> dict[str, list[float]]:
    """Seconds per run, sampled in turns.

    Every contestant gets the same share of ``seconds``, so slow ones skip rounds, evenly spread;
    the starting contestant rotates. Each runs ``least`` times at least; ``rounds`` fixes the number
    for all.
    """
    first = {name: run() for name, run in runs.items()}
    share = seconds / len(runs)
    wanted = {
        name: rounds or max(least, min(_MOST_ROUNDS, math.ceil(share / cost)))
        for name, cost in first.items()
    }
    total = max(wanted.values())
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(total):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if (turn + 1) * wanted[name] // total > turn * wanted[name] // total:
                samples[name].append(runs[name]())
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Median and spread of seconds, in ms."""
    values = 1e3 * torch.tensor(samples, dtype=torch.float64)
    low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {"median_ms": middle, "p10_ms": low, "p90_ms": high, "rounds": len(samples)}


def compare(
    case: Case, contestants: list[Contestant], exact: Truth, settings: Settings, device: Cpu = CPU
) -> dict[str, dict]:
    """Contestant -> errors and times, or the reason why it has none."""
    inputs = case.inputs(device.name)
    records: dict[str, dict] = {}
    works: dict[str, Callable[[], list[Tensor]]] = {}
    for contestant in contestants:
        step, record = admit(contestant, case, inputs, exact, device.memory())
        records[contestant.name] = record
        if step is not None:
            works[contestant.name] = partial(differentiate, step, contestant, inputs)
    if works:
        runs = {name: partial(device.seconds, work) for name, work in works.items()}
        taken_by = interleave(runs, settings.rounds, settings.seconds, settings.least)
        for name, taken in taken_by.items():
            records[name] |= summary(taken)
    if device is not CPU:  # whose memory only a process of its own shows: peak_memory
        for name, work in works.items():
            records[name]["memory_mb"] = device.peak(work) / 2**20
    return records


def timing(case: Case, truth_file: str, settings: Settings, tuned: bool) -> dict:
    """One case in this process: ``contestants`` and the gemm ``ceiling``.

    ``tuned`` sends fp32 products to oneDNN. The allocator's part of tuning is the environment that
    this process was started with.
    """
    prepare(settings, tuned)
    before = ceiling(DTYPES[case.dtype])
    contestants = [c for c in settings.contestants() if case.task in c.builders]
    exact = torch.load(truth_file, weights_only=False)  # ours: save_truth wrote it
    records = compare(case, contestants, exact, settings)
    after = ceiling(DTYPES[case.dtype])
    return {"contestants": records, "ceiling": max(before, after, key=lambda c: c["best"])}


# -------------------------------------------------------------------------------------- memory


def _status(key: str) -> float:
    """A field of this process's status in MB (2^20 bytes)."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def peak_memory(case: Case, name: str, settings: Settings) -> float:
    """MB beyond the inputs at the peak of one forward and backward, gradients included.

    A few rows go first, so that code, threads and autograd are loaded; torch.compile, whose code
    is made for one shape, runs the shape itself and returns its memory before the count.
    """
    prepare(settings)
    contestant = next(c for c in settings.contestants() if c.name == name)
    warm = case if name == "torch.compile" else case.tiny()
    step = contestant.builders[case.task](warm)
    differentiate(step, contestant, warm.inputs())
    inputs = case.inputs()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    differentiate(step, contestant, inputs)
    return _status("VmHWM") - before

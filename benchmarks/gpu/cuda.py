"""The CUDA C++ kernels: right, the same bits in every run, and faster than Triton by how much?

What this stage finds decides which kernels serve by themselves: see ``MEASURED`` in
fastcl/ops/cuda.py, which names files that this stage has written.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fastcl
from fastcl.testing import SHAPES, SOFTMAX, Shape
from fastcl.testing import compare as judge

from .. import report
from ..cases import DTYPES, Case
from ..contestants import fastcl_backends
from ..measure import admit, differentiate, interleave, products, summary
from .correctness import operators
from .stage import Stage
from .table import truth_of

FASTER = 1.10  # than Triton, to be taken without being asked for

# what one cooperative launch holds, and what Hopper's kernels tile; ragged against any tile
_SHAPES = (
    *SHAPES,
    Shape(1000, 1000, 64, "a loss in one launch"),
    Shape(2047, 515, 128, "the width of most heads, ragged"),
    Shape(1031, None, 128, "symmetric, ragged"),
    Shape(257, 30011, 128, "a queue: few queries, many keys"),
    Shape(777, 1030, 200, "padded"),
    Shape(1537, 900, 256, "the widest accumulator"),
)
_OPERATIONS = (*SOFTMAX, "logsumexp", "columns", "queue")
_KERNELS = dict.fromkeys(SOFTMAX, "pair_softmax") | {"enqueue": "enqueue"}  # of operations; others:
_SWEEPS = "similarity_logsumexp"
_DTYPES = ("fp32", "bf16", "fp16")
_PATIENCE = 90.0  # seconds for one small problem, the start of its process included


@dataclass(frozen=True)
class Race:
    """A kernel (a key of ``MEASURED``) and a case that is mostly that kernel."""

    kernel: str
    case: Case

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.case.name}"


def races(quick: bool, toy: bool) -> list[Race]:
    """What is timed, by kernel."""
    if toy:
        return [
            Race("enqueue", Case("queue", 16, 20, "fp32", 40)),
            Race("pair_softmax", Case("ntxent", 16, 20, "fp32", 16)),
        ]
    dtypes = ("bf16",) if quick else ("bf16", "fp32")
    sizes = (256, 2048) if quick else (64, 256, 512, 1024, 2048)
    found = [
        Race("enqueue", Case("queue", n, d, dtype, 65536))
        for dtype in dtypes for n in (256, 4096) for d in (128, 256)
    ]  # fmt: skip
    found += [
        Race("pair_softmax", Case(task, n, d, dtype, n))
        for dtype in dtypes for task in ("ntxent", "clip") for d in (64, 128, 256) for n in sizes
    ]  # fmt: skip
    tasks = [(task, n, n) for task in ("ntxent", "clip") for n in (4096, 16384)]
    tasks += [("queue", 256, 65536), ("queue", 4096, 65536)]
    found += [
        Race("similarity_logsumexp", Case(task, n, d, "bf16", keys))
        for task, n, keys in tasks for d in (64, 128, 256)
    ]  # fmt: skip
    return found


def run(stage: Stage) -> None:
    """Everything of this stage."""
    # without a GPU another backend takes the same way
    backend = "chunked" if stage.toy else "cuda"
    if reason := fastcl.backends()[backend].unavailable:
        stage.add({"kind": "nothing", "case": backend, "result": reason})
        return
    hung = first_light(stage, backend)
    chosen = [r for r in stage.chosen(races(stage.quick, stage.toy)) if r.kernel not in hung]
    rings = [race.case for race in chosen if race.kernel == "enqueue"]
    stage.each(rings, partial(same_ring, stage, backend), "ring")
    if not stage.toy:  # the stage of correctness takes this way there
        sound = tuple(o for o in _OPERATIONS if _KERNELS.get(o, _SWEEPS) not in hung)
        operators(stage, backend, sound, _SHAPES)
        stage.warm([race.case for race in chosen if race.kernel != "enqueue"])
    stage.each(chosen, partial(compare, stage, backend), "race")


def first_light(stage: Stage, backend: str) -> set[str]:
    """Each form of each kernel on one small problem; the kernels that did not come back.

    A kernel that waits for ever takes its process with it, so each problem has its own and a time
    limit: what hangs is named within two minutes, and left out of what follows, the rest of its
    forms included.
    """
    forms = [("enqueue", "fp32", 64)]
    if not stage.toy:
        forms += [(operation, dtype, 64) for operation in SOFTMAX for dtype in _DTYPES]
        forms += [
            (operation, dtype, width)
            for operation in ("logsumexp", "columns", "queue") for width in (64, 128, 256)
            for dtype in _DTYPES[1:]
        ]  # fmt: skip
    forms = stage.chosen(forms, lambda form: f"{_KERNELS.get(form[0], _SWEEPS)} {form[0]}")
    hung = set()

    def light(form: tuple[str, str, int]) -> dict:
        if _KERNELS.get(form[0], _SWEEPS) in hung:
            return {"result": "not tried: another form of this kernel hangs"}
        command = [sys.executable, "-m", f"{__package__}.cuda", stage.device.name, backend]
        command += [str(part) for part in form]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            hung.add(_KERNELS.get(form[0], _SWEEPS))
            return {"failed": f"no answer in {_PATIENCE:.0f} s"}
        said = (done.stdout + done.stderr).strip().splitlines() or [""]
        return {"failed": said[-1]} if done.returncode else {"result": said[-1]}

    with ThreadPoolExecutor(4) as threads:
        for form, record in zip(forms, threads.map(light, forms), strict=True):
            case = " ".join(str(part) for part in form)
            stage.add({"kind": "first", "case": case} | record)
    return hung


def one_problem(device: str, backend: str, operation: str, dtype: str, width: int) -> str:
    """A small, ragged problem; what came out, or an AssertionError."""
    if operation == "enqueue":
        queues = [_queue(Case("queue", 16, width, dtype, 40), device) for _ in range(2)]
        rows, ids = torch.randn(33, width, device=device), torch.arange(33, device=device)
        for _ in range(2):
            for queue, name in zip(queues, (backend, "reference"), strict=True):
                _enqueue(name, queue, rows, ids)
        ours, theirs = (queue.keys.double() for queue in queues)
        error = float((ours - theirs).abs().max())
        assert error <= 4 * torch.finfo(DTYPES[dtype]).eps, f"keys differ by {error:.1e}"
        return f"error {error:.1e}"
    shape = Shape(150, None if operation == "logsumexp" else 131, width, "first")
    data = "random" if operation == "queue" else "aligned"
    verdict = judge(
        backend, operation, shape, data, dtype=DTYPES[dtype], device=device, oracle="reference"
    )
    assert verdict.passed, f"error {verdict.error:.1e} above {verdict.allowed:.1e}"
    return f"error {verdict.error:.1e}"


def same_ring(stage: Stage, backend: str, case: Case) -> dict:
    """A queue filled more than once round, eagerly and by replays, beside one of plain PyTorch."""
    device, dtype = stage.device, DTYPES[case.dtype]
    ours, theirs = (_queue(case, device.name) for _ in range(2))
    rows = case.inputs(device.name)[1].detach()
    ids = torch.arange(len(rows), device=device.name)
    replay, _ = device.capture(partial(_enqueue, backend, ours, rows, ids))
    replays = case.keys // len(rows) + 1
    for _ in range(replays):
        replay()
    for _ in range(replays + (3 if device.graphs else 1)):  # a capture begins with so many
        _enqueue("chunked", theirs, rows, ids)
    device.synchronize()
    state, exact = ours.state_dict(), theirs.state_dict()
    wrong = [
        name for name in ("ids", "pointer", "fill") if not torch.equal(state[name], exact[name])
    ]
    error = float((state["keys"].double() - exact["keys"].double()).abs().max())
    if wrong or error > 4 * torch.finfo(dtype).eps:
        return {"failed": f"{', '.join(wrong) or 'nothing else'} differs; keys by {error:.1e}"}
    return {"ring_error": error}


def _queue(case: Case, device: str) -> fastcl.NegativeQueue:
    return fastcl.NegativeQueue(case.width, case.keys, dtype=DTYPES[case.dtype], device=device)


def _enqueue(backend: str, queue: fastcl.NegativeQueue, rows: Tensor, ids: Tensor) -> list[Tensor]:
    with fastcl.use_backend(backend):
        queue.enqueue(rows, ids)
    return [queue.keys]


def compare(stage: Stage, backend: str, race: Race) -> dict:
    """Errors, bits of three runs and times of one race."""
    with products(race.case.dtype):
        return _compare(stage, backend, race)


def _compare(stage: Stage, backend: str, race: Race) -> dict:
    device, case = stage.device, race.case
    record: dict = {"kernel": race.kernel, "backend": backend}
    inputs = case.inputs(device.name)
    works: dict[str, Callable[[], list[Tensor]]] = {}
    exact = None if race.kernel == "enqueue" else truth_of(stage, case)
    for name in (backend, "triton"):
        if exact is None:
            rows, ids = inputs[1].detach(), torch.arange(case.rows, device=device.name)
            works[name] = partial(_enqueue, name, _queue(case, device.name), rows, ids)
            continue
        (contestant,) = fastcl_backends((name,))
        step, admitted = admit(contestant, case, inputs, exact, device.memory())
        record[name] = admitted
        if step is None:
            return record | {"failed": f"{name}: {admitted['reason']}"}
        works[name] = partial(differentiate, step, contestant, inputs)
    if exact is not None:
        first = works[backend]()
        runs = [works[backend]() for _ in range(2)]
        if not all(torch.equal(a, b) for run in runs for a, b in zip(run, first, strict=True)):
            return record | {"failed": "three runs differ"}
    launched = device.launches(works[backend])
    record["launches"] = {
        name: found if found is None else sum(count for _, count, _ in found)
        for name, found in ((backend, launched), ("triton", device.launches(works["triton"])))
    }
    record["declined"] = launched is not None and not any("fastcl::cuda" in k[0] for k in launched)
    timers = {}
    for name, work in works.items():
        timers[f"{name} step"] = partial(device.seconds, work)
        timers[f"{name} graph"] = partial(device.seconds, device.capture(work)[0])
    taken = interleave(timers, 1 if stage.toy else None, 1.0, 30)
    record["times"] = times = {name: summary(samples) for name, samples in taken.items()}
    # both as launched from Python and as replayed, where launches cost little
    record["ratio"] = min(
        times[f"triton {how}"]["median_ms"] / times[f"{backend} {how}"]["median_ms"]
        for how in ("step", "graph")
    )
    return record


def verdicts(found: dict) -> dict[str, bool]:
    """Kernel -> whether it may serve by itself, from what this stage has written.

    It was run in full and nothing failed; in every case that the kernel took, it was at least 10 %
    faster than Triton.
    """
    whole = found["ended"] and not found["quick"] and found["only"] is None
    clean = whole and not found["failures"] and not found["skipped_for_time"]
    ratios: dict[str, list[float]] = {}
    for record in found["records"]:
        if record["kind"] == "race" and "ratio" in record and not record["declined"]:
            ratios.setdefault(record["kernel"], []).append(record["ratio"])
    return {kernel: clean and min(these) >= FASTER for kernel, these in ratios.items()}


def lines(records: list[dict]) -> list[str]:
    """One row per race, and how many checks went before."""
    found = [f"cuda: {r['result']}" for r in records if r["kind"] == "nothing"]
    checks = (("first", "small problems right"), ("operator", "right in three runs"))
    for kind, checked in (*checks, ("ring", "right")):
        these = [r for r in records if r["kind"] == kind]
        if these:
            good = sum("failed" not in r for r in these)
            found.append(f"{kind}: {good} of {len(these)} {checked}")
    rows = []
    for r in (r for r in records if "ratio" in r):
        times = {name: f"{t['median_ms']:.4g}" for name, t in r["times"].items()}
        own, launches = r["backend"], r["launches"]
        rows.append(
            (
                r["case"], times[f"{own} step"], times["triton step"], times[f"{own} graph"],
                times["triton graph"], f"{launches[own]} / {launches['triton']}",
                "declined" if r["declined"] else f"{r['ratio']:.2f}",
            )
        )  # fmt: skip
    header = ("case", "cuda ms", "triton", "cuda graph", "triton", "launches", "x triton")
    return found + ([report.plain("", header, rows)] if rows else [])


if __name__ == "__main__":
    print(one_problem(*sys.argv[1:5], int(sys.argv[5])))

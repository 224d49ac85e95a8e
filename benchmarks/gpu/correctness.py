"""Every operator and gradient against float64; bits of repeated runs; graphs; streams."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

from fastcl.testing import (
    MORE_OPERATIONS,
    OPERATIONS,
    SHAPES,
    WHOLE,
    Shape,
    compare,
    served,
)

from .. import device, report
from ..cases import Case
from ..contestants import fastcl_backends
from ..measure import differentiate, products, reason_of
from .stage import Stage, fatal

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DATA = ("random", "aligned", "clustered", "cone")
_TEMPERATURES = (0.5, 0.07, 0.01)
_RULES = ("all", "offsets", "same", "different", "empty rows")

# every width of the table from 16 on, and past it; sizes ragged against any tile
_LARGE = (
    Shape(1000, 1301, 16, "narrow"),
    Shape(4133, None, 64, "symmetric, several waves of programs"),
    Shape(2049, 515, 128, "more queries than keys, ragged"),
    Shape(1031, None, 128, "symmetric, ragged"),
    Shape(257, 30011, 128, "a queue: few queries, many keys"),
    Shape(777, 1030, 200, "padded to 256"),
    Shape(1537, 900, 256, "the widest accumulator"),
    Shape(1031, 700, 300, "wider than an accumulator, padded"),
    Shape(899, None, 512, "symmetric, wide"),
    Shape(600, 1111, 768, "wide, ragged"),
    Shape(515, 517, 1024, "the widest"),
)
_TOY = (Shape(65, 40, 20, "ragged"), Shape(70, None, 16, "symmetric, ragged"))


def run(stage: Stage) -> None:
    """Everything of this stage; see the package's description."""
    losses = stage.chosen(_losses(stage))
    if not stage.toy:
        stage.warm(losses)
    names = ("graph", "side stream", "three runs")
    for name, function in zip(names, (graph, side_stream, three_runs), strict=True):
        stage.each(losses, lambda case, f=function: f(stage.device, case), name)
    operations = ("columns",) if stage.toy else (*MORE_OPERATIONS, *OPERATIONS)
    operators(stage, "triton", operations, shapes=_TOY if stage.toy else None)


def operators(
    stage: Stage, backend: str, operations: tuple[str, ...], shapes: tuple[Shape, ...] | None = None
) -> None:
    """Verdicts on ``operations`` of ``backend`` in every dtype that it declares."""
    declared = served(backend, tuple(_DTYPES.values()), stage.device.name, operations)
    shapes = shapes or (_LARGE[::2] if stage.quick else (*_LARGE, *SHAPES))
    groups = [
        (operation, dtype, tuple(part), backend)
        for part in (shapes[:6], shapes[6:12], shapes[12:])
        for dtype in (("fp32", "fp16") if stage.toy else _DTYPES)
        for operation in operations
        if part and (operation, _DTYPES[dtype]) in declared
    ]
    stage.parallel(stage.chosen(groups, lambda group: f"{group[0]} {group[1]}"), check)


def check(
    device_name: str, seconds: float, operation: str, dtype: str, shapes: tuple[Shape, ...],
    backend: str,
) -> list[dict]:  # fmt: skip
    """Verdicts of ``operation`` on every kind of data and temperature; runs in its own process.

    The rule, and whether there are biases, go with the shape: each is code of its own, and the
    compiler is what takes the time here. Uninitialised memory holds NaN, so that reading it shows.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    end, records = time.time() + seconds, []
    plain = operation in ("normalize", "pair")
    kinds = list(itertools.product(_DATA, (1.0,) if plain else _TEMPERATURES))
    if device_name == "cpu":  # the interpreter: one of each is enough
        kinds = kinds[-1:]
    first = (*MORE_OPERATIONS, *OPERATIONS).index(operation)
    for shape, (data, temperature) in itertools.product(shapes, kinds):
        if operation == "queue" and shape.m is None:
            continue  # its keys need a gradient
        number = first + shape.n  # as good as drawn, and the same in every run
        rule = "all" if plain else _RULES[number % len(_RULES)]
        case = f"{operation} {dtype} {shape} {data} {rule} t={temperature}"
        if time.time() > end:
            records.append({"skipped": f"{operation} {dtype} from {case} on"})
            break
        record = {"kind": "operator", "case": case}
        try:
            verdict = compare(
                backend, operation, shape, data, rule, temperature, _DTYPES[dtype],
                bias=not plain and number % 2 == 1, device=device_name, runs=3,
                oracle="reference" if operation in WHOLE else "chunked",
            )  # fmt: skip
        except Exception as error:
            records.append(record | {"failed": reason_of(error)})
            if fatal(error):
                break
            continue
        record |= {
            "operation": operation, "dtype": dtype, "data": data, "temperature": temperature,
            "width": shape.d, "error": verdict.error, "plain": verdict.plain,
            "allowed": verdict.allowed, "repeats": verdict.repeats,
        }  # fmt: skip
        if not verdict.passed:
            same = "" if verdict.repeats else ", and runs differ"
            record["failed"] = f"error {verdict.error:.1e} above {verdict.allowed:.1e}{same}"
        records.append(record)
    return records


# ------------------------------------------------------------------------------------- losses


def _losses(stage: Stage) -> list[Case]:
    if stage.toy:
        return [Case("clip", 40, 20, "fp32", 40), Case("queue", 16, 16, "fp32", 100)]
    return [
        Case(task, rows, width, dtype, 4099 if task == "queue" else rows)
        for task, rows in (("ntxent", 1030), ("clip", 515), ("supcon", 1030), ("queue", 257))
        for width in (64, 200, 512)
        for dtype in ("bf16", "fp32")
    ]


def step_of(case: Case, backend: str) -> Callable[[list], list]:
    """Forward and backward of ``case`` by ``backend``, as a function of its inputs."""
    (contestant,) = fastcl_backends((backend,))
    step = contestant.builders[case.task](case)

    def work(inputs):
        with products(case.dtype):
            return differentiate(step, contestant, inputs)

    return work


def same(ours: list, exact: list) -> dict:
    """A record that says whether all bits are equal."""
    if all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True)):
        return {"identical": True}
    return {"identical": False, "failed": "bits differ"}


def graph(on: device.Cpu, case: Case, backend: str = "triton") -> dict:
    """A captured step gives an eager step's bits, also for inputs that came after the capture."""
    work, inputs = step_of(case, backend), case.inputs(on.name)
    later = case.inputs(on.name)
    with torch.no_grad():
        for x in later[:2]:
            x.copy_(x.flip(0) * 1.5)
    first, second = work(inputs), work(later)
    replay, results = on.capture(lambda: work(inputs))
    replay()
    on.synchronize()
    verdict = same(results, first)
    if not on.graphs or not verdict["identical"]:
        return verdict
    with torch.no_grad():
        for x, y in zip(inputs, later, strict=True):
            x.copy_(y)
    replay()
    on.synchronize()
    return same(results, second)


def side_stream(on: device.Cpu, case: Case, backend: str = "triton") -> dict:
    """A step on another stream than the default one comes after the work queued there.

    Its inputs are still zeros when it is launched: launches on any other stream would see that.
    """
    work, inputs = step_of(case, backend), case.inputs(on.name)
    exact = work(inputs)
    late = [torch.zeros_like(x, requires_grad=x.requires_grad) for x in inputs]
    on.synchronize()
    with on.side_stream():
        on.keep_busy()
        with torch.no_grad():
            for x, y in zip(late, inputs, strict=True):
                x.copy_(y)
        ours = [x.clone() for x in work(late)]
    on.synchronize()
    return same(ours, exact)


def three_runs(on: device.Cpu, case: Case, backend: str = "triton") -> dict:
    """Bits of three runs."""
    work, inputs = step_of(case, backend), case.inputs(on.name)
    first = work(inputs)
    for _ in range(2):
        verdict = same(work(inputs), first)
        if "failed" in verdict:
            break
    return verdict


def lines(records: list[dict]) -> list[str]:
    """The worst error of each operator and dtype, and what else was checked."""
    judged = [r for r in records if "allowed" in r]
    rows = []
    for key in dict.fromkeys((r["operation"], r["dtype"]) for r in judged):
        these = [r for r in judged if (r["operation"], r["dtype"]) == key]
        worst = max(these, key=lambda r: r["error"] / r["allowed"])
        rows.append(
            (
                " ".join(key), str(len(these)), str(sum("failed" in r for r in these)),
                f"{worst['error']:.1e}", f"{worst['plain']:.1e}", f"{worst['allowed']:.1e}",
                str(all(r["repeats"] for r in these)), worst["case"],
            )
        )  # fmt: skip
    header = ("operator", "cases", "failed", "error", "plain", "allowed", "repeats", "worst case")
    found = [report.plain("", header, rows)] if rows else []
    for kind in ("graph", "side stream", "three runs"):
        these = [r for r in records if r["kind"] == kind]
        if these:
            good = sum(r.get("identical", False) for r in these)
            found.append(f"{kind}: {good} of {len(these)} identical")
    return found

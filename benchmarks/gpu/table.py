"""The losses, one by one: time, work, share of the floor, memory, error, launches."""

from __future__ import annotations

from functools import partial

import torch

from .. import report
from ..cases import Case, truth
from ..contestants import Contestant, fastcl_backends
from ..measure import admit, differentiate, interleave, products, summary
from .stage import Stage
from .work import Rates, executed, floor_seconds, minimal, unit

_GRAPHS_UP_TO = 4096  # rows; beyond, launches hide behind the kernels
_TRUTH_UP_TO = 131072**2  # scores; beyond, float64 takes many seconds


def cases(quick: bool, toy: bool) -> list[Case]:
    """The table of this stage, what matters most first."""
    if toy:
        return [
            Case("ntxent", 40, 20, "fp32", 40), Case("queue", 16, 16, "fp32", 40),
        ]  # fmt: skip
    widths = (64, 128, 256, 512, 768, 1024)
    rows = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    first = [Case("ntxent", 16384, d, "bf16", 16384) for d in (128, 512)]
    first += [Case("queue", 256, 128, "bf16", 65536), Case("clip", 16384, 512, "bf16", 16384)]
    pairs = [(n, d) for d in widths for n in rows]
    if quick:
        pairs = [(n, d) for d in (128, 512) for n in (1024, 4096, 16384)]
    main = [Case(task, n, d, "bf16", n) for task in ("ntxent", "clip") for n, d in pairs]
    queues = [(b, k) for k in (65536, 262144, 1048576) for b in (256, 1024, 4096)]
    main += [Case("queue", b, 128, "bf16", k) for b, k in (queues[:2] if quick else queues)]
    main += [Case("supcon", n, d, "bf16", n) for n in (4096, 16384) for d in (128, 512)]
    others = [
        Case(task, n, d, dtype, n)
        for dtype in ("tf32", "fp32", "fp16")
        for task in ("ntxent", "clip")
        for d in (128, 512)
        for n in (4096, 16384)
    ]
    others += [Case("queue", 256, 128, dtype, 65536) for dtype in ("tf32", "fp32", "fp16")]
    huge = [Case("ntxent", n, d, "bf16", n) for n in (131072, 262144) for d in (128, 512)]
    chosen = first + main + ([] if quick else others + huge)
    return list(dict.fromkeys(chosen))


def run(stage: Stage) -> None:
    """Everything of this stage."""
    chosen = stage.chosen(cases(stage.quick, stage.toy))
    stage.warm(chosen[:1] if stage.toy else chosen)
    stage.each(chosen, partial(measure, stage), "loss")


def truth_of(stage: Stage, case: Case):
    """Float64 truth, in blocks of a gigabyte or less."""
    return truth(case, max(1, 2**27 // case.keys), stage.device.name)


def measure(stage: Stage, case: Case) -> dict:
    """Errors, times, work and memory of one case."""
    with products(case.dtype):
        return _measure(stage, case)


def _measure(stage: Stage, case: Case) -> dict:
    device, inputs = stage.device, case.inputs(stage.device.name)
    (contestant,) = fastcl_backends(("triton",))
    record = case.describe()
    if case.scores <= _TRUTH_UP_TO:
        step, admitted = admit(contestant, case, inputs, truth_of(stage, case), device.memory())
        record |= admitted
        if step is None:
            return record | {"failed": admitted["reason"]}
    else:
        step = contestant.builders[case.task](case)
    whole = partial(differentiate, step, contestant, inputs)
    first = whole()
    same = all(torch.equal(a, b) for _ in range(2) for a, b in zip(whole(), first, strict=True))
    del first
    record["deterministic"] = same
    record["peak_bytes"] = device.peak(whole)
    kernels = device.launches(whole)
    record["kernels"] = kernels
    record["launches"] = None if kernels is None else sum(count for _, count, _ in kernels)
    record["times"] = times = _times(stage, case, contestant, step, inputs)
    seconds = {name: 1e-3 * t["median_ms"] for name, t in times.items()}
    floors = floor_seconds(case, Rates())
    floor = {"forward": floors[0], "backward": floors[1], "both": sum(floors)}
    record["floor_us"] = {name: 1e6 * value for name, value in floor.items()}
    record["of_floor"] = {name: floor[name] / seconds[name] for name in floor}
    for what, units in (("minimal", minimal(case)), ("executed", executed(case))):
        parts = {"forward": units[0], "backward": units[1], "both": sum(units)}
        record[f"tflops_{what}"] = {
            name: 1e-12 * part * unit(case) / seconds[name] for name, part in parts.items()
        }
    return record if same else record | {"failed": "three runs differ"}


def _times(stage: Stage, case: Case, contestant: Contestant, step, inputs) -> dict[str, dict]:
    """Statistics in ms of the parts, sampled in turns."""
    device = stage.device
    leaves = [x for x in inputs if x.requires_grad]

    def forward():
        with contestant.scope():
            return step(*inputs)

    loss = forward()

    def backward():
        with contestant.scope():
            return torch.autograd.grad(loss, leaves, retain_graph=True)

    both = partial(differentiate, step, contestant, inputs)
    runs = {
        "forward": partial(device.seconds, forward),
        "backward": partial(device.seconds, backward),
        "both": partial(device.seconds, both),
    }
    if case.rows <= _GRAPHS_UP_TO:
        runs["wall"] = partial(device.wall, both)
        replay, _ = device.capture(both)
        runs["graph"] = partial(device.seconds, replay)
    least = 30 if case.scores * case.width <= 2**42 else 5  # the very largest take a second each
    samples = interleave(runs, 1 if stage.toy else None, 0.5, least)
    return {name: summary(taken) for name, taken in samples.items()}


def _cell(record: dict, name: str) -> str:
    times = record["times"].get(name)
    if times is None:
        return "-"
    return f"{times['median_ms']:.4g} ({times['p10_ms']:.4g}-{times['p90_ms']:.4g})"


def lines(records: list[dict]) -> list[str]:
    """One row per case."""
    header = (
        "case", "fwd ms", "bwd ms", "both ms (p10-p90)", "graph ms", "wall ms", "TFLOP/s min",
        "executed", "% floor", "MB", "loss err", "grad err", "launches", "same bits",
    )  # fmt: skip
    rows = []
    for r in (r for r in records if "times" in r):
        t, number = r["times"], report.number
        peak = r["peak_bytes"]
        rows.append(
            (
                r["case"], number(t["forward"]["median_ms"]), number(t["backward"]["median_ms"]),
                _cell(r, "both"), number(t.get("graph", {}).get("median_ms")),
                number(t.get("wall", {}).get("median_ms")), number(r["tflops_minimal"]["both"]),
                number(r["tflops_executed"]["both"]), number(100 * r["of_floor"]["both"]),
                number(None if peak is None else peak / 2**20),
                f"{r['loss_error']:.0e}" if "loss_error" in r else "-",
                f"{r['gradient_error']:.0e}" if "gradient_error" in r else "-",
                number(r["launches"]), "yes" if r["deterministic"] else "NO",
            )
        )  # fmt: skip
    return [report.plain("", header, rows)] if rows else []

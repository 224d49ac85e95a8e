"""fastcl and the other libraries side by side, in one process, sampled in turns."""

from __future__ import annotations

from functools import partial

from .. import measure, report
from ..cases import Case
from ..contestants import GPU_PEERS
from ..measure import Settings, products
from .stage import Stage
from .table import truth_of


def cases(quick: bool, toy: bool) -> list[Case]:
    """What is compared, in the order of importance."""
    if toy:
        return [Case("ntxent", 40, 20, "fp32", 40), Case("queue", 16, 16, "fp32", 64)]
    square = [
        ("ntxent", 16384, 128), ("clip", 16384, 512), ("ntxent", 16384, 512), ("clip", 4096, 512),
        ("ntxent", 4096, 128), ("ntxent", 1024, 128), ("clip", 1024, 512), ("supcon", 4096, 128),
        ("clip", 16384, 1024), ("ntxent", 16384, 1024), ("supcon", 16384, 128),
        ("ntxent", 32768, 128), ("clip", 32768, 512),
    ]  # fmt: skip
    queues = [(4096, 65536), (1024, 262144)]
    chosen = [
        Case("queue", 256, 128, "bf16", 65536),
        *(Case(task, n, d, "bf16", n) for task, n, d in square),
        *(Case("queue", b, 128, "bf16", k) for b, k in queues),
        *(Case(task, n, d, "tf32", n) for task, n, d in square[:7]),
        Case("queue", 256, 128, "tf32", 65536),
    ]
    return chosen[:8] if quick else chosen


def run(stage: Stage) -> None:
    """Everything of this stage."""
    chosen = stage.chosen(cases(stage.quick, stage.toy))
    if not stage.toy:
        stage.warm(chosen)
    settings = Settings(
        rounds=2 if stage.toy else None, seconds=3.0, least=30, backends=("triton",),
        against=("eager", "info-nce", "flash") if stage.toy else None, peers=GPU_PEERS,
    )  # fmt: skip
    stage.each(chosen, partial(_compare, stage, settings), "comparison")


def _compare(stage: Stage, settings: Settings, case: Case) -> dict:
    contestants = [c for c in settings.contestants() if case.task in c.builders]
    with products(case.dtype):
        records = measure.compare(case, contestants, truth_of(stage, case), settings, stage.device)
    found = case.describe() | {"contestants": records}
    ours, *_ = records
    if "median_ms" not in records[ours]:
        return found | {"failed": records[ours].get("reason", "no time")}
    timed = {n: r["median_ms"] for n, r in records.items() if n != ours and "median_ms" in r}
    if timed:
        best = min(timed, key=timed.get)
        found |= {"best_peer": best, "best_ratio": timed[best] / records[ours]["median_ms"]}
    return found


def lines(records: list[dict]) -> list[str]:
    """A table per case."""
    header = ("contestant", "ms", "p10-p90", "x fastcl", "loss error", "gradient error")
    found = []
    for r in (r for r in records if "contestants" in r):
        rows = []
        for name, c in r["contestants"].items():
            if "median_ms" in c:
                number = report.number
                rows.append(
                    (
                        name, f"{c['median_ms']:.4g}", f"{c['p10_ms']:.4g}-{c['p90_ms']:.4g}",
                        number(report.ratio(r["contestants"], name)), f"{c['loss_error']:.0e}",
                        f"{c['gradient_error']:.0e}",
                    )
                )  # fmt: skip
        found.append(report.plain(f"\n{r['case']}", header, rows))
        found += [
            f"  not timed: {name}: {c['reason']}"
            for name, c in r["contestants"].items()
            if "reason" in c
        ]
    return found

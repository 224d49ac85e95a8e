"""Hardware counters of the kernels that matter, by ncu where it is installed."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys

import fastcl

from .. import device, report
from ..cases import Case
from ..contestants import fastcl_backends
from ..measure import differentiate
from .sanitize import find_tool
from .stage import Stage

# kernel -> its backend, and a case whose forward or backward is mostly that kernel
_NTXENT, _QUEUE = Case("ntxent", 16384, 128, "bf16", 16384), Case("queue", 256, 128, "bf16", 65536)
_WIDE = Case("ntxent", 16384, 512, "bf16", 16384)
_KERNELS = {
    "sweep": ("triton", _NTXENT),
    "product": ("triton", _NTXENT),
    "product of a queue": ("triton", _QUEUE),
    "write_weights": ("triton", _WIDE),
    "sweep, wide": ("triton", _WIDE),
    "sweep_kernel": ("cuda", _NTXENT),
    "product_kernel": ("cuda", _NTXENT),
    "product_kernel of a queue": ("cuda", _QUEUE),
}
_TOY = {"sweep": ("triton", Case("ntxent", 40, 20, "fp32", 40))}
_SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats",
    "WarpStateStats", "InstructionStats", "LaunchStats", "Occupancy",
)  # fmt: skip
# of hundreds: tensor pipe, special functions (xu), issue, L2, local memory (spills), occupancy
_WANTED = re.compile(
    r"pipe_tensor|pipe_xu|issue_active|inst_issued|lts__t_bytes|lts__t_sectors\.|lts__throughput"
    r"|l1tex__throughput|local|spill|registers_per_thread|gpu__time_duration|dram__bytes"
    r"|dram__throughput|sm__throughput|warps_active|occupancy_limit|shared_mem_per_block"
    r"|stalled_.*_per_warp_active|cycles_elapsed\.max|__cycles_active\.avg$"
)
_SHOWN = {
    "us": r"gpu__time_duration\.sum",
    "tensor": r"pipe_tensor.*pct",
    "xu": r"pipe_xu.*pct",
    "issue": r"issue_active.*(pct|avg)",
    "L2 %": r"lts__throughput.*pct",
    "regs": r"registers_per_thread$",
    "local": r"local.*sum$|spill",
    "warps": r"warps_active.*pct",
}


def run(stage: Stage) -> None:
    """Everything of this stage."""
    kernels = _TOY if stage.toy else _KERNELS
    if not stage.toy:
        stage.warm(list(dict.fromkeys(case for _, case in kernels.values())))
    stage.each(
        stage.chosen(list(kernels)), lambda name: _profile(stage, name, *kernels[name]), "kernel"
    )


def _profile(stage: Stage, name: str, backend: str, case: Case) -> dict:
    if reason := fastcl.backends()[backend].unavailable:
        return {"result": reason}
    ncu = find_tool("ncu")
    command = [sys.executable, "-m", f"{__package__}.profile", stage.device.name, backend,
               case.task, str(case.rows), str(case.width), case.dtype, str(case.keys)]  # fmt: skip
    if ncu is not None:
        kernel = re.match(r"\w+", name)[0]
        command = [
            ncu, "--clock-control", "none", "--kernel-name", f"regex:^{kernel}$",
            "--launch-count", "4", "--page", "raw", "--csv",
            *(part for section in _SECTIONS for part in ("--section", section)), *command,
        ]  # fmt: skip
    elif not stage.toy:
        return {"result": "ncu is not installed"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=max(60.0, stage.left()), env=os.environ
    )
    metrics = parse(done.stdout)
    record = {"metrics": {k: v for k, v in metrics.items() if _WANTED.search(k)}}
    if ncu is not None and not metrics:
        # no permission or no counters on this machine: not the kernels' fault
        return record | {"result": (done.stdout + done.stderr).strip()[-600:]}
    if done.returncode:
        return record | {"failed": done.stderr[-600:]}
    return record | {"result": "ok" if ncu else "the launches run; ncu is not installed"}


def parse(text: str) -> dict[str, str]:
    """Metric -> value with its unit, of the longest kernel in ncu's raw page as CSV.

    The longest, because a form of W that does not apply is launched too and returns at once.
    """
    start = text.find('"ID"')
    if start < 0:
        return {}
    rows = list(csv.DictReader(io.StringIO(text[start:])))  # names; then units; then values
    if len(rows) < 2:
        return {}
    units = rows[0]
    values = max(rows[1:], key=lambda r: float(r["gpu__time_duration.sum"].replace(",", "")))
    return {k: f"{values[k]} {units[k] or ''}".strip() for k in values if values[k] and k}


def lines(records: list[dict]) -> list[str]:
    """A row per kernel; every metric kept is in the file."""
    rows, notes = [], []
    for r in (r for r in records if r["kind"] == "kernel"):
        if not r.get("metrics"):
            notes.append(f"{r['case']}: {r.get('result', r.get('failed', ''))}")
            continue
        found = []
        for pattern in _SHOWN.values():
            hits = [v for k, v in r["metrics"].items() if re.search(pattern, k)]
            found.append(" / ".join(hits[:2]) or "-")
        rows.append((r["case"], *found))
    return ([report.plain("", ("kernel", *_SHOWN), rows)] if rows else []) + notes


def _twice(device_name: str, backend: str, case: Case) -> None:
    inputs, (contestant,) = case.inputs(device_name), fastcl_backends((backend,))
    step = contestant.builders[case.task](case)
    for _ in range(2):
        differentiate(step, contestant, inputs)
    device.of(device_name).synchronize()


if __name__ == "__main__":
    where, backend, task, rows, width, dtype, keys = sys.argv[1:]
    _twice(where, backend, Case(task, int(rows), int(width), dtype, int(keys)))

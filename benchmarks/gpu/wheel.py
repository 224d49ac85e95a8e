"""The wheel on this machine: what it serves, streams, threads, contexts, graphs.

It was built where there may have been no GPU. It is installed into a folder of its own and asked
from there, by the copy of this module that it brings, in a process per backend and dtype.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

import fastcl

from .. import device
from ..__main__ import fresh
from ..cases import Case, truth
from ..contestants import fastcl_backends
from ..measure import admit, products, reason_of
from .correctness import graph, same, side_stream, step_of, three_runs
from .stage import Stage, fatal

_DIST = Path(__file__).resolve().parents[2] / "dist"
_BACKENDS = ("cuda", "triton")
_DTYPES = ("fp32", "bf16", "fp16")


def run(stage: Stage) -> None:
    """Everything of this stage."""
    wheel = stage.wheel or next(iter(sorted(_DIST.glob("fastcl-*.whl"))), _DIST / "fastcl-*.whl")
    if not wheel.is_file():
        reason = f"there is no {wheel.name}; `make wheel` puts one into dist, also without a GPU"
        stage.add({"kind": "nothing", "case": wheel.name, "result": reason})
        return
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
        command += ["--disable-pip-version-check", "--no-cache-dir", "--target", str(site)]
        done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
        record = {"kind": "installed", "case": wheel.name, "bytes": wheel.stat().st_size}
        if done.returncode:
            stage.add(record | {"failed": done.stderr.strip()[-600:]})
            return
        stage.add(record)
        backends, dtypes = (("chunked",), ("fp32",)) if stage.toy else (_BACKENDS, _DTYPES)
        groups = [f"{backend} {dtype}" for backend in backends for dtype in dtypes]
        groups = stage.chosen(groups)
        with ThreadPoolExecutor(max(1, min(stage.workers, len(groups)))) as threads:
            for records in threads.map(lambda group: _ask(stage, site, *group.split()), groups):
                stage.add(*records)


def _ask(stage: Stage, site: Path, backend: str, dtype: str) -> list[dict]:
    """What the copy in ``site`` says of one backend and dtype."""
    command = [sys.executable, "-m", "fastcl.benchmarks.gpu.wheel", stage.device.name]
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            [*command, backend, dtype], cwd=site.parent, env=environment, capture_output=True,
            text=True, timeout=max(30.0, stage.left()),
        )  # fmt: skip
        said, ended = done.stdout, f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"
        ended = ended if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        said, ended = (error.stdout or b"").decode(), "no answer in time"
    # a line is a record, or the name of the check that begins
    texts = [line for line in said.splitlines() if line]
    records = [json.loads(text) for text in texts if text.startswith("{")]
    if records and not Path(records[0].get("file", "")).is_relative_to(site):
        ended = ended or f"not the installed copy: {records[0].get('file')}"
    if ended or not records:
        what = texts[-1] if texts and not texts[-1].startswith("{") else f"{backend} {dtype}"
        records.append({"kind": "process", "case": what, "failed": ended or "it said nothing"})
    return records


# --------------------------------------------------------------------------- in the wheel's copy


def check(on: device.Cpu, backend: str, dtype: str) -> None:
    """Print a record per check."""
    served = {n: b.unavailable or b.detail for n, b in fastcl.backends().items()}
    record = {"kind": "serves", "case": f"{backend} {dtype}", "file": fastcl.__file__}
    if reason := fastcl.backends()[backend].unavailable:
        record["failed"] = reason
    print(json.dumps(record | {"backends": served}), flush=True)
    if reason:
        return
    for number, case in enumerate(cases(on, backend, dtype)):
        for name, function in _CHECKS.items():
            if name == "beside another process" and number:
                continue  # a process is slow to start, and the kernels are not what is asked
            what = f"{name} {backend} {case.name}"
            print(what, flush=True)
            try:
                record = function(on, case, backend)
            except Exception as error:  # the next one may still go well
                record = {"failed": reason_of(error)}
                if fatal(error):
                    print(json.dumps({"kind": name, "case": what} | record), flush=True)
                    return
            print(json.dumps({"kind": name, "case": what} | record), flush=True)


def cases(on: device.Cpu, backend: str, dtype: str) -> list[Case]:
    """What is asked of ``backend``, ragged; of "cuda" what it does not leave to Triton."""
    if not on.graphs:
        return [Case("ntxent", 70, 24, dtype, 70)]
    found = [Case("ntxent", 1030, 64, dtype, 1030), Case("clip", 515, 128, dtype, 515)]
    # more than one launch holds, and queues: products by Hopper's tensor cores
    if backend != "cuda" or (dtype != "fp32" and torch.cuda.get_device_capability() == (9, 0)):
        found += [Case("ntxent", 4420, 128, dtype, 4420), Case("clip", 2210, 256, dtype, 2210)]
        found += [Case("queue", 257, 128, dtype, 4099)]
    return found


def new_thread(on: device.Cpu, case: Case, backend: str) -> dict:
    """A step of a thread that has never launched anything; its backward is autograd's thread's.

    That one has not either, in the first check of a process.
    """
    work, inputs = step_of(case, backend), case.inputs(on.name)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(work, inputs).result()
    return same(work(inputs), first)


def right(on: device.Cpu, case: Case, backend: str) -> dict:
    """Loss and gradients beside float64, and that it was the backend's own kernels."""
    (contestant,) = fastcl_backends((backend,))
    inputs = case.inputs(on.name)
    with products(case.dtype):
        exact = truth(case, max(1, 2**27 // case.keys), on.name)
        step, record = admit(contestant, case, inputs, exact, on.memory())
    if step is None:
        return record | {"failed": record["reason"]}
    launched = on.launches(lambda: step_of(case, backend)(inputs))
    if backend == "cuda" and launched is not None:
        record["kernels"] = [name for name, *_ in launched if "fastcl::cuda" in name]
        if not record["kernels"]:
            record["failed"] = "none of its kernels was launched"
    return record


def beside_another_process(on: device.Cpu, case: Case, backend: str) -> dict:
    """Steps while a second context on the same device does the same."""
    work, inputs = step_of(case, backend), case.inputs(on.name)
    first, verdict = work(inputs), {}
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(fresh, "spawn", three_runs, on, case, backend)
        while not wait([other], 0.05).done and "failed" not in verdict:
            verdict = same(work(inputs), first)
            on.synchronize()
        return verdict if "failed" in verdict else other.result()


def other_device(on: device.Cpu, case: Case, backend: str) -> dict:
    """Tensors on a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        return {"result": "one device"}
    work, inputs = step_of(case, backend), case.inputs(on.name)
    there = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in inputs]
    return same([x.cpu() for x in work(there)], [x.cpu() for x in work(inputs)])


def without_waiting(on: device.Cpu, case: Case, backend: str) -> dict:
    """A step waits for the device nowhere."""
    work, inputs = step_of(case, backend), case.inputs(on.name)
    first = work(inputs)
    with on.unsynchronized():
        again = work(inputs)
    return same(again, first)


_CHECKS: dict[str, Callable[[device.Cpu, Case, str], dict]] = {
    "new thread": new_thread,  # first: see there
    "right": right,
    "three runs": three_runs,
    "side stream": side_stream,
    "graph": graph,
    "without waiting": without_waiting,
    "other device": other_device,
    "beside another process": beside_another_process,
}


def lines(records: list[dict]) -> list[str]:
    """What serves, and how many of each check went well."""
    found = [f"wheel: {r['result']}" for r in records if r["kind"] == "nothing"]
    found += [f"{r['case']}, {r['bytes'] / 2**20:.1f} MiB" for r in records if "bytes" in r]
    serves = [r["backends"] for r in records if "backends" in r]
    found += [f"  {name}: {text or 'yes'}" for name, text in (serves[0].items() if serves else ())]
    for kind in ("serves", *_CHECKS):
        these = [r for r in records if r["kind"] == kind]
        if these:
            good = sum("failed" not in r for r in these)
            notes = ", ".join(dict.fromkeys(r["result"] for r in these if "result" in r))
            found.append(f"{kind}: {good} of {len(these)}{f' ({notes})' if notes else ''}")
    return found


if __name__ == "__main__":
    check(device.of(sys.argv[1]), *sys.argv[2:])

"""``python -m benchmarks``: fastcl beside plain PyTorch and other libraries, on this machine.

For each case three kinds of fresh processes: one times everybody as installed, one times everybody
with oneDNN and an allocator that keeps its pages ("tuned"), and one per contestant takes the peak
memory. Times are comparable within a process only, so ratios are formed there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from . import machine, measure, report
from .cases import CASES, Case, select
from .measure import Settings

# glibc gives large blocks back to the kernel at once and pays for it in page faults; this keeps
# them. A user may set the same.
_KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def fresh(method: str, function: Callable, *arguments: Any, **variables: str) -> Any:
    """``function(*arguments)`` in a process of its own.

    ``"spawn"`` starts an interpreter, with ``variables`` in its environment; ``"forkserver"`` is
    quicker: a copy of a process that has loaded the code and computed nothing.

    Raises:
        BrokenProcessPool: it was killed, as for want of memory.
    """
    context = get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([measure.__name__])
    with _environment(variables), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def run(case: Case, settings: Settings, truths: Path | None = None) -> dict:
    """Everything about one case: a record per contestant, and the ceilings."""
    with tempfile.TemporaryDirectory() as folder:
        file = str((truths or Path(folder)) / f"{case.name}.pt")
        if not Path(file).exists():
            fresh("spawn", measure.save_truth, case, file, settings)
        default = fresh("spawn", measure.timing, case, file, settings, False)
        try:
            tuned = fresh("spawn", measure.timing, case, file, settings, True, **_KEEP_PAGES)
        except BrokenProcessPool:  # kept pages add up where contestants nearly fill the memory
            tuned = {"contestants": {}, "ceiling": default["ceiling"]}
    records = default["contestants"]
    for name, record in records.items():
        record["tuned"] = tuned["contestants"].get(name, {"reason": "its process was killed"})
        if "median_ms" in record and Path("/proc/self/clear_refs").exists():
            try:
                record["memory_mb"] = fresh("forkserver", measure.peak_memory, case, name, settings)
            except BrokenProcessPool:
                record["memory_mb"] = None
    return {
        **case.describe(),
        "ceiling": default["ceiling"],
        "tuned_ceiling": tuned["ceiling"],
        "contestants": records,
    }


def in_order(results: list[dict]) -> list[dict]:
    """The last result of each case, in the order of :data:`CASES`."""
    latest = {result["case"]: result for result in results}
    return [latest[case.name] for case in CASES if case.name in latest]


def _arguments(argv: list[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu",
        help="cuda: everything of benchmarks.gpu; takes --full, --case and --out only",
    )  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small and middle sizes (default)")
    size.add_argument("--full", action="store_true", help="every case; the better part of an hour")
    parser.add_argument("--case", nargs="+", metavar="SUBSTRING", help="cases whose name holds one")
    parser.add_argument("--rounds", type=int, help="samples each; adapted to the time by default")
    parser.add_argument("--out", type=Path, metavar="DIR", help="runs/benchmarks, or runs/gpu")
    parser.add_argument("--truths", type=Path, metavar="DIR", help="keep them, and use those kept")
    parser.add_argument("--add", action="store_true", help="to what an earlier run wrote there")
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--backends", nargs="+", help="of fastcl; all usable ones by default")
    parser.add_argument("--against", nargs="*", help="parts of the others' names; all by default")
    parser.add_argument("--list", action="store_true", help="print the cases' names and stop")
    options = parser.parse_args(argv)
    options.out = options.out or Path("runs", {"cpu": "benchmarks", "cuda": "gpu"}[options.device])
    return options


def _on_gpu(options: argparse.Namespace) -> int:
    from .gpu.__main__ import main as gpu

    if not torch.cuda.is_available():
        print("--device cuda needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    only = ["--only", *options.case] if options.case else []
    return gpu(["--out", str(options.out), *([] if options.full else ["--quick"]), *only])


def main(argv: list[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Run, print, and write results.json and two pictures; returns the exit code."""
    options = _arguments(argv, prog)
    if options.device == "cuda":
        return _on_gpu(options)
    cases = select(options.case, options.full)
    if options.list or not cases:
        print("\n".join(case.name for case in (cases or select([""], True))))
        return 0 if cases else 2
    settings = Settings(
        threads=options.threads,
        rounds=options.rounds,
        seconds=20.0 if options.full else 4.0,
        backends=None if options.backends is None else tuple(options.backends),
        against=None if options.against is None else tuple(options.against),
    )
    for folder in (options.out, options.truths or options.out):
        folder.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.json"
    results = {"machine": machine.describe(settings.threads), "cases": []}
    if options.add and file.exists():
        results["cases"] = json.loads(file.read_text())["cases"]
    report.print_machine(results["machine"])
    for case in cases:
        try:
            result = run(case, settings, options.truths)
        except BrokenProcessPool:
            print(f"\n{case.name}: its process was killed, probably for want of memory")
            continue
        report.print_case(result)
        results["cases"] = in_order([*results["cases"], result])
        report.write_json(results, file)
    report.show(results, options.out)
    print(f"\nwritten to {options.out}")
    if torch.cuda.is_available():
        print(f"this was the processor; the GPU: {prog} --device cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())

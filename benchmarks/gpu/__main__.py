"""``python -m benchmarks.gpu --out DIR``: what Triton and CUDA kernels do on this machine's GPU.

    correctness   every operator and gradient of Triton against float64, graphs, streams
    sanitize      memory errors and races in the smallest launches, where compute-sanitizer is
    ceilings      what the machine can do: products, copies, exponentials, the gap between launches
    table         time, work, memory, error and launches of the losses
    peers         other libraries side by side, in one process per precision
    cuda          CUDA C++ kernels: the same checks, and which are faster than Triton
    train         SimCLR, MoCo and code search end to end, beside a CPU's scores; steps in graphs
    profile       hardware counters of the kernels that matter, where ncu is installed
    tune          times other tiles and writes a table of configurations; runs only when named

Each stage is a process of its own and ends by itself; what it did not come to, it says. DIR gets
STAGE.json while it runs, summary.txt, and two pictures of the peers. ``--toy`` takes the same way
through Triton's interpreter at toy sizes, without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

# stage -> seconds after which it begins nothing new; a command may have to end in ten minutes
BUDGETS = {
    "correctness": 450, "sanitize": 400, "ceilings": 120, "table": 480, "peers": 480, "cuda": 480,
    "train": 480, "profile": 300, "tune": 480,
}  # fmt: skip
_GRACE = 90  # seconds beyond, for what has begun


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--stage", choices=BUDGETS, help="one; by default all but tune")
    parser.add_argument("--seconds", type=float, help="budget of each stage instead of its own")
    parser.add_argument("--workers", type=int, help="processes that compile; 16 by default")
    parser.add_argument("--only", nargs="+", metavar="SUBSTRING", help="cases whose name holds one")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--toy", action="store_true", help="through the interpreter, tiny, no GPU")
    return parser.parse_args(argv)


def _in_a_process(stage: str, options: argparse.Namespace) -> int:
    """The exit code of ``stage``, run by itself; stopped with all it started if it hangs."""
    command = [sys.executable, "-m", __package__, "--out", str(options.out), "--stage", stage]
    command += [f"--{flag}" for flag in ("quick", "toy") if getattr(options, flag)]
    for name in ("seconds", "workers"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    command += ["--only", *options.only] if options.only else []
    budget = options.seconds or BUDGETS[stage]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(budget + _GRACE)
    except subprocess.TimeoutExpired:
        print(f"{stage}: stopped {_GRACE} s beyond its {budget:.0f} s", flush=True)
        return 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session: children of a crash too


def main(argv: list[str] | None = None) -> int:
    """Run one stage here, or all in processes of their own; 0 if all went well."""
    options = _arguments(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.toy:  # before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    from .. import report
    from .stage import Stage, summarize

    if options.stage is None:
        stages = [stage for stage in BUDGETS if stage != "tune"]
        failed = [stage for stage in stages if _in_a_process(stage, options)]
        print(summarize(options.out))
        if (options.out / "peers.json").exists():
            report.show(report.load(options.out), options.out)
        print(f"failed: {', '.join(failed)}" if failed else "every stage went well")
        return 1 if failed else 0

    import torch

    if not options.toy and not torch.cuda.is_available():
        print("no CUDA device; --toy runs through Triton's interpreter instead")
        return 2
    stage = Stage(
        options.stage, options.out, options.seconds or BUDGETS[options.stage],
        options.quick, options.toy, options.workers or (2 if options.toy else 16), options.only,
    )  # fmt: skip
    try:
        importlib.import_module(f".{options.stage}", __package__).run(stage)
    finally:
        stage.close()
        print(summarize(options.out, only=options.stage), flush=True)
    return 1 if stage.failures else 0


if __name__ == "__main__":
    sys.exit(main())

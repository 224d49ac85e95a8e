"""``python -m benchmarks.limits DIR``: how fast anything could be here, and what bounds fastcl.

Reads DIR/results.json and sets each target of the project beside the machine: the least arithmetic
of any exact method at the best torch.mm rate of the same run, plus a call that computes nothing,
timed now; the ratio that would give, and what fastcl reaches. Then the loops that do the
arithmetic, disassembled: how many instructions of which kind an iteration takes, and the cycles
each kind of port needs for them. Last, the same problem under each instruction set, which tells
whether wider vectors are faster ones.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fastcl
from fastcl.ops import cpu

from .cases import CASES, Case
from .contestants import fastcl_backends
from .device import CPU
from .measure import differentiate, interleave, summary

_PEERS = ("eager", "torch.compile", "best tuned")
# case -> targets against _PEERS, as the project set them on a processor whose AVX-512 is full-rate
_TARGETS = {
    "ntxent-512x128-fp32": (3.5, 4.0, 2.0),
    "ntxent-2048x128-fp32": (8.0, 7.0, None),
    "ntxent-8192x128-fp32": (12.0, 7.0, 3.5),
    "ntxent-8192x512-fp32": (5.5, 4.0, 2.2),
    "ntxent-16384x512-bf16": (5.5, 3.5, None),
    "clip-512x512-fp32": (2.5, 1.7, None),
    "clip-512x512-bf16": (1.6, 1.1, None),
    "clip-4096x512-fp32": (3.6, 2.0, 1.2),
    "queue-256x65536x128-fp32": (10.0, 4.0, 1.6),
}
# Units of N M D flop that no exact method avoids, were memory free: NT-Xent with its exponentials
# kept forms symmetric scores once and one symmetric product (benchmarks/cases.py counts two passes
# over the scores, which linear memory takes); otherwise as there.
_LEAST = {"ntxent": 3, "clip": 6, "queue": 4}


def _peer_times(result: dict) -> tuple[float | None, ...]:
    """Milliseconds of each of _PEERS; ``None`` for one that was not timed."""
    records = result["contestants"]
    others = [r.get("tuned", {}) for n, r in records.items() if not n.startswith("fastcl ")]
    tuned = [t["median_ms"] for t in others if "median_ms" in t]
    eager, compiled = (records.get(n, {}).get("median_ms") for n in _PEERS[:2])
    return eager, compiled, min(tuned, default=None)


def _share(target: float | None, time: float | None, least: float, ours: float) -> str:
    if time is None:
        return f"{'-':>24}"
    wanted = "-" if target is None else f"{target:g}"
    return f"{wanted:>8} {time / least:>7.1f} {time / ours:>7.2f}"


class _Nothing(torch.autograd.Function):
    """A loss of two inputs that computes nothing: gradients are allocated and not written."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a.new_empty(())

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def empty_call(case: Case, rounds: int = 200) -> float:
    """Median milliseconds of forward + backward of :class:`_Nothing` on the leaves of ``case``."""
    leaves = case.inputs()[:2]

    def step() -> None:
        torch.autograd.grad(_Nothing.apply(*leaves), leaves)

    return summary([CPU.seconds(step) for _ in range(rounds)])["median_ms"]


def print_targets(results: dict, call: Callable[[Case], float] = empty_call) -> None:
    """A line per target that was measured; ``call``: milliseconds of a step without arithmetic."""
    print(f"{'':26}{'':53}" + "".join(f"{name:^24}" for name in _PEERS))
    print(
        f"{'case':26}{'GFLOP':>8}{'GFLOP/s':>9}{'call us':>9}{'least ms':>9}{'fastcl':>9}"
        + f"{'share %':>9}"
        + f"{'target':>8} {'highest':>7} {'fastcl':>7}" * len(_PEERS)
    )
    by_name = {case.name: case for case in CASES}
    for result in results["cases"]:
        if result["case"] not in _TARGETS:
            continue
        case = by_name[result["case"]]
        flop = _LEAST[case.task] * case.rows * case.keys * case.width
        rate = max(result["ceiling"]["best"], result["tuned_ceiling"]["best"])
        empty = call(case)
        least = flop / rate / 1e6 + empty
        record = result["contestants"]["fastcl cpu"]
        ours, tuned = record["median_ms"], record["tuned"].get("median_ms", record["median_ms"])
        times = zip(_TARGETS[case.name], _peer_times(result), (ours, ours, tuned), strict=True)
        print(
            f"{case.name:26}{flop / 1e9:>8.2f}{rate:>9.0f}{1e3 * empty:>9.0f}"
            f"{least:>9.3g}{ours:>9.3g}{100 * least / ours:>9.0f}"
            + "".join(_share(target, time, least, mine) for target, time, mine in times)
        )
    print(
        "\n'call': an autograd function of these inputs that computes nothing. 'least': that and "
        "the arithmetic\nat the best torch.mm rate of the run; exponentials and memory free. "
        "'highest': the peer's time over it,\nthe most that any method can reach here. "
        "'best tuned' compares with fastcl's time in the tuned process."
    )


# ------------------------------------------------------------------------------------ the loops

_MULTIPLY = re.compile(r"vfmadd\w+ps|vdpbf16ps")
_LINE = re.compile(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)")


@dataclass(frozen=True)
class Loop:
    """What one iteration of an innermost loop executes, by kind, and its vector register."""

    register: str
    multiply: int
    operation: str
    broadcast: int
    load: int
    other: int


def find_loops(assembly: str, least: int = 8) -> Counter[Loop]:
    """Innermost loops with at least ``least`` multiply-adds: how often each mix occurs."""
    code = [(int(m[1], 16), m[2], m[3]) for m in map(_LINE.match, assembly.splitlines()) if m]
    index = {address: i for i, (address, _, _) in enumerate(code)}
    loops: Counter[Loop] = Counter()
    for end, (address, name, arguments) in enumerate(code):
        target = re.match(r"([0-9a-f]+)", arguments) if name[0] == "j" and name != "jmp" else None
        begin = index.get(int(target[1], 16)) if target else None
        if begin is None or code[begin][0] >= address or end - begin > 120:
            continue
        body = code[begin : end + 1]
        if any(other[0] == "j" for _, other, _ in body[:-1]):
            continue
        products = [(n, a) for _, n, a in body if _MULTIPLY.fullmatch(n)]
        if len(products) < least:
            continue
        broadcasts = sum("broadcast" in n for _, n, _ in body)
        loads = sum(n.startswith("vmov") and "(" in a for _, n, a in body)
        register = "zmm" if "%zmm" in products[0][1] else "ymm"
        others = len(body) - len(products) - broadcasts - loads
        loops[Loop(register, len(products), products[0][0], broadcasts, loads, others)] += 1
    return loops


# Operations per cycle of a Zen 4 core, timed against a chain of dependent additions (one a cycle):
# 2.0 256-bit and 1.0 512-bit vfmadd231ps, 1.0 512-bit vdpbf16ps; 1.9 256-bit and 0.95 512-bit loads
# from first-level cache; 1.95 256-bit and 1.0 512-bit vbroadcastss of a number in memory (1.9
# vpbroadcastd); 6.3 of a mix of independent additions, loads and vector operations.
_ZEN4 = {
    "ymm": {"multiply": 2, "load": 2, "broadcast": 2},
    "zmm": {"multiply": 1, "load": 1, "broadcast": 1},
}
_DISPATCH = 6


def print_loops(library: Path) -> None:
    """A line per kind of inner loop, with the cycles that each resource needs on Zen 4."""
    if not shutil.which("objdump"):
        print("no loops: objdump is not installed")
        return
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(
        f"{'loop':20}{'multiply':>9}{'broadcast':>10}{'load':>6}{'other':>6}   cycles on Zen 4: "
        f"{'multiply':>8}{'loads':>7}{'dispatch':>9}"
    )
    for loop, _ in find_loops(assembly).most_common(3):
        ports = _ZEN4[loop.register]
        total = loop.multiply + loop.broadcast + loop.load + loop.other
        loads = loop.load / ports["load"] + loop.broadcast / ports["broadcast"]
        print(
            f"{loop.operation + ' ' + loop.register:20}{loop.multiply:>9}{loop.broadcast:>10}"
            f"{loop.load:>6}{loop.other:>6}{'':>20}{loop.multiply / ports['multiply']:>8.1f}"
            f"{loads:>7.1f}{total / _DISPATCH:>9.1f}"
        )
    print("The multiply-add pipes are the bound: the rest of an iteration fits beside them.")


# ------------------------------------------------------------------------------ instruction sets


def print_instruction_sets(case: Case, seconds: float) -> None:
    """GFLOP/s of one problem under each instruction set, in one process."""
    set_isa = torch.ops.fastcl._cpu_set_isa
    names = cpu.BACKEND.detail.split("supported=")[1].split(", ")
    contestant, inputs = fastcl_backends(("cpu",))[0], case.inputs()
    step = contestant.builders[case.task](case)

    def timer(name: str):
        def run() -> float:
            set_isa(name)
            return CPU.seconds(lambda: differentiate(step, contestant, inputs))

        return run

    samples = interleave({name: timer(name) for name in names}, None, seconds)
    set_isa("")
    rates = {name: case.flop / summary(s)["median_ms"] / 1e6 for name, s in samples.items()}
    print(f"{case.name}, GFLOP/s: " + ", ".join(f"{n} {r:.0f}" for n, r in rates.items()))


def main(argv: list[str] | None = None) -> None:
    """Print all three parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where results.json is")
    parser.add_argument("--case", default="ntxent-8192x128-fp32", help="for instruction sets")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print_targets(json.loads((options.folder / "results.json").read_text()))
    if cpu.BACKEND.unavailable:
        return
    print()
    print_loops(next(Path(fastcl.__file__).parent.glob("_cpu*.so")))
    print()
    print_instruction_sets(next(c for c in CASES if c.name == options.case), options.seconds)


if __name__ == "__main__":
    main()

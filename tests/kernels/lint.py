"""Compile what the Triton backend launches, for GPUs that need not be present, and check the code.

The backend runs on tiny CPU tensors while its launches are recorded instead of executed. Every
distinct launch is then compiled ahead of time for each architecture and its machine code checked:

    no register spills                         a spill in the loop costs more than any tile saves
    tensor cores at work, wgmma on sm_90       and not serialised, as the assembler's notes tell
    shuffles per tile within budget            the sums of columns must stay inside threads
    registers and shared memory                as many programs per multiprocessor as the table says

    python tests/kernels/lint.py [--arch 80 90 100] [--quick] [--only WORDS] [--json FILE]

Compilation happens in processes of its own, because a compiler bug may end one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes per multiprocessor
# per tile; fp32 spends 12 times the products, and on sm_80 columns are spread over more warps
SHUFFLES = {("*bf16", 90): 8, ("*fp16", 90): 8, ("*fp32", 90): 32}
SHUFFLES |= {(dtype, 80): 32 for dtype in ("*bf16", "*fp16", "*fp32")}


@dataclass(frozen=True)
class Launch:
    """One kernel with the types and compile-time values of its arguments."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]
    programs: int  # per multiprocessor, as claimed; 0: nothing is claimed

    @property
    def title(self) -> str:
        shown = dict(self.constants)
        words = [self.kernel, f"D={shown.get('D', '-')}"]
        words += [f"{shown['OWN']}x{shown['OTHER']}"] if "OWN" in shown else []
        for name in ("WEIGHT", "RELATION", "BIAS", "GAIN"):
            if shown.get(name, "none") not in ("none", "any"):
                words.append(str(shown[name]))
        flags = ("SYMMETRIC", "BOTH", "MAXIMA", "GROUPED", "MEAN", "ROW_SUM", "WIDE", "BELOW")
        words += [flag.lower() for flag in flags if shown.get(flag) is True]
        if "SKIPS" in shown:
            words.append(f"skips={shown['SKIPS']}")
        types = dict(self.signature)
        words.append(types.get("own", types.get("x", types.get("a", "")))[1:])
        return " ".join(words)


@dataclass
class Report:
    """What the compiler made of a launch."""

    title: str
    arch: int
    triton: str
    registers: int = 0
    shared: int = 0
    programs: int = 0
    loop: dict = field(default_factory=dict)
    breaches: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------- recording


def record(arch: int, quick: bool) -> list[Launch]:
    """The distinct launches of the Triton backend on compute capability ``arch``.

    Triton's own launch path binds and specialises the arguments, on a device that is only named,
    and is stopped where it would compile: what is checked is what a GPU gets.
    """
    import triton
    from fastcl.kernels import launch, problem
    from triton.runtime.driver import driver

    from fastcl.ops import triton as backend

    launches: dict[Launch, None] = {}
    claimed: dict[str, int] = {}

    def note(*, fn, compile, **_):
        launches[_describe(fn.jit_function, compile, claimed)] = None
        return True  # as if somebody else had compiled it

    config = problem.Problem.config

    def remember(self, kernel):
        entry = config(self, kernel)
        names = {"weights": "write_weights", "sweep maxima": "sweep"}
        claimed[names.get(kernel, kernel)] = entry.programs
        return entry

    knobs, active = triton.knobs.runtime, driver._active
    original = problem.device, launch.matmul, config, knobs.jit_cache_hook
    problem.Problem.config, knobs.jit_cache_hook = remember, note
    problem.device = lambda index: (arch, 132)
    launch.matmul = lambda a, b, out, add: None
    driver.set_active(_Named(arch))
    try:
        for n in _sizes()[: 1 if quick else None]:
            _exercise(backend, n, quick)
    finally:
        problem.device, launch.matmul, problem.Problem.config, knobs.jit_cache_hook = original
        driver._active = active
    return list(launches)


class _Named:
    """What Triton asks of a driver before it compiles; each architecture is a device."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def _describe(kernel, compiled: dict, claimed: dict[str, int]) -> Launch:
    names = kernel.arg_names
    options = {key: compiled[key] for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    return Launch(
        kernel.fn.__module__, kernel.fn.__name__, tuple(compiled["signature"].items()),
        tuple((names[at], value) for (at,), value in compiled["constants"].items()),
        tuple(names[at] for (at,), known in compiled["configs"][0].items() if known),
        tuple(options.items()),
        claimed.get(kernel.fn.__name__, 0) if "own" in names else 0,
    )  # fmt: skip


def _sizes() -> list[int]:
    """Numbers of rows: no dense shortcut but several tiles, and past every limit of the table."""
    from fastcl.kernels.configs import ENTRIES

    return [300, *sorted({entry.rows + 1 for entry in ENTRIES if entry.rows})]


def _exercise(backend, n: int, quick: bool) -> None:
    """Call every operator of the backend in the forms the losses use, with ``n`` rows."""
    import torch
    from fastcl.kernels import launch

    scale, ids = torch.ones(()), torch.zeros(n, dtype=torch.int64)
    bias, grad = torch.ones(n), torch.ones(n)
    diagonal, views = (None, None, "any", [0]), (None, None, "any", [0, n // 2, -(n // 2)])
    different, same = (ids, ids, "different", [0]), (ids, ids, "same", [0])
    everything = [True] * 5

    def logsumexp(q, keys, key_bias, rule, columns, maxima=False, save="nothing", needs=()):
        common = (q, keys, scale, key_bias, *rule)
        backend.similarity_logsumexp(*common, columns, maxima, save, dtype)
        if needs:
            two = columns and keys is not None
            backend.similarity_logsumexp_backward(
                grad, grad if two else None, *common, grad, grad, grad, scale, "nothing",
                list(needs), dtype,
            )  # fmt: skip

    launch.classify(grad, scale, [(grad, grad)], 1.0)
    launch.classify(grad, scale, [(grad, grad), (grad[1:], grad[1:])], 1.0)
    for width, dtype in ((128, torch.bfloat16),) if quick else _forms(torch):
        q, k = torch.ones(n, width), torch.ones(n, width)
        gradients = (True, True, False, False)
        logsumexp(q, None, None, views, False, needs=gradients)  # NT-Xent
        logsumexp(q, k, None, diagonal, True, needs=gradients)  # CLIP
        logsumexp(q, k, None, (None, None, "any", []), False, save="mean_keys")  # a queue
        if quick or dtype == torch.float16:
            continue
        logsumexp(q, k, None, diagonal, False, needs=gradients)  # InfoNCE
        logsumexp(q, k, bias, different, True, maxima=True, needs=everything[:4])
        logsumexp(q, k, None, same, False, maxima=True, save="mean_keys")
        with _small_slots():
            logsumexp(q, None, None, views, False)
            logsumexp(q, k, None, diagonal, True, maxima=True)
        for phi in ("softplus", "relu", "relu_squared") if width == 128 else ("softplus",):
            common = (q, k, scale, bias, bias, *diagonal)
            backend.similarity_sum(*common, phi, dtype)
            backend.similarity_sum_backward(grad, *common, phi, everything, dtype)
        backend.similarity_topk(q, k, scale, bias, *different, 128, grad, dtype)
        if width == 128:
            for columns in (width, 50, 100):  # the last two are no vectors
                x, y = torch.ones(n, columns, dtype=dtype), torch.ones(n, columns)
                backend.l2_normalize(x, 1e-12, dtype)
                backend.l2_normalize_backward(y, x, y, grad, 1e-12, dtype)
                backend.l2_normalize_pair(x, x, 1e-12, dtype)
                rows = torch.ones(2 * n, columns)
                backend.l2_normalize_pair_backward(rows, grad, x, x, rows, rows[:, 0], 1e-12, dtype)


def _forms(torch):
    """Widths and dtypes: every bucket of the table that can differ, fp16 once."""
    for width in (16, 64, 128, 256, 768):
        yield width, torch.bfloat16
    for width in (64, 128):  # held and streamed
        yield width, torch.float32
    yield 128, torch.float16


class _small_slots:
    """Let several blocks share a slot, as they do at 46000 rows."""

    def __init__(self):
        from fastcl.kernels.configs import RULES

        self.rules = RULES

    def __enter__(self):
        self.kept, self.rules["slot_bytes"] = self.rules["slot_bytes"], 1

    def __exit__(self, *_):
        self.rules["slot_bytes"] = self.kept


# ---------------------------------------------------------------------------------- compiling


def compile_launch(launch: Launch, arch: int) -> Report:
    """Compile one launch for ``arch`` and judge its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    report = Report(launch.title, arch, triton.__version__)
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(position[name],): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    try:
        compiled = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options)
        )
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        report.breaches.append(f"does not compile: {type(error).__name__}: {error}"[:300])
        return report
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        ptx.write_text(compiled.asm["ptx"])
        target = "sm_" + str(arch) + ("a" if arch >= 90 else "")
        notes = subprocess.run(
            [get_ptxas(arch).path, "-v", f"--gpu-name={target}", str(ptx), "-o", str(cubin)],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
        cubin.write_bytes(compiled.asm["cubin"])
        code = subprocess.run(
            [str(tools / "nvdisasm"), "-c", str(cubin)], capture_output=True, text=True
        ).stdout
    report.registers = int(re.search(r"Used (\d+) registers", notes)[1])
    report.shared = compiled.metadata.shared
    report.loop = _loop(code)
    _judge(report, launch, arch, notes, code)
    return report


def _judge(report: Report, launch: Launch, arch: int, notes: str, code: str) -> None:
    spilled = sum(int(x) for x in re.findall(r"(\d+) bytes spill", notes))
    if spilled:
        report.breaches.append(f"spills {spilled} bytes")
    if re.search(r"C75\d\d|serializ|Potential Performance Loss", notes):
        report.breaches.append("wgmma is serialised")
    if launch.programs == 0:
        return
    warps, shown = dict(launch.options)["num_warps"], dict(launch.constants)
    report.programs = min(
        65536 // (-(-report.registers // 8) * 8 * 32 * warps),
        SHARED[arch] // (report.shared + 1024),
        64 // warps,
    )
    if report.programs < launch.programs:
        report.breaches.append(
            f"{report.programs} programs fit a multiprocessor; the table claims {launch.programs}"
        )
    tensor = {80: "HMMA", 90: "HGMMA", 100: "UTC"}[arch]
    small = dict(launch.signature)["own"] == "*fp32" or shown.get("OWN", 64) < 64
    if tensor not in code and not (arch != 80 and small and "HMMA" in code):
        report.breaches.append(f"no {tensor} instruction")
    budget = SHUFFLES.get((dict(launch.signature)["own"], arch), 10**6)
    budget *= 2 if shown.get("MAXIMA") else 1
    if launch.kernel == "sweep" and report.loop.get("SHFL", 0) > budget:
        report.breaches.append(f"{report.loop['SHFL']} shuffles a tile; at most {budget}")


def _loop(code: str) -> dict[str, int]:
    """Instruction mix of the innermost loop with the most tensor-core instructions."""
    labels, instructions = {}, []
    for line in code.splitlines():
        label = re.match(r"^\s*(\.L_\w+):", line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        instruction = re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if instruction:
            instructions.append(instruction[1])
    loops = []
    for i, text in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*?(\.L_\w+)", text)
        if jump and labels.get(jump[1], i + 1) <= i:
            loops.append((labels[jump[1]], i))
    innermost = [
        (begin, end)
        for begin, end in loops
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops)
    ]
    best: tuple[int, list[str]] | None = None
    for begin, end in innermost:
        body = instructions[begin : end + 1]
        count = sum("MMA" in x for x in body)
        if count and (best is None or (count, -len(body)) > (best[0], -len(best[1]))):
            best = (count, body)
    if best is None:
        return {}
    found = {"instructions": len(best[1])}
    for name in ("MMA", "MUFU.EX2", "SHFL", "BAR", "LDGSTS"):
        found[name] = sum(name in x for x in best[1])
    return found


# ---------------------------------------------------------------------------------- reporting


def lint(arches: list[int], quick: bool, only: str = "", workers: int = 2) -> list[Report]:
    """Reports of every launch, or those whose title holds ``only``, on every architecture."""
    jobs = [(x, arch) for arch in arches for x in record(arch, quick) if only in x.title]
    reports: list[Report] = []
    while jobs:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = [(job, pool.submit(compile_launch, *job)) for job in jobs]
            jobs = []
            for job, future in futures:
                try:
                    reports.append(future.result())
                    _print(reports[-1])
                except BrokenProcessPool:
                    jobs.append(job)
        if jobs:  # the first one unfinished is the one that ended its process, or next to it
            launch, arch = jobs.pop(0)
            reports.append(
                Report(launch.title, arch, "", breaches=["the compiler ended its process"])
            )
            _print(reports[-1])
    return reports


def _print(report: Report) -> None:
    loop = " ".join(f"{v} {k}" for k, v in report.loop.items() if v)
    verdict = "; ".join(report.breaches) or "ok"
    print(
        f"sm_{report.arch:<4}{report.registers:>4} regs {report.shared // 1024:>4} KB "
        f"{report.programs or '-':>2}/SM  {report.title:<66} {verdict:<10} [{loop}]",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--quick", action="store_true", help="bf16 at D = 128 only")
    parser.add_argument("--only", default="", help="launches whose title holds this")
    parser.add_argument("--json", type=Path, help="write the reports here")
    options = parser.parse_args()
    import triton

    print(f"triton {triton.__version__}")
    reports = lint(options.arch, options.quick, options.only)
    bad = sum(bool(report.breaches) for report in reports)
    if options.json:
        options.json.write_text(json.dumps([vars(report) for report in reports], indent=1))
    print(f"{len(reports)} kernels compiled, {bad} in breach")
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    warnings.simplefilter("ignore")
    sys.exit(main())

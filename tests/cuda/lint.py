"""Compile every CUDA kernel for every GPU it is shipped for, and judge the machine code.

    python tests/cuda/lint.py

fails on spilled registers, on tensor-core instructions that the assembler had to serialise, on any
other warning, on an object that lacks one of its architectures, on shared memory of fixed size, and
on a kernel of a NAME_sm90a.cu that multiplies without the warp group's instruction or starts with
other registers than its warp groups hand around. Needs nvcc and cuobjdump,
no GPU; without them it says so and judges nothing.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# per thread, as launch bounds of 384 threads give; with fewer, a warp group that takes more waits
# for ever
REGISTERS = 65536 // 384 // 8 * 8
SERIALISED = re.compile(r"C75\d\d|serializ|Potential Performance Loss")


@dataclass
class Kernel:
    """One kernel on one architecture, as its assembler and its code describe it."""

    name: str
    arch: str
    registers: int = 0
    shared: int = 0  # bytes, of fixed size: a launch is allowed all there is, and leaves none
    spills: int = 0
    products: int | None = None  # HGMMA instructions, where they are wanted
    breaches: list[str] = field(default_factory=list)


def parse_log(text: str) -> tuple[list[Kernel], list[str]]:
    """Kernels, and breaches that name none, of what ``nvcc -Xptxas=-v`` prints."""
    kernels: dict[tuple[str, str], Kernel] = {}
    complaints: list[str] = []
    kernel = None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernel = kernels.setdefault(match.groups(), Kernel(*match.groups()))
            continue
        if SERIALISED.search(line):
            named = [k for k in kernels.values() if k.name in line]
            for one in named:
                one.breaches.append("wgmma is serialised")
            complaints += [] if named else [line.strip()]
        elif re.search(r"\bwarning\b|\berror\b", line):
            complaints.append(line.strip())
        elif kernel is not None:
            _measure(kernel, line)
    for one in kernels.values():
        if one.spills:
            one.breaches.append(f"spills {one.spills} bytes")
        if one.shared:
            one.breaches.append(f"fixes {one.shared} bytes of shared memory")
    return list(kernels.values()), complaints


def _measure(kernel: Kernel, line: str) -> None:
    kernel.spills += sum(int(x) for x in re.findall(r"(\d+) bytes spill", line))
    if match := re.search(r"Used (\d+) registers", line):
        kernel.registers = int(match[1])
        shared = re.search(r"(\d+) bytes smem", line)
        kernel.shared = int(shared[1]) if shared else 0


def parse_code(text: str) -> dict[str, int]:
    """HGMMA instructions by kernel, from ``cuobjdump -sass``."""
    counts: dict[str, int] = {}
    name = ""
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
            counts.setdefault(name, 0)
        elif re.search(r"\bHGMMA\b", line):
            counts[name] += 1
    return counts


def parse_archs(text: str) -> set[str]:
    """Architectures from ``cuobjdump --list-elf --list-ptx``: ``90a`` is code, ``80+PTX`` both."""
    code = set(re.findall(r"\.sm_(\w+)\.cubin", text))
    virtual = set(re.findall(r"\.sm_(\w+)\.ptx", text))
    return {arch + "+PTX" if arch in virtual else arch for arch in code | virtual}


def judge(source: Path, archs: list[str], log: str, dump) -> tuple[list[Kernel], list[str]]:
    """Kernels of ``source`` and breaches of the file as a whole.

    Args:
        archs: it was to be compiled for.
        log: what the compiler printed.
        dump: what cuobjdump prints of its object, given options.
    """
    kernels, breaches = parse_log(log)
    found = parse_archs(dump("--list-elf", "--list-ptx"))
    if found != set(archs):
        breaches.append(f"holds {', '.join(sorted(found))}; expected {', '.join(archs)}")
    if source.stem.endswith("_sm90a"):
        counts = parse_code(dump("-sass"))
        if not kernels:
            breaches.append("holds no kernel")
        for kernel in kernels:
            kernel.products = counts.get(kernel.name, 0)
            if not kernel.products:
                kernel.breaches.append("no HGMMA instruction")
            if kernel.registers != REGISTERS:
                kernel.breaches.append(f"starts with {kernel.registers} registers")
    return kernels, breaches


def find_cuobjdump(toolkit: Path) -> str | None:
    """The toolkit's, one on the path, or that of an installed package."""
    places = [toolkit / "bin/cuobjdump", *(Path(p) for p in [shutil.which("cuobjdump")] if p)]
    for package in ("nvidia", "triton"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            places += sorted(Path(folder).rglob("bin/cuobjdump"))
    return next((str(place) for place in places if place.is_file()), None)


def _short(name: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    text = text.replace("fastcl::cuda::", "").replace("(anonymous namespace)::", "")
    text = re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", text)  # its parameters
    return text.removeprefix("void ")


def main() -> int:
    sys.path.insert(0, str(ROOT / "csrc"))
    import nvcc

    toolkit = nvcc.home()
    if toolkit is None or nvcc.missing(toolkit):
        print(f"lint-cuda: nothing judged: {nvcc.missing(toolkit)}")
        return 0
    tool = find_cuobjdump(toolkit)
    if tool is None:
        print("lint-cuda: nothing judged: cuobjdump was not found (nvidia-cuda-cuobjdump has it)")
        return 0
    bad = total = 0
    try:
        objects = nvcc.compile_all(toolkit)
    except subprocess.CalledProcessError:
        return 1  # the compiler has said why
    for source, target in zip(nvcc.sources(), objects, strict=True):
        path = ROOT / target

        def dump(*options: str, path=path) -> str:
            command = [tool, *options, str(path)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:  # it wants nvdisasm beside it, for one
                raise SystemExit(f"lint-cuda: cuobjdump {' '.join(options)}: {run.stderr.strip()}")
            return run.stdout

        log = Path(f"{path}.ptxas").read_text()
        kernels, breaches = judge(source, nvcc.archs_of(source), log, dump)
        print(f"{source.name}: {', '.join(nvcc.archs_of(source))}, {len(kernels)} kernels")
        for kernel in kernels:
            products = "" if kernel.products is None else f"{kernel.products:>4} HGMMA"
            print(
                f"  {kernel.arch:<8}{kernel.registers:>4} regs{kernel.shared:>7} B shared"
                f"{products}  {_short(kernel.name):<44} {'; '.join(kernel.breaches) or 'ok'}"
            )
        for breach in breaches:
            print(f"  BREACH {breach}")
        total += len(kernels)
        bad += len(breaches) + sum(bool(kernel.breaches) for kernel in kernels)
    print(f"{total} kernels compiled, {bad} breaches")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

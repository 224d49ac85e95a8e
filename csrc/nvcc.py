"""Compiling csrc/cuda/*.cu: for setup.py and for tests/cuda/lint.py, which judges the same objects.

Kernels know no torch, so nvcc compiles them wherever there is a CUDA toolkit: no GPU is needed and
no torch with CUDA. ``FASTCL_CUDA_ARCHS`` chooses compute capabilities, ``MAX_JOBS`` how many files
are compiled at a time.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# code for each, and PTX of the first for whatever is newer than all of them
ARCHS = "80+PTX;90a;100a"
FLAGS = ("-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v")


def home() -> Path | None:
    """The CUDA toolkit: $CUDA_HOME, that of the nvcc on the path, or the usual place."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    if nvcc:  # perhaps a script that calls the real one: that says where it lives
        command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True).stderr
        for line in said.splitlines():
            if line.startswith("#$ TOP="):
                return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    usual = Path("/usr/local/cuda")
    return usual if usual.is_dir() else None


def missing(toolkit: Path | None) -> str:
    """What ``toolkit`` lacks for a build; empty where nothing is missing."""
    if toolkit is None or not (toolkit / "bin/nvcc").is_file():
        return "nvcc was not found at build time; set CUDA_HOME to a CUDA toolkit"
    if not static_runtime(toolkit):
        return f"the CUDA toolkit {toolkit} holds no libcudart_static.a"
    return ""


def static_runtime(toolkit: Path) -> list[str]:
    """Folders of the CUDA runtime that the module carries with it."""
    folders = [toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib")]
    return [str(folder) for folder in folders if (folder / "libcudart_static.a").is_file()]


def sources() -> list[Path]:
    """Every file of kernels."""
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def archs_of(source: Path) -> list[str]:
    """What a file is compiled for: name_sm90a.cu for 90a alone, others for every arch."""
    archs = os.environ.get("FASTCL_CUDA_ARCHS") or ARCHS
    chosen = [a.strip() for a in archs.replace(",", ";").split(";") if a.strip()]
    if "_sm" not in source.stem:
        return chosen
    return [source.stem.rpartition("_sm")[2]]


def gencode(arch: str) -> list[str]:
    """nvcc's options for ``"90a"``, or for ``"80+PTX"``, which newer devices can compile."""
    number = arch.removesuffix("+PTX")
    codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def compile_all(toolkit: Path) -> list[str]:
    """Objects of all files, relative to the project; OBJECT.ptxas beside each is what nvcc and
    the assembler said of it. What is up to date is not compiled again.

    Raises:
        subprocess.CalledProcessError: a file does not compile.
    """
    # a fixed place: an editable build's own folder is thrown away with all it compiled
    place = Path("build", f"nvcc-{sys.platform}-{os.uname().machine}")
    (ROOT / place).mkdir(parents=True, exist_ok=True)
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {place}",
        "rule nvcc",
        f"  command = {shlex.quote(str(toolkit / 'bin/nvcc'))} -MMD -MF $out.d -c $in -o $out "
        f"{shlex.join(FLAGS)} $archs > $out.ptxas 2>&1 || (cat $out.ptxas; rm -f $out; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
    ]
    objects = []
    for source in sources():
        objects.append(str(place / f"{source.stem}.o"))
        archs = " ".join(flag for arch in archs_of(source) for flag in gencode(arch))
        # paths relative to the project: what is compiled in names no builder
        lines += [f"build {objects[-1]}: nvcc {source.relative_to(ROOT)}", f"  archs = {archs}"]
    script = place / "build.ninja"
    (ROOT / script).write_text("\n".join(lines) + "\n")
    ninja = shutil.which("ninja")
    command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run([*command, "-f", str(script), *jobs], cwd=ROOT, check=True)
    return objects

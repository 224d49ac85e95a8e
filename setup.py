"""Build fastcl: pure Python plus, where compilers and torch are at hand, two native modules.

FASTCL_BUILD_CPU, FASTCL_BUILD_CUDA = auto (default) | 1 (required) | 0 (skip). Auto skips only for
a missing *tool*; a compile error is always an error. Why something was not built is kept in
fastcl/_build_info.json and shown by ``fastcl info``.

The CUDA module needs nvcc (on the path, or CUDA_HOME) but neither a GPU nor a torch with CUDA.
FASTCL_CUDA_ARCHS chooses compute capabilities, MAX_JOBS how many are compiled at a time.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: runs on 2.10 and newer
PYTHON_TAG = "cp310"
# code for each, and PTX of the first for whatever is newer than all of them
CUDA_ARCHS = "80+PTX;90a;100a"

NOT_BUILT: dict[str, str] = {}


def wanted(name: str) -> str:
    value = os.environ.get(f"FASTCL_BUILD_{name}", "auto").lower()
    return {"0": "no", "off": "no", "1": "yes", "on": "yes"}.get(value, "auto")


def skip(name: str, reason: str) -> list:
    if wanted(name) == "yes":
        raise SystemExit(f"FASTCL_BUILD_{name}=1 but {reason}")
    NOT_BUILT[name.lower()] = reason
    print(f"[fastcl] {name} module not built: {reason}", file=sys.stderr)
    return []


def missing_tool(name: str) -> str:
    """What every native module needs and this machine lacks; empty where nothing is missing."""
    if wanted(name) == "no":
        return f"it was built with FASTCL_BUILD_{name}=0"
    if not (ROOT / "csrc" / name.lower()).is_dir():
        return f"the source tree holds no csrc/{name.lower()}"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return (
            f"torch was not importable at build time ({error}); install torch first and use "
            "pip install --no-build-isolation"
        )
    if not (shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")):
        return "no C++ compiler was found at build time"
    if sys.platform == "win32":
        return "the native modules are not built on Windows yet"
    return ""


def extension(name: str, *, compile_args=(), link_args=(), **options):
    """A module of csrc/NAME on the stable ABI; what differs is given."""
    from torch.utils.cpp_extension import CppExtension

    folder = ROOT / "csrc" / name
    linux = sys.platform == "linux"  # the GNU linker's options; Apple's knows none of them
    return CppExtension(
        f"fastcl._{name}",
        sorted(str(p.relative_to(ROOT)) for p in folder.glob("*.cpp")),
        depends=sorted(str(p.relative_to(ROOT)) for p in folder.glob("*.h")),
        py_limited_api=True,
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-fvisibility=hidden",
            "-Wall",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            # error texts name the source file: the project's path in it, not the builder's
            f"-ffile-prefix-map={ROOT}=fastcl",
            f"-ffile-prefix-map={sysconfig.get_path('purelib')}=include",
            *compile_args,
        ],
        extra_link_args=[*(["-Wl,--exclude-libs,ALL", "-s"] if linux else []), *link_args],
        **options,
    )


def cpu_extension() -> list:
    reason = missing_tool("CPU")
    return skip("CPU", reason) if reason else [extension("cpu")]


def cuda_home() -> Path | None:
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


def cuda_extension() -> list:
    reason = missing_tool("CUDA")
    home = None if reason else cuda_home()
    if not reason and sys.platform != "linux":
        reason = "the CUDA module is built on Linux only"
    elif not reason and (home is None or not (home / "bin/nvcc").is_file()):
        reason = "nvcc was not found at build time; set CUDA_HOME to a CUDA toolkit"
    runtime = []
    if not reason and home is not None:
        folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
        runtime = [str(p) for p in folders if (p / "libcudart_static.a").is_file()]
        if not runtime:
            reason = f"{home} holds no libcudart_static.a"
    if reason:
        return skip("CUDA", reason)
    module = extension(
        "cuda",
        include_dirs=[str(home / "include")],
        library_dirs=runtime[:1],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        # libtorch brings libtorch_cuda with it, where the symbol of the stream is; nothing else
        # here needs it, and the linker would drop it
        link_args=["-Wl,--no-as-needed", "-ltorch"],
    )
    module.nvcc = str(home / "bin/nvcc")
    return [module]


def archs_of(source: Path) -> list[str]:
    """What a kernel is compiled for: name_sm90a.cu for 90a alone, others for every arch."""
    archs = os.environ.get("FASTCL_CUDA_ARCHS") or CUDA_ARCHS
    chosen = [a.strip() for a in archs.replace(",", ";").split(";") if a.strip()]
    if "_sm" not in source.stem:
        return chosen
    only = source.stem.rpartition("_sm")[2]
    # without the one it is for, its launcher still links, and says that there is no kernel
    return [only] if only in [a.removesuffix("+PTX") for a in chosen] else chosen[:1]


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("+PTX")
    codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def compile_kernels(nvcc: str) -> list[str]:
    """Objects of csrc/cuda/*.cu; the assembler's report of each lies beside it."""
    # a fixed place: an editable build's own folder is thrown away with all it compiled
    place = Path("build", f"nvcc-{sys.platform}-{os.uname().machine}")
    (ROOT / place).mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
    lines = [
        "ninja_required_version = 1.5",
        "rule nvcc",
        f"  command = {shlex.quote(nvcc)} -MMD -MF $out.d -c $in -o $out {shlex.join(flags)} $archs"
        " > $out.ptxas 2>&1 || (cat $out.ptxas; rm -f $out; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        objects.append(str(place / f"{source.stem}.o"))
        archs = " ".join(flag for arch in archs_of(source) for flag in gencode(arch))
        # paths relative to the project: what is compiled in names no builder
        lines += [f"build {objects[-1]}: nvcc {source.relative_to(ROOT)}", f"  archs = {archs}"]
    (ROOT / place / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = shutil.which("ninja")
    command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run([*command, "-f", str(place / "build.ninja"), *jobs], cwd=ROOT, check=True)
    return objects


def build_ext_command():
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        return build_ext

    class BuildExt(BuildExtension):
        def build_extension(self, ext):
            if hasattr(ext, "nvcc"):
                ext.extra_objects = compile_kernels(ext.nvcc)
                ext.depends += ext.extra_objects
            super().build_extension(ext)

    return BuildExt


class BuildPy(build_py):
    """Also record what was not built, and keep modules of an earlier build out of this one."""

    def run(self):
        super().run()
        package = ROOT / "fastcl" if self.editable_mode else Path(self.build_lib) / "fastcl"
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("*.abi3.so"):
            stale.unlink()
        (package / "_build_info.json").write_text(json.dumps({"not_built": NOT_BUILT}) + "\n")


class Sdist(sdist):
    """Complete even where nothing is built: sources that are no package go along by folder."""

    def make_distribution(self):
        self.filelist.extend(
            str(path)
            for folder in ("csrc", "tests", "benchmarks")
            for path in Path(folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        )
        super().make_distribution()


EXTENSIONS = cpu_extension() + cuda_extension()
setup(
    packages=[
        "fastcl",
        *(f"fastcl.{p}" for p in find_packages("fastcl")),
        "fastcl.kernels",
        *(f"fastcl.kernels.{p}" for p in find_packages("kernels")),
    ],
    package_dir={"fastcl": "fastcl", "fastcl.kernels": "kernels"},
    package_data={"fastcl.kernels": ["configs.json"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": build_ext_command(), "build_py": BuildPy, "sdist": Sdist},
    options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}} if EXTENSIONS else {},
)

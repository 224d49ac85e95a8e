"""Build fastcl: pure Python plus, where compilers and torch are at hand, two native modules.

FASTCL_BUILD_CPU, FASTCL_BUILD_CUDA = auto (default) | 1 (required) | 0 (skip). Auto skips only for
a missing *tool*; a compile error is always an error. Why something was not built is kept in
fastcl/_build_info.json and shown by ``fastcl info``.

The CUDA module needs nvcc (on the path, or CUDA_HOME) but neither a GPU nor a torch with CUDA.
csrc/nvcc.py compiles its kernels.
"""

import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
import nvcc  # noqa: E402

TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: runs on 2.10 and newer
PYTHON_TAG = "cp310"

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


def missing(name: str) -> str:
    """What a native module needs and this machine lacks; empty where nothing is missing."""
    if wanted(name) == "no":
        return f"it was built with FASTCL_BUILD_{name}=0"
    if sys.platform == "win32" or (name == "CUDA" and sys.platform != "linux"):
        return f"the {name} module is not built on {sys.platform} yet"
    if not (shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")):
        return "no C++ compiler was found at build time"
    if name == "CUDA" and (reason := nvcc.missing(nvcc.home())):
        return reason
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return (
            f"torch was not importable at build time ({error}); install torch first and use "
            "pip install --no-build-isolation"
        )
    return ""


def extension(name: str, *, link_args=(), **options):
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
        ],
        extra_link_args=[*(["-Wl,--exclude-libs,ALL", "-s"] if linux else []), *link_args],
        **options,
    )


def cpu_extension() -> list:
    reason = missing("CPU")
    return skip("CPU", reason) if reason else [extension("cpu")]


def cuda_extension() -> list:
    reason = missing("CUDA")
    if reason:
        return skip("CUDA", reason)
    toolkit = nvcc.home()
    module = extension(
        "cuda",
        include_dirs=[str(toolkit / "include")],
        library_dirs=nvcc.static_runtime(toolkit)[:1],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        # libtorch brings libtorch_cuda with it, where the symbol of the stream is; nothing else
        # here needs it, and the linker would drop it
        link_args=["-Wl,--no-as-needed", "-ltorch"],
    )
    module.toolkit = toolkit
    return [module]


def build_ext_command():
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def build_extension(self, ext):
            if hasattr(ext, "toolkit"):
                ext.extra_objects = nvcc.compile_all(ext.toolkit)
                ext.depends += ext.extra_objects
            super().build_extension(ext)

    return BuildExt


class BuildPy(build_py):
    """Also record what was not built, and keep files of an earlier build out of this one."""

    def run(self):
        package = ROOT / "fastcl" if self.editable_mode else Path(self.build_lib) / "fastcl"
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("*.abi3.so"):
            stale.unlink()
        (package / "_build_info.json").write_text(json.dumps({"not_built": NOT_BUILT}) + "\n")


class Sdist(sdist):
    """Complete even where nothing is built: sources that are no package go along by folder."""

    def make_distribution(self):
        self.filelist.extend(
            str(path)
            for folder in ("csrc", "tests", "benchmarks", "docs")
            for path in Path(folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        )
        self.filelist.extend(["Makefile", "CHANGELOG.md", "CONTRIBUTING.md"])
        super().make_distribution()


EXTENSIONS = cpu_extension() + cuda_extension()
setup(
    packages=[
        "fastcl",
        *(f"fastcl.{p}" for p in find_packages("fastcl")),
        "fastcl.kernels",
        *(f"fastcl.kernels.{p}" for p in find_packages("kernels")),
        "fastcl.benchmarks",
        *(f"fastcl.benchmarks.{p}" for p in find_packages("benchmarks")),
    ],
    package_dir={
        "fastcl": "fastcl",
        "fastcl.kernels": "kernels",
        "fastcl.benchmarks": "benchmarks",
    },
    include_package_data=False,  # benchmarks/results lies in a package's folder and stays here
    package_data={"fastcl.kernels": ["configs.json"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_py": BuildPy, "sdist": Sdist}
    | ({"build_ext": build_ext_command()} if EXTENSIONS else {}),
    options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}} if EXTENSIONS else {},
)

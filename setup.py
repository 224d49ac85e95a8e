"""Build fastcl: pure Python plus, where a compiler and torch are at hand, the native CPU module.

FASTCL_BUILD_CPU = auto (default) | 1 (required) | 0 (skip). Auto skips only for a missing *tool*;
a compile error is always an error. Why something was not built is kept in
fastcl/_build_info.json and shown by ``fastcl info``.
"""

import json
import os
import shutil
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


def cpu_extension() -> list:
    if wanted("CPU") == "no":
        return skip("CPU", "it was built with FASTCL_BUILD_CPU=0")
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
    if not sources:
        return skip("CPU", "the source tree holds no csrc/cpu")
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        return skip(
            "CPU",
            f"torch was not importable at build time ({error}); install torch first and use "
            "pip install --no-build-isolation",
        )
    if not (shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")):
        return skip("CPU", "no C++ compiler was found at build time")
    if sys.platform == "win32":
        return skip("CPU", "the native module is not built on Windows yet")
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.h"))
    return [
        CppExtension(
            "fastcl._cpu",
            sources,
            depends=headers,
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
            # the GNU linker's; Apple's knows neither
            extra_link_args=["-Wl,--exclude-libs,ALL", "-s"] if sys.platform == "linux" else [],
        )
    ]


def build_ext_command():
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        return build_ext
    return BuildExtension


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


EXTENSIONS = cpu_extension()
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

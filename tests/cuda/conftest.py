"""CUDA kernels without a GPU: csrc/cuda compiled for the host, on the machine of emulation.h."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = "g++"  # the kernels' sources rely on GNU extensions only where nvcc does
FLAGS = (
    "-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-fno-gnu-unique",
    "-DFASTCL_EMULATED",
)  # fmt: skip


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """``emulated("small_batch", ...)``: csrc/cuda/small_batch.cu, ... as a library, compiled once.

    Call ``library.fastcl_emulate(multiprocessors, blocks, shared, seed)`` before a launch to choose
    the machine: how many multiprocessors it has, how many blocks each holds at a time, bytes of
    shared memory per block, and the order in which threads run.
    """
    if shutil.which(COMPILER) is None:
        pytest.skip(f"needs {COMPILER}")
    folder = tmp_path_factory.mktemp("cuda")
    libraries = {}

    def load(*names: str) -> ctypes.CDLL:
        if names not in libraries:
            sources = [ROOT / f"csrc/cuda/{name}.cu" for name in names]
            library = folder / f"{'+'.join(names)}.so"
            folders = (f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/cuda'}")
            command = [COMPILER, *FLAGS, *folders, "-x", "c++", *sources, "-o", library]
            subprocess.run(command, check=True)
            libraries[names] = ctypes.CDLL(str(library))
            libraries[names].fastcl_emulate.argtypes = (
                ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint,
            )  # fmt: skip
            libraries[names].fastcl_emulate.restype = None
        return libraries[names]

    return load

"""The kernels on AArch64, emulated; skipped without a cross compiler and an emulator."""

import shutil
import subprocess

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR}",
)
def test_neon(root, tmp_path):
    folder = root / "csrc" / "cpu"
    sources = [p for p in sorted(folder.glob("*.cpp")) if p.name != "bindings.cpp"]
    program = tmp_path / "emulated"
    command = [COMPILER, "-O2", "-std=c++20", "-static", f"-I{folder}", "-o", program]
    subprocess.run([*command, root / "tests/cpu/emulated.cpp", *sources], check=True)
    run = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout

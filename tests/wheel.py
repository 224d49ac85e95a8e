"""One wheel for every torch: what is in it, and its tests in fresh environments.

    python tests/wheel.py dist/*.whl --sdist dist/*.tar.gz --torch torch==2.13.0

The wheel is looked at first: its tag, its contents, what its modules need from the machine, the
GPUs they hold code for; a source distribution must build the same again. Then it is installed
beside each torch, outside the checkout, says what it can do there, and passes the tests that need
no GPU. Environments are kept under ``build/wheel`` and used again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build/wheel"
# `fastcl check`, which test_cli runs, compares every backend's numbers with the float64 oracle
TESTS = (
    "test_install.py", "test_cli.py", "ops/test_autograd.py", "ops/test_errors.py",
    "ops/test_fused.py", "ops/test_registry.py", "losses/test_known_answers.py",
    "cpu/test_determinism.py", "cpu/test_gradients.py", "cpu/test_layout.py",
    "memory/test_errors.py",
)  # fmt: skip
# the tools' own packages must not pass for installed ones
CLEAN = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
CLEAN["OMP_NUM_THREADS"] = "1"
# versions of libc, libm and the C++ runtime, or C functions that torch promises to keep
STABLE = re.compile(
    r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^(aoti_torch|torch)_\w+$"
    # the C++ runtime's own templates, which torch may export as well, without a version
    r"|^_Z(T[VIST])?N?K?[RO]?S[tabsiod]"
)


def unstable_symbols(module: Path) -> list[str]:
    """What ``module`` needs from outside that may change with torch's version."""
    command = ["nm", "-D", "--undefined-only", str(module)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in text.splitlines()]
    needed = [words[-1] for words in pairs if words[-2] == "U"]  # w: it can do without
    return [name for name in needed if not STABLE.search(name)]


def newest_glibc(module: Path) -> str:
    """The oldest libc that ``module`` loads with."""
    text = subprocess.run(["nm", "-D", str(module)], capture_output=True, text=True).stdout
    found = {tuple(map(int, v.split("."))) for v in re.findall(r"@GLIBC_([\d.]+)", text)}
    return ".".join(map(str, max(found, default=(0,))))


def check_contents(wheel: Path, python: str) -> list[str]:
    """What is wrong with ``wheel`` itself."""
    sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tests/cuda")]
    import lint
    import nvcc

    wrong = []
    if not re.search(r"-cp310-abi3-\w+\.whl$", wheel.name):
        wrong.append(f"{wheel.name} is not tagged cp310-abi3")
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        tops = {path.name for path in Path(folder).iterdir()}
        if {top for top in tops if not top.endswith(".dist-info")} != {"fastcl"}:
            wrong.append(f"it holds {', '.join(sorted(tops))}")
        modules = sorted(Path(folder, "fastcl").glob("*.so"))
        if [module.name.partition(".")[0] for module in modules] != ["_cpu", "_cuda"]:
            wrong.append(f"its modules are {', '.join(m.name for m in modules) or 'missing'}")
        for module in modules:
            unstable = unstable_symbols(module)
            if unstable:
                wrong.append(f"{module.name} needs {', '.join(unstable)}")
            named = [p for p in (ROOT, sysconfig.get_path("purelib"))
                     if os.fsencode(p) in module.read_bytes()]  # fmt: skip
            if named:
                wrong.append(f"{module.name} names a folder of its builder")
            size = module.stat().st_size / 2**20
            print(f"{module.name}: {size:.1f} MiB, glibc {newest_glibc(module)} or newer")
        tool = lint.find_cuobjdump(nvcc.home() or Path("/none"))
        if tool is None:
            wrong.append("cuobjdump was not found")
        else:
            command = [tool, "--list-elf", "--list-ptx", str(modules[-1])]
            text = subprocess.run(command, capture_output=True, text=True).stdout
            archs = lint.parse_archs(text)
            print(f"{modules[-1].name}: code for {', '.join(sorted(archs))}")
            if archs != set(nvcc.ARCHS.split(";")):
                wrong.append(f"it holds code for {sorted(archs)}; expected {nvcc.ARCHS}")
    audit = subprocess.run(
        [python, "-m", "abi3audit", "--strict", str(wheel)], capture_output=True, text=True
    )
    print((audit.stdout + audit.stderr).strip())
    if audit.returncode:
        wrong.append("abi3audit found a violation")
    return wrong


def check_sdist(sdist: Path, wheel: Path) -> list[str]:
    """What a wheel built from ``sdist`` lacks beside ``wheel``, compiled modules apart."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
        command += ["--disable-pip-version-check", "-w", folder, str(sdist)]
        leave_out = {"FASTCL_BUILD_CPU": "0", "FASTCL_BUILD_CUDA": "0"}
        if subprocess.run(command, env=CLEAN | leave_out).returncode:
            return [f"{sdist.name} does not build"]
        (again,) = Path(folder).glob("*.whl")
        found, wanted = (
            {name for name in zipfile.ZipFile(path).namelist() if ".dist-info" not in name}
            for path in (again, wheel)
        )
    lost = sorted(name for name in wanted - found if not name.endswith(".so"))
    return [f"{sdist.name} lacks {', '.join(lost)}"] if lost else []


def check_environment(wheel: Path, torch: str, python: str) -> list[str]:
    """What goes wrong with ``wheel`` beside ``torch``."""
    environment = _environment(torch, python)
    own = environment / "bin/python"
    command = [own, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel]
    subprocess.run(command, check=True, env=CLEAN)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder, "tests"))
        where = subprocess.run(
            [own, "-c", "import fastcl; print(fastcl.__file__)"], cwd=folder, env=CLEAN,
            capture_output=True, text=True,
        )  # fmt: skip
        if where.returncode or not where.stdout.startswith(str(environment)):
            return [f"{torch}: import gives {where.stdout}{where.stderr[-2000:]}"]
        info = subprocess.run(
            [environment / "bin/fastcl", "info"], cwd=folder, env=CLEAN, capture_output=True,
            text=True,
        )  # fmt: skip
        print(info.stdout + info.stderr)
        wrong = [] if info.returncode == 0 else [f"{torch}: fastcl info fails"]
        lines = {
            words[0]: words[1:] for line in info.stdout.splitlines() if (words := line.split())
        }
        if lines.get("cpu", [""])[0] != "yes":
            wrong.append(f"{torch}: the CPU module does not serve")
        reason = " ".join(lines.get("cuda", ["", "missing"])[1:])
        if "not built" in reason or "does not load" in reason or not reason:
            wrong.append(f"{torch}: the CUDA module is {reason or 'missing'}")
        (Path(folder) / "pytest.ini").write_text(
            "[pytest]\naddopts = --import-mode=importlib -q -p no:cacheprovider\n"
        )
        tests = subprocess.run(
            [environment / "bin/pytest", *(f"tests/{test}" for test in TESTS)],
            cwd=folder,
            env=CLEAN,
        )
        return wrong + ([f"{torch}: tests fail"] if tests.returncode else [])


def _environment(torch: str, python: str) -> Path:
    version = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    place = PLACE / f"python{version}-{torch.replace('==', '-')}"
    if not (place / ".ready").exists():
        print(f"making {place.relative_to(ROOT)}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([python, "-m", "venv", place], check=True, env=CLEAN)
        install = [place / "bin/python", "-m", "pip", "install", "-q", "--no-cache-dir"]
        install += ["--disable-pip-version-check"]
        subprocess.run([*install, torch], check=True, env=CLEAN)
        subprocess.run([*install, "pytest>=8", "numpy>=1.26"], check=True, env=CLEAN)
        (place / ".ready").touch()
    return place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--sdist", type=Path, help="of the same sources")
    parser.add_argument("--torch", nargs="*", default=[], help="requirements, one per environment")
    parser.add_argument("--python", default=sys.executable, help="of the environments")
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    wrong = check_contents(wheel, sys.executable)
    if options.sdist:
        wrong += check_sdist(options.sdist.resolve(), wheel)
    for torch in options.torch:
        print(f"\n== {wheel.name} beside {torch}", flush=True)
        try:
            wrong += check_environment(wheel, torch, options.python)
        except subprocess.CalledProcessError as error:
            wrong.append(f"{torch}: {error}")
    print("\n".join(f"WRONG {what}" for what in wrong) or f"\n{wheel.name}: all is well")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

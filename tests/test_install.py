"""What a wheel holds, how it behaves outside the checkout, and what a build says it left out."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

USE = """
import importlib.util, json, torch, fastcl, fastcl.kernels
z = torch.randn(8, 4, requires_grad=True)
fastcl.NTXentLoss()(z, z + 1).backward()
print(json.dumps({
    "file": fastcl.__file__,
    "kernels": fastcl.kernels.__name__,
    "top_level_kernels": importlib.util.find_spec("kernels") is not None,
    "cpu": fastcl.backends()["cpu"].unavailable,
    "finite": bool(torch.isfinite(z.grad).all()),
}))
"""


@pytest.fixture
def source(tmp_path, root):
    """A copy of what a build needs, so that nothing is written into the checkout."""
    if not (root / "setup.py").exists():
        pytest.skip("needs the source tree")
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    for name in ("fastcl", "kernels", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
        shutil.copytree(root / name, copy / name, ignore=ignored)
    return copy


def build(source, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    command += ["--disable-pip-version-check", "-w", str(source / "dist"), str(source)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def test_pure_wheel_outside_the_checkout(source, tmp_path):
    result = build(source, FASTCL_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fastcl"}
    assert "fastcl/kernels/__init__.py" in names

    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    # -S would hide torch as well; -P and a first place on the path leave only the wheel's fastcl
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{USE}"],
        cwd=elsewhere, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert said["file"].startswith(str(site))
    assert said["kernels"] == "fastcl.kernels"
    assert not said["top_level_kernels"]
    assert said["cpu"] == "not built: it was built with FASTCL_BUILD_CPU=0"
    assert said["finite"]


def test_build_without_a_compiler(source):
    hidden = {"CXX": "no-such-compiler", "PATH": str(source)}
    result = build(source, FASTCL_BUILD_CPU="auto", **hidden)
    assert result.returncode == 0, result.stderr
    (wheel,) = (source / "dist").glob("*-py3-none-any.whl")
    info = json.loads(zipfile.ZipFile(wheel).read("fastcl/_build_info.json"))
    assert info["not_built"]["cpu"] == "no C++ compiler was found at build time"
    forced = build(source, FASTCL_BUILD_CPU="1", **hidden)
    assert forced.returncode != 0
    assert "FASTCL_BUILD_CPU=1 but no C++ compiler" in forced.stderr + forced.stdout


def test_kernels_is_a_subpackage():
    import fastcl.kernels

    assert fastcl.kernels.__name__ == "fastcl.kernels"
    assert importlib.util.find_spec("kernels") is None


def test_native_module_needs_only_the_stable_abi_and_names_no_builder(root):
    import fastcl

    package = os.path.dirname(fastcl.__file__)
    modules = [f for f in os.listdir(package) if f.startswith("_cpu") and f.endswith(".so")]
    if not modules or not shutil.which("nm"):
        pytest.skip("no native module, or no nm")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", os.path.join(package, modules[0])],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    unstable = [s for s in symbols.splitlines() if " at::" in s or " c10::" in s or " torch::" in s]
    assert not unstable
    assert "aoti_torch" in symbols
    with open(os.path.join(package, modules[0]), "rb") as file:
        binary = file.read()
    for path in (root, sysconfig.get_path("purelib")):
        assert os.fsencode(path) not in binary

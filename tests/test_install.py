"""What a wheel holds, how it behaves outside the checkout, and what a build says it left out."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

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
def checkout(root):
    """The source tree, which tests of an installed wheel have not."""
    if not (root / "setup.py").exists():
        pytest.skip("needs the source tree")
    return root


@pytest.fixture
def source(tmp_path, checkout):
    """A copy of what a build needs, so that nothing is written into the checkout."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(checkout / name, copy)
    for name in ("fastcl", "kernels", "benchmarks", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
        shutil.copytree(checkout / name, copy / name, ignore=ignored)
    return copy


def build(source, **environment):
    """A wheel of ``source``; without the CUDA module unless the environment asks for it."""
    environment = {"FASTCL_BUILD_CUDA": "0"} | environment
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    command += ["--disable-pip-version-check", "-w", str(source / "dist"), str(source)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def test_pure_wheel_outside_the_checkout(source, tmp_path):
    earlier = source / "build/lib/fastcl"
    earlier.mkdir(parents=True)
    (earlier / "removed_since.py").touch()
    result = build(source, FASTCL_BUILD_CPU="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fastcl"}
    assert "fastcl/kernels/__init__.py" in names
    assert "fastcl/benchmarks/gpu/__main__.py" in names
    assert not any("results" in name for name in names)
    assert "fastcl/removed_since.py" not in names

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
    if sys.platform == "linux":
        bench_from(site, elsewhere)
    stage_of_the_wheel(source, tmp_path / "gpu")


def bench_from(site, elsewhere):
    """``fastcl bench`` with the wheel and torch alone: pictures and colours are what is lost."""
    for name in ("matplotlib", "rich"):
        (elsewhere / f"{name}.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-c", "from fastcl.cli import main; raise SystemExit(main())"]
    command += ["bench", "--case", "ntxent-64x32-fp32", "--rounds", "1", "--threads", "1"]
    command += ["--backends", "chunked", "--against", "eager"]
    run = subprocess.run(
        command, cwd=elsewhere, env=os.environ | {"PYTHONPATH": f"{site}:{elsewhere}"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "no pictures: matplotlib is not installed" in run.stdout
    written = elsewhere / "runs/benchmarks"
    assert [file.name for file in written.iterdir()] == ["results.json"]
    (case,) = json.loads((written / "results.json").read_text())["cases"]
    assert set(case["contestants"]) == {"fastcl chunked", "eager"}
    for record in case["contestants"].values():
        assert record["median_ms"] > 0
        assert record["memory_mb"] >= 0


def stage_of_the_wheel(source, out):
    """What a GPU is asked about dist/'s wheel, as far as a processor can answer."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--stage", "wheel", "--out", out]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    records = json.loads((out / "wheel.json").read_text())["records"]
    assert [record["kind"] for record in records] == [
        "installed", "serves", "new thread", "right", "three runs", "side stream", "graph",
        "without waiting", "other device", "beside another process",
    ]  # fmt: skip


def test_build_without_a_compiler(source):
    hidden = {"CXX": "no-such-compiler", "PATH": str(source)}
    result = build(source, FASTCL_BUILD_CPU="auto", FASTCL_BUILD_CUDA="auto", **hidden)
    assert result.returncode == 0, result.stderr
    (wheel,) = (source / "dist").glob("*-py3-none-any.whl")
    info = json.loads(zipfile.ZipFile(wheel).read("fastcl/_build_info.json"))
    assert info["not_built"] == dict.fromkeys(
        ("cpu", "cuda"), "no C++ compiler was found at build time"
    )


@pytest.fixture
def toolkit(tmp_path):
    """A folder that looks like a CUDA toolkit."""
    (tmp_path / "toolkit/bin").mkdir(parents=True)
    (tmp_path / "toolkit/bin/nvcc").touch()
    return tmp_path / "toolkit"


@pytest.mark.parametrize(
    ("module", "environment", "reason"),
    [
        ("CPU", {"CXX": "none", "PATH": "/none"}, "no C++ compiler was found at build time"),
        ("CUDA", {"CXX": "none", "PATH": "/none"}, "no C++ compiler was found at build time"),
        ("CUDA", {"CUDA_HOME": "/none"}, "nvcc was not found at build time; set CUDA_HOME"),
        ("CUDA", {"CUDA_HOME": "toolkit"}, "toolkit holds no libcudart_static.a"),
        ("CPU", {"PYTHONPATH": "no torch"}, "torch was not importable at build time"),
    ],
)
def test_a_missing_tool_is_named_and_where_required_an_error(
    module, environment, reason, toolkit, tmp_path, checkout
):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('none here')")
    places = {"toolkit": str(toolkit), "no torch": str(tmp_path)}
    environment = {key: places.get(value, value) for key, value in environment.items()}
    other = {"CPU": "CUDA", "CUDA": "CPU"}[module]

    def configure(wanted):
        return subprocess.run(
            [sys.executable, "setup.py", "--name"], cwd=checkout, capture_output=True, text=True,
            env=os.environ | environment
            | {f"FASTCL_BUILD_{module}": wanted, f"FASTCL_BUILD_{other}": "0"},
        )  # fmt: skip

    left_out, required = configure("auto"), configure("1")
    assert left_out.returncode == 0
    assert f"{module} module not built: " in left_out.stderr
    assert reason in left_out.stderr
    assert required.returncode != 0
    assert f"FASTCL_BUILD_{module}=1 but " in required.stderr
    assert reason in required.stderr


def test_a_source_distribution_is_complete(source, root):
    """Where nothing is built, so that no source is listed because a module needs it."""
    copied = ("Makefile", "CHANGELOG.md", "CONTRIBUTING.md")
    for name in copied:
        shutil.copy(root / name, source)
    for name in ("tests", "docs"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    expected = {
        str(path.relative_to(source)) for path in source.rglob("*")
        if path.is_file() and path.name != "_build_info.json"
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=source, capture_output=True, text=True,
        env=os.environ | {"FASTCL_BUILD_CPU": "0", "FASTCL_BUILD_CUDA": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert len(expected) > 150
    assert expected <= names
    assert not any("__pycache__" in name or name.endswith(".so") for name in names)


def test_kernels_is_a_subpackage():
    import fastcl.kernels

    assert fastcl.kernels.__name__ == "fastcl.kernels"
    assert importlib.util.find_spec("kernels") is None


def test_a_module_that_does_not_load_costs_a_backend_with_a_reason(tmp_path):
    """As with another torch (a symbol that is not there) and another platform (no such file)."""
    from fastcl.ops import native

    assert "build it with: pip install" in native.load("x", int, tmp_path)
    (tmp_path / "_build_info.json").write_text('{"not_built": {"x": "no tool"}}')
    assert native.load("x", int, tmp_path) == "not built: no tool"
    library = tmp_path / "_x.abi3.so"
    library.write_text("not a library")
    assert native.load("x", int, tmp_path).startswith("does not load: OSError: ")
    if shutil.which("cc") is None:
        return
    code = "extern int torch_of_tomorrow; int *p = &torch_of_tomorrow;"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=code, text=True, check=True)
    reason = native.load("x", int, tmp_path)
    assert "undefined symbol: torch_of_tomorrow" in reason
    assert "\n" not in reason
    subprocess.run(command, input="int p;", text=True, check=True)
    assert native.load("x", lambda: 1 / 0, tmp_path).startswith("does not load: ZeroDivisionError")


@pytest.mark.parametrize(
    ("torch_cuda", "runtime", "driver", "reason"),
    [
        (None, 13000, 13010, "this torch has no CUDA"),
        ("13.0", 13000, 0, "no NVIDIA driver was found"),
        ("12.8", 13000, 12080, "the NVIDIA driver is for CUDA 12.8; this module needs one for "
         "CUDA 13.0 or newer"),
        ("12.8", 13000, 13000, ""),
        ("13.2", 13020, 13000, ""),  # drivers of one major version serve all its runtimes
        ("13.0", 13000, 14010, ""),
    ],
)  # fmt: skip
def test_why_cuda_kernels_cannot_be_launched(torch_cuda, runtime, driver, reason):
    from fastcl.ops import cuda

    assert cuda._unavailable(torch_cuda, runtime, driver) == reason


def test_info_where_torch_sees_no_gpu(monkeypatch, capsys):
    import torch

    from fastcl import cli
    from fastcl.ops import Backend

    backend = Backend("cuda", None, devices=("cuda",), detail="CUDA 13.0, driver 13.0")
    monkeypatch.setattr(cli, "backends", lambda: {"cuda": backend})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cli.info()
    assert "cuda       no   torch sees no GPU (CUDA 13.0, driver 13.0)" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["cpu", "cuda"])
def test_native_modules_need_only_the_stable_abi_and_name_no_builder(module, root):
    import fastcl

    package = Path(fastcl.__file__).parent
    libraries = list(package.glob(f"_{module}*.so"))
    if not libraries or not shutil.which("nm"):
        pytest.skip("no native module, or no nm")
    path = Path(__file__).with_name("wheel.py")
    spec = importlib.util.spec_from_file_location("check_wheel", path)
    wheel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheel)
    assert wheel.unstable_symbols(libraries[0]) == []
    assert wheel.STABLE.search("aoti_torch_get_dim")
    assert wheel.STABLE.search("memcpy@GLIBC_2.14")
    for unstable in ("_ZN2at4_ops2mm4callERKNS_6TensorES4_", "_ZN3c105ErrorC1E", "cudaMalloc"):
        assert not wheel.STABLE.search(unstable)
    for folder in (root, sysconfig.get_path("purelib")):
        assert os.fsencode(folder) not in libraries[0].read_bytes()

"""A fast part of ``make lint-kernels``: the commonest kernels, compiled for sm_90."""

import importlib.util
import os
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")


pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled then"
)


@pytest.fixture
def lint(root, monkeypatch):
    """tests/kernels/lint.py, also for the processes it starts."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), *sys.path]))
    path = root / "tests/kernels/lint.py"
    spec = importlib.util.spec_from_file_location("lint_kernels", path)
    lint = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lint_kernels", lint)
    monkeypatch.syspath_prepend(str(path.parent))
    spec.loader.exec_module(lint)
    return lint


def test_kernels_compile_without_spills_or_serialisation(lint):
    reports = [lint.compile_launch(launch, 90) for launch in lint.record(90, quick=True)]
    assert len(reports) > 10
    assert [(r.title, r.breaches) for r in reports if r.breaches] == []


def test_no_launch_leaves_fusion_open(lint, monkeypatch):
    """Triton 3.9 warns of that, and the default of 3.10 makes other code than was looked at."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    monkeypatch.setattr(lint, "_sizes", lambda: [300])
    launches = lint.record(90, quick=False)
    assert {x.kernel for x in launches} >= {"sweep", "gains", "add_slots", "topk", "pair_forward"}
    assert [x.title for x in launches if not dict(x.options)["enable_fp_fusion"]] == []


def test_nothing_waits_for_the_device(lint, monkeypatch):
    """A CUDA graph can hold every call: no number is read back, and none is copied there."""
    from fastcl.kernels import problem
    from triton.runtime.jit import JITFunction

    from fastcl.ops import triton as backend

    class OnDevice(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
            places = {x.device.type for x in tensors if isinstance(x, torch.Tensor)}
            assert places <= {"meta"}, f"{function} touches {places}"
            return result

    def refuse(*_, **__):
        raise AssertionError("a number of the host is copied to the device")

    monkeypatch.setattr(torch, "tensor", refuse)
    monkeypatch.setattr(torch, "as_tensor", refuse)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(problem, "device", lambda _: (90, 132))
    with torch.device("meta"), OnDevice():  # what has no numbers cannot be asked for one
        lint._exercise(backend, 300, quick=False)

"""A fast part of ``make lint-kernels``: the commonest kernels, compiled for sm_90."""

import importlib.util
import os
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled then")
def test_kernels_compile_without_spills_or_serialisation(root, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), *sys.path]))
    path = root / "tests/kernels/lint.py"
    spec = importlib.util.spec_from_file_location("lint_kernels", path)
    lint = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lint_kernels", lint)
    monkeypatch.syspath_prepend(str(path.parent))
    spec.loader.exec_module(lint)
    reports = [lint.compile_launch(launch, 90) for launch in lint.record(90, quick=True)]
    assert len(reports) > 10
    assert [(r.title, r.breaches) for r in reports if r.breaches] == []

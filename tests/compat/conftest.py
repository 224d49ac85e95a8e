import importlib.util
import sys

import pytest

import fastcl.compat


@pytest.fixture(scope="session")
def pml():
    """fastcl.compat.pytorch_metric_learning as it is where that library is not installed."""
    place = f"{fastcl.compat.__path__[0]}/pytorch_metric_learning.py"
    spec = importlib.util.spec_from_file_location("fastcl.compat.pml_alone", place)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_metric_learning", None)
        sys.modules[spec.name] = module  # where pickle looks for its classes
        spec.loader.exec_module(module)
    return module

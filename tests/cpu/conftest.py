"""Every test here runs on the compiled CPU backend, under each instruction set the machine has."""

import os

import pytest
import torch

from fastcl.ops import cpu

OPS = torch.ops.fastcl
if cpu.BACKEND.unavailable:
    collect_ignore_glob = ["test_*.py"]
    ISAS = []
else:
    ISAS = OPS._cpu_info().split("supported=")[1].split(", ")


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", ISAS, indirect=True)


@pytest.fixture
def isa(request):
    """Run under one instruction set."""
    OPS._cpu_set_isa(request.param)
    yield request.param
    OPS._cpu_set_isa(os.environ.get("FASTCL_CPU_ISA", ""))

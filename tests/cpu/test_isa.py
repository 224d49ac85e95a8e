"""Every operator on every instruction set, judged like any backend: error at most twice that of
plain PyTorch in the same dtype, plus round-off (fastcl.testing)."""

import os
import subprocess
import sys

import pytest
import torch

from fastcl.testing import BIASED, DATA, OPERATIONS, RULED, RULES, WHOLE, Shape, compare

# Panels are 8, 24 or 32 wide, register tiles 4 or 8 rows, blocks 64 to 256 a side.
SHAPES = (
    Shape(1, 1, 1, "one pair, one feature"),
    Shape(1, 600, 33, "one query; several key blocks"),
    Shape(600, 1, 7, "one key"),
    Shape(65, 131, 1, "one feature: all packing is tail"),
    Shape(97, 47, 31, "tails of every tile and panel"),
    Shape(256, 192, 64, "whole tiles and panels everywhere"),
    Shape(300, 257, 129, "one past a panel, ragged features"),
    Shape(40, 70, 1024, "wide: a panel larger than first-level cache"),
    Shape(3, None, 5, "symmetric, within one panel"),
    Shape(193, None, 48, "symmetric, last block nearly empty"),
    Shape(520, None, 20, "symmetric, several blocks a side"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _name(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(isa, shape, dtype):
    for operation in OPERATIONS:
        bias = operation in (*RULED, *BIASED)
        verdict = compare("cpu", operation, shape, dtype=dtype, bias=bias)
        assert verdict.passed, verdict


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_rules(isa, rule, dtype):
    for shape in (SHAPES[4], SHAPES[9]):
        for operation in RULED:
            verdict = compare("cpu", operation, shape, rule=rule, dtype=dtype)
            assert verdict.passed, verdict


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("temperature", [0.5, 0.01, 0.005])
def test_data(isa, data, temperature):
    for shape in (SHAPES[4], SHAPES[9]):
        for operation in (*RULED, *WHOLE):
            verdict = compare("cpu", operation, shape, data, "offsets", temperature)
            assert verdict.passed, verdict


def _report(value):
    code = "from fastcl.ops import cpu; print(cpu.BACKEND.unavailable, '|', cpu.BACKEND.detail)"
    environment = {**os.environ, "FASTCL_CPU_ISA": value}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_environment_variable_forces_a_lower_instruction_set():
    assert "isa=baseline" in _report("baseline")


def test_unknown_instruction_set_is_refused_with_the_ones_there_are():
    report = _report("avx9000")
    assert "FASTCL_CPU_ISA is 'avx9000'" in report
    assert "baseline" in report

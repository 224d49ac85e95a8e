"""The gate that CUDA kernels pass: what it reads in compilers' reports, and that it can say no."""

import importlib.util
import sys
from pathlib import Path

import pytest

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5sweepv' for 'sm_80'
ptxas info    : Function properties for _Z5sweepv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 90 registers, used 3 barriers, 488 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5sweepv' for 'sm_90a'
ptxas info    : Function properties for _Z5sweepv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z6helperv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
SPILLED = LOG.replace(
    "_Z6helperv\n    0 bytes stack frame, 0 bytes spill stores, 0",
    "_Z6helperv\n    16 bytes stack frame, 24 bytes spill stores, 16",
)
SERIALISED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to insufficient register resources for the wgmma pipeline in the function "
    "'_Z5sweepv'\n"
)
ARCHS = """\
ELF file    1: x.1.sm_80.cubin
ELF file    2: x.2.sm_90a.cubin
PTX file    1: x.1.sm_80.ptx
"""
CODE = """\
\t\tFunction : _Z5sweepv
        /*0010*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0020*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/  FADD R0, R0, R1 ;
\t\tFunction : _Z5otherv
        /*0010*/  HMMA.16816.F32.BF16 R24, R4, R8, RZ ;
"""


@pytest.fixture(scope="module")
def judge():
    """``judge(log, archs=..., code=..., name=...)`` of the gate: kernels by arch, and breaches."""
    path = Path(__file__).with_name("lint.py")
    spec = importlib.util.spec_from_file_location("lint_cuda", path)
    lint = importlib.util.module_from_spec(spec)
    sys.modules["lint_cuda"] = lint  # where dataclasses look for their annotations
    spec.loader.exec_module(lint)

    def run(log, wanted=("80+PTX", "90a"), code=CODE, name="sweep.cu", archs=ARCHS):
        dump = lambda *options: code if "-sass" in options else archs  # noqa: E731
        kernels, breaches = lint.judge(Path(name), list(wanted), log, dump)
        return {kernel.arch: kernel for kernel in kernels}, breaches

    yield run
    del sys.modules["lint_cuda"]


def test_a_clean_report(judge):
    kernels, breaches = judge(LOG)
    assert breaches == []
    assert [kernel.breaches for kernel in kernels.values()] == [[], []]
    assert (kernels["sm_80"].registers, kernels["sm_90a"].registers) == (90, 168)


def test_fixed_shared_memory(judge):
    kernels, _ = judge(LOG.replace("3 barriers", "3 barriers, 2048 bytes smem"))
    assert kernels["sm_80"].breaches == ["fixes 2048 bytes of shared memory"]
    assert kernels["sm_90a"].breaches == []


def test_spills_of_a_function_that_a_kernel_calls_are_its_own(judge):
    kernels, _ = judge(SPILLED)
    assert kernels["sm_80"].breaches == []
    assert kernels["sm_90a"].breaches == ["spills 40 bytes"]


def test_serialised_products_and_other_warnings(judge):
    kernels, breaches = judge(LOG + SERIALISED)
    assert kernels["sm_90a"].breaches == ["wgmma is serialised"]
    assert breaches == []
    nobody = SERIALISED.replace("_Z5sweepv", "_Z9elsewherev")
    warning = 'x.cu(3): warning #177-D: variable "i" is unused\n'
    for line in (nobody, warning):
        assert judge(line + LOG)[1] == [line.strip()]


def test_architectures(judge):
    _, breaches = judge(LOG, wanted=("80+PTX", "90a", "100a"))
    assert breaches == ["holds 80+PTX, 90a; expected 80+PTX, 90a, 100a"]
    _, breaches = judge(LOG, wanted=("80", "90a"))
    assert breaches == ["holds 80+PTX, 90a; expected 80, 90a"]


def test_a_kernel_for_sm_90a_multiplies_with_wgmma(judge):
    log = LOG[LOG.index("ptxas info    : Compiling entry function '_Z5sweepv' for 'sm_90a'") :]
    only = {"wanted": ["90a"], "name": "sweep_sm90a.cu", "archs": "1: x.1.sm_90a.cubin\n"}
    kernels, breaches = judge(log, **only)
    assert (kernels["sm_90a"].products, kernels["sm_90a"].breaches, breaches) == (2, [], [])
    kernels, _ = judge(log, **only, code=CODE.replace("HGMMA", "HMMA"))
    assert kernels["sm_90a"].breaches == ["no HGMMA instruction"]
    kernels, _ = judge(log.replace("168", "160"), **only)
    assert kernels["sm_90a"].breaches == ["starts with 160 registers"]
    assert judge("", **only)[1] == ["holds no kernel"]

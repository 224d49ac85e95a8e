"""Peak memory, measured in fresh processes: no N x M matrix ever exists."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastcl

MEASURE = """
import re, sys, torch, fastcl
from fastcl.ops import l2_normalize
n, d, backend, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
queue = torch.nn.functional.normalize(torch.randn(1 if kind == "nt_xent" else 65536, d))
queue = queue.bfloat16() if kind == "queue in bf16" else queue

def step(a, b):
    if kind == "nt_xent":
        fastcl.functional.nt_xent(a, b).backward()
    else:
        a, b = l2_normalize(a)[0], l2_normalize(b)[0]
        fastcl.functional.info_nce(a, b, queue, normalize=False).backward()

def inputs(n):
    return [torch.randn(n, d, requires_grad=True) for _ in range(2)]

def status(key):  # MB
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

with fastcl.use_backend(backend):
    step(*inputs(16))  # code, threads and autograd are loaded before anything is counted
    pair = inputs(n)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    step(*pair)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    "backend", [b for b in ("cpu", "chunked") if not fastcl.backends()[b].unavailable]
)
@pytest.mark.parametrize(
    ("kind", "n", "limit"),
    [("nt_xent", 16384, 128), ("queue", 256, 10), ("queue in bf16", 256, 10)],
)
def test_peak_beyond_the_inputs(backend, kind, n, limit):
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(n), "128", backend, kind],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert 0 < float(result.stdout) < limit

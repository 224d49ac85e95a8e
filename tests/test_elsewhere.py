"""Everything that trains, on a device that is not the CPU: what a GPU would refuse, without one.

The device (elsewhere.py) takes PyTorch's reserved backend, which a process can do once: the cases,
elsewhere_cases.py, have a process of their own.
"""

import os
import subprocess
import sys

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a torch whose reserved backend Python can fill",
)
for module in ("lightning", "kornia", "sklearn", "jsonargparse", "rich", "matplotlib"):
    pytest.importorskip(module, reason="needs the extra 'train'")


def test_what_trains_runs_on_another_device(root):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         root / "tests/elsewhere_cases.py"],
        cwd=root / "tests", capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout

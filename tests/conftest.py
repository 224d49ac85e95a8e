"""Tests run against the installed package; in a bare checkout by a link to its folder ``fastcl``.

The checkout's root must stay off sys.path, because its folder ``kernels`` would shadow any other
package of that name.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("fastcl") is None:
    place = tempfile.TemporaryDirectory()
    Path(place.name, "fastcl").symlink_to(ROOT / "fastcl")
    sys.path.append(place.name)
    # and for the processes that tests start
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), place.name]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill every uninitialised tensor with NaN, so that reading one shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.isnan(torch.empty(3)).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def settings():
    """One thread (small problems, predictable on a busy machine) and the default workspace."""
    import fastcl

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fastcl.set_workspace(64)
    yield
    torch.set_num_threads(threads)
    fastcl.set_workspace(64)


@pytest.fixture
def launch(request, tmp_path):
    """``launch((job, world, *arguments), ...)``: for each job of the jobs.py beside the test what
    its ranks returned, ``None`` for one that did not; see ranks.py."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")

    def run(*jobs):
        command = [sys.executable, "-W", "ignore", ROOT / "tests/ranks.py"]
        command += [request.path.with_name("jobs.py"), tmp_path]
        command += [":".join(map(str, job)) for job in jobs]
        subprocess.run([*map(str, command)], check=True, timeout=150)
        places = [[tmp_path / f"{i}/{r}.pt" for r in range(job[1])] for i, job in enumerate(jobs)]
        return [[torch.load(f) if f.exists() else None for f in files] for files in places]

    return run


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT

"""The examples run, and what they print as better is."""

import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "steps", "gain"),  # shorter than by default, so less is gained
    [
        ("simclr", 60, 0.002),
        ("moco_queue", 150, 0.002),
        ("clip_two_tower", 100, 0.5),
        ("sentence_embeddings", 60, 0.01),
    ],
)
def test_learns(root, name, steps, gain):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location(name, root / f"examples/{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(steps)
    assert after > before + gain


def test_distributed(root):
    command = [sys.executable, "-W", "ignore", root / "examples/distributed.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["rank 0", "rank 1"]
    assert all(float(line.split()[-1]) < 1e-5 for line in lines)

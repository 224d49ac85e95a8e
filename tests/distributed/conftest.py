"""Ranks are processes of their own on this machine, joined by gloo."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

JOBS = Path(__file__).parent / "jobs.py"


@pytest.fixture
def launch(tmp_path):
    """``launch(job, world, *arguments)``: what each rank saved; ``None`` for one that did not."""

    def run(job, world, *arguments):
        folder = tmp_path / f"{job}-{world}"
        folder.mkdir()
        command = [sys.executable, "-W", "ignore", JOBS, job, world, folder, *arguments]
        subprocess.run([*map(str, command)], check=True, timeout=120)
        files = [folder / f"{rank}.pt" for rank in range(world)]
        return [torch.load(f) if f.exists() else None for f in files]

    return run

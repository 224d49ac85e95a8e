"""A training process killed at random goes on bit for bit; checkpoints are whole or absent."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

from fastcl.checkpoint import save_checkpoint

STEPS = 80


def start(checkpoint):
    worker = Path(__file__).with_name("training_worker.py")
    return subprocess.Popen(
        [sys.executable, str(worker), str(checkpoint), str(STEPS)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_kill_and_resume_is_bit_for_bit(tmp_path):
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    uninterrupted = start(whole)
    for _ in range(2):
        process = start(broken)
        for _ in range(random.randrange(5, STEPS // 2 - 5)):
            line = process.stdout.readline()
        time.sleep(random.random() * 0.01)  # anywhere in a step, in the writing too
        process.kill()
        process.communicate()
        last = int(line)
        assert last < len(torch.load(broken, weights_only=True)["curve"]) < STEPS
    for process in (start(broken), uninterrupted):
        process.communicate(timeout=120)
        assert process.returncode == 0

    expected, ours = (torch.load(p, weights_only=True) for p in (whole, broken))
    assert len(ours["curve"]) == STEPS
    assert ours["curve"] == expected["curve"]
    names, tensors = ours["modules"].keys(), tree_flatten(expected)[0]
    assert {"loss.queue.keys", "loss.queue.pointer", "bank.bank.features"} <= set(names)
    for a, b in zip(tree_flatten(ours)[0], tensors, strict=True):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same, f"killed last after step {last}"


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save_checkpoint({"step": torch.tensor(1)}, path)
    with pytest.raises(AttributeError, match="local"):
        save_checkpoint({"step": torch.tensor(2), "bad": lambda: 0}, path)
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):  # all is written, and still nothing has changed
        save_checkpoint({"step": torch.tensor(2)}, path)
    assert int(torch.load(path)["step"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]

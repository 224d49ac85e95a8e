"""Queues, banks and shuffles over several ranks, unequal batches included (gloo, spawned here)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_gathered_and_single_process_agree(ranks, tmp_path):
    worker = Path(__file__).with_name("rank_worker.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(ranks), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)

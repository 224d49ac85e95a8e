"""Ranks for tests: ``python ranks.py FILE FOLDER JOB:WORLD[:ARGUMENT ...] ...``.

Runs functions of FILE as ``job(rank, world, *arguments)`` on ranks of their own, all jobs at once:
processes joined by gloo, forks of one that has imported torch, which takes longer than most tests.
What a job returns is saved, or the message of what it raises.
"""

import importlib.util
import multiprocessing
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # which DDP imports when it is first used
import torch.distributed as dist

PATIENCE = {"hang": timedelta(seconds=6)}  # a test that must wait for it; else enough for anyone


def work(function, rank, world, folder, *arguments):
    torch.set_num_threads(1)
    patience = PATIENCE.get(arguments[-1] if arguments else "", timedelta(seconds=100))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=patience
    )
    try:
        result = function(rank, world, *arguments)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    torch.save(result, folder / f"{rank}.partial")
    os.replace(folder / f"{rank}.partial", folder / f"{rank}.pt")
    os._exit(0)  # as abruptly as an error would end it


def main(file, folder, *jobs):
    spec = importlib.util.spec_from_file_location("jobs", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    context = multiprocessing.get_context("fork")
    waiting = []
    for number, job in enumerate(jobs):
        name, world, *arguments = job.split(":")
        place = Path(folder, str(number))
        place.mkdir()
        for rank in range(int(world)):
            all_arguments = (getattr(module, name), rank, int(world), place, *arguments)
            process = context.Process(target=work, args=all_arguments, daemon=True)
            process.start()
            if arguments[-1:] != ["hang"] or arguments[-2] != str(rank):  # as a test asked for
                waiting.append((process, place / f"{rank}.pt"))
    while not all(p.exitcode is not None or result.exists() for p, result in waiting):
        time.sleep(0.05)


if __name__ == "__main__":
    main(*sys.argv[1:])

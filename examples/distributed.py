"""Negatives of all ranks: two processes train as one would on the whole batch.

    python examples/distributed.py [--ranks 2]

Each rank holds its share of a batch; the loss sees all of it. Under DistributedDataParallel the
averaged gradient is that of one process, which this prints for every rank.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastcl import NTXentLoss

BATCH = 64


def model_and_views() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    x = torch.randn(BATCH, 32)
    return model, x + 0.3 * torch.randn_like(x), x + 0.3 * torch.randn_like(x)


def train(rank: int, ranks: int, meeting_point: str, results: str) -> None:
    dist.init_process_group("gloo", f"file://{meeting_point}", rank=rank, world_size=ranks)
    model, first, second = model_and_views()
    own = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    wrapped = DistributedDataParallel(model)
    # "gather" holds all keys on every rank, "ring" passes them round in constant memory
    loss = NTXentLoss(temperature=0.2, distributed="ring")(
        *wrapped(torch.cat([first[own], second[own]])).chunk(2)
    )
    loss.backward()
    torch.save([p.grad for p in model.parameters()], f"{results}/{rank}.pt")
    dist.destroy_process_group()


def main(ranks: int = 2) -> float:
    """The largest difference of any rank's gradient from one process's, relative to its norm."""
    model, first, second = model_and_views()
    NTXentLoss(temperature=0.2)(*model(torch.cat([first, second])).chunk(2)).backward()
    alone = torch.cat([p.grad.flatten() for p in model.parameters()])
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (ranks, str(Path(folder, "meet")), folder), nprocs=ranks)
        for rank in range(ranks):
            grads = torch.load(Path(folder, f"{rank}.pt"))
            together = torch.cat([g.flatten() for g in grads])
            difference = float((together - alone).norm() / alone.norm())
            print(f"rank {rank}: gradient differs from one process's by {difference:.1e}")
            worst = max(worst, difference)
    return worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    main(parser.parse_args().ranks)

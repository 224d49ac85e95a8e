"""What test_gradcache.py runs on every rank; see ranks.py."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from fastcl import GradCache, NTXentLoss


def one_synchronisation(rank, world):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    views = [torch.randn(2, 11, 5, dtype=torch.float64)[rank] for _ in range(2)]
    loss = NTXentLoss()

    whole = DistributedDataParallel(copy.deepcopy(encoder))
    z1, z2 = whole(torch.cat(views)).split(11)
    loss(z1, z2).backward()

    ours = DistributedDataParallel(encoder)
    synchronisations = []

    def count(state, bucket):
        synchronisations.append(bucket.index())
        return allreduce_hook(state, bucket)

    ours.register_comm_hook(None, count)
    for _ in range(2):
        ours.zero_grad()
        synchronisations.clear()
        GradCache(ours, loss, 3 + rank)(*views)  # another number of micro-batches on each rank
        assert len(synchronisations) == len(set(synchronisations)) > 0, synchronisations
        for a, b in zip(ours.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-14)
    dist.barrier()
    return "once"

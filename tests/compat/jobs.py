"""What the tests run on every rank; see tests/ranks.py."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from fastcl.compat import lightly, open_clip
from fastcl.compat.ranking import ranking_loss

D = 6
EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SCALE = torch.tensor(7.0, dtype=torch.float64)
warnings.simplefilter("ignore")


def ranking(z, world, **options):
    return ranking_loss([*z, z[0] + z[1].square()], 5.0, gather=world > 1, **options)


def clip(z, rank, world, **options):
    units = [F.normalize(x) for x in z]
    return open_clip.ClipLoss(rank=rank, world_size=world, **options)(*units, SCALE)


def siglip(z, rank, world, **options):
    units = [F.normalize(x) for x in z]
    return open_clip.SigLipLoss(rank=rank, world_size=world, **options)(*units, SCALE, -3.0)


LOSSES = {
    "nt_xent": lambda z, rank, world: lightly.NTXentLoss(0.3, gather_distributed=True)(*z),
    "nt_xent, negative": lambda z, rank, world: lightly.NTXentLoss(-0.3, 0, True)(*z),
    "dcl": lambda z, rank, world: lightly.DCLLoss(0.3, gather_distributed=True)(*z),
    "clip": clip,
    "clip, local": lambda z, rank, world: clip(
        z, rank, world, local_loss=True, gather_with_grad=True
    ),
    "siglip": siglip,
    "siglip, gather": lambda z, rank, world: siglip(z, rank, world, dist_impl="gather"),
    "ranking": lambda z, rank, world: ranking(z, world),
    "ranking, every": lambda z, rank, world: ranking(z, world, directions=EVERY),
    "ranking, both": lambda z, rank, world: ranking(
        z, world, directions=EVERY[::2], partition_mode="per_direction"
    ),
    "ranking, hard": lambda z, rank, world: ranking(
        z, world, hardness_mode="all_negatives", hardness_strength=2.0
    ),
}


def trained(rank, world):
    """The loss on each rank and the gradient that DDP gives, of one row more on the first rank."""
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(9, D, generator=generator, dtype=torch.float64) for _ in range(2)]
    if world > 1:
        z = [x.split([9 - 4 * (world - 1), *[4] * (world - 1)])[rank] for x in z]
    found = {}
    for name, loss in LOSSES.items():
        torch.manual_seed(1)
        model = nn.Linear(D, D, dtype=torch.float64)
        wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        value = loss([wrapped(x) for x in z], rank, world)
        value.backward()
        found[name] = value.detach(), model.weight.grad
    return found


def banked(rank, world):
    """What two ranks enqueue."""
    torch.manual_seed(0)
    bank = lightly.MemoryBankModule((7, 2), gather_distributed=True)
    bank(torch.full((2, 2), 1.0 + rank), update=True)
    return bank.bank[: 2 * world]

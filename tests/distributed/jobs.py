"""What the tests run on every rank; see tests/ranks.py."""

import os
import signal
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastcl
from fastcl.distributed import rows, sweeps

D = 6


def shard(x, rank, world):
    """Unequal parts: the last rank has one row."""
    rest = len(x) - 1
    sizes = [rest // (world - 1)] * (world - 1) + [1]
    sizes[0] += rest - sum(sizes[:-1])
    return x.split(sizes)[rank]


def two_views(n=13):
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(n, D, generator=generator, dtype=torch.float64)
    return z1, z1 + torch.randn(n, D, generator=generator, dtype=torch.float64)


def encoder():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 8)).double()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


# ------------------------------------------------------------------------------------- training


def accumulated(rank, world, mode):
    """Two steps of which only the second is synchronised."""
    z1, z2 = two_views()
    model = nn.parallel.DistributedDataParallel(encoder()) if world > 1 else encoder()
    loss = fastcl.NTXentLoss(0.2, distributed=mode if world > 1 else None)
    if world > 1:
        a, b = shard(z1, rank, world), shard(z2, rank, world)
        with model.no_sync():
            loss(model(a), model(b)).backward()
        loss(model(b), model(a)).backward()
    else:
        loss(model(z1), model(z2)).backward()
        loss(model(z2), model(z1)).backward()
    return gradients(model)


def two_losses(rank, world, mode):
    """Both modes and two kinds of loss in one backward."""
    z1, z2 = two_views()
    model = nn.parallel.DistributedDataParallel(encoder()) if world > 1 else encoder()
    other = {"gather": "ring", "ring": "gather"}[mode]
    if world > 1:
        z1, z2 = shard(z1, rank, world), shard(z2, rank, world)
    first = fastcl.CLIPLoss(0.2, distributed=mode if world > 1 else None)
    second = fastcl.SigLIPLoss(0.2, distributed=other if world > 1 else None)
    a, b = model(z1), model(z2)
    (first(a, b) + 0.3 * second(b, a)).backward()
    return gradients(model)


def sharded(rank, world, mode):
    """FSDP2."""
    from torch.distributed.fsdp import fully_shard

    z1, z2 = two_views()
    model = encoder()
    if world > 1:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        z1, z2 = shard(z1, rank, world), shard(z2, rank, world)
    fastcl.NTXentLoss(0.2, distributed=mode if world > 1 else None)(model(z1), model(z2)).backward()
    whole = [p.grad.full_tensor() if world > 1 else p.grad for p in model.parameters()]
    return [g.clone() for g in whole]


def compiled(rank, world, mode):
    """A compiled encoder, and a compiled step with the loss in it."""
    z1, z2 = two_views()
    loss = fastcl.CLIPLoss(0.2, distributed=mode if world > 1 else None)
    model = encoder()
    if world > 1:
        z1, z2 = shard(z1, rank, world), shard(z2, rank, world)
        model = nn.parallel.DistributedDataParallel(model)
    if world == 1:
        (2.0 * loss(model(z1), model(z2))).backward()
        return gradients(model)
    fast = torch.compile(model, backend="aot_eager")
    loss(fast(z1), fast(z2)).backward()

    @torch.compile(backend="aot_eager")
    def step(a, b):
        return loss(model(a), model(b))

    step(z1, z2).backward()
    return gradients(model)


def fixed_keys(rank, world, mode):
    """Keys of another encoder, without a gradient: the backward meets no other rank's."""
    z1, z2 = two_views()
    keys = encoder().requires_grad_(False)(z2)
    model = nn.parallel.DistributedDataParallel(encoder()) if world > 1 else encoder()
    if world > 1:
        z1, keys = shard(z1, rank, world), shard(keys, rank, world)
    loss = fastcl.InfoNCELoss(0.2, distributed=mode if world > 1 else None)(model(z1), keys)
    sweep, sweeps._Shared = sweeps._Shared, None
    loss.backward()
    sweeps._Shared = sweep
    return gradients(model)


def training(rank, world):
    """For each job and mode, how far this rank's gradients are from one process's."""
    errors = {}
    for job in (accumulated, two_losses, fixed_keys, sharded, compiled):
        for mode in ("gather", "ring"):
            ours, alone = job(rank, world, mode), job(0, 1, mode)
            errors[f"{job.__name__} {mode}"] = max(
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, alone, strict=True)
            )
    return errors


def subgroup(rank, world, mode):
    """Ranks 0 and 2 share a loss of their own, rank 1 none."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return None
    z1, z2 = two_views(5)
    model = nn.parallel.DistributedDataParallel(encoder(), process_group=group)
    part = slice(0, 3) if rank == 0 else slice(3, 5)
    loss = fastcl.NTXentLoss(0.2, distributed=mode, process_group=group)
    loss(model(z1[part]), model(z2[part])).backward()
    alone = encoder()
    fastcl.NTXentLoss(0.2)(alone(z1), alone(z2)).backward()
    return [
        float((a - b).abs().max()) for a, b in zip(gradients(model), gradients(alone), strict=True)
    ]


# --------------------------------------------------------------------------------------- memory


def peaks(rank, world):
    """Peak bytes of tensors in a step, in shards, at a fixed batch per rank, by mode and ranks."""
    found = {}
    for size in (6, 8):
        group = dist.new_group(range(size))
        for mode in ("gather", "ring") if rank < size else ():
            found[mode, size] = peak(fastcl.NTXentLoss(distributed=mode, process_group=group))
    return found


def peak(loss):
    z = torch.randn(2, 64, 512)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        z1, z2 = (x.detach().requires_grad_() for x in z)
        loss(z1, z2).backward()
    events = recorded.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    changes = torch.tensor([e.nbytes() for e in events])
    return float(changes.cumsum(0).max()) / (z.numel() * z.element_size())


# ------------------------------------------------------------------------------------- failures


def disagree(rank, world):
    """The last rank differs from the others in one respect after another."""
    messages = {}
    respects = ("width", "dtype", "mode", "ids", "temperature", "gradient", "queue", "call", "bank")
    for what in respects:
        try:
            differ(rank == world - 1, what)
        except ValueError as error:
            messages[what] = str(error)
    return messages


def differ(last, what):
    width = D + 1 if last and what == "width" else D
    z = torch.randn(2, 4, width, dtype=torch.float64 if last and what == "dtype" else None)
    z.requires_grad_(not (last and what == "gradient"))
    mode = "gather" if last and what == "mode" else "ring"
    options = {"ids": torch.arange(4)} if last and what == "ids" else {}
    temperature = 0.2 if last and what == "temperature" else 0.1
    if what == "queue" or (what == "call" and not last):
        fastcl.NegativeQueue(D, 8 if last else 9).enqueue(z[0].detach())
    if what == "bank":
        torch.manual_seed(last)
        fastcl.MemoryBank(9, D).update(torch.arange(4), z[0].detach())
    fastcl.NTXentLoss(temperature, distributed=mode)(z[0], z[1], **options)


def lose_one(rank, world, where, victim, how):
    """``victim`` dies, or hangs, in the middle of the fourth step: in the sweep of a loss with
    distributed=``where``, or of the enqueue of a queue's step."""
    if where == "queue":
        loss = fastcl.InfoNCELoss(queue=fastcl.NegativeQueue(D, 40))
    else:
        loss = fastcl.NTXentLoss(distributed=where)
    owner, name = (rows.Rows, "gather") if where == "queue" else (sweeps._LogSumExp, "reduce")
    original, calls = getattr(owner, name), []

    def fail(*arguments):
        calls.append(1)
        if rank == int(victim) and len(calls) == 8:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return original(*arguments)

    setattr(owner, name, fail)
    for _ in range(10):
        z = torch.randn(2, 8, D, requires_grad=True)
        loss(*z).backward()

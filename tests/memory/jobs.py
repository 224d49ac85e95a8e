"""Queues, banks and shuffles over ranks with unequal batches; see tests/ranks.py."""

import copy
import math

import pytest
import torch
import torch.distributed as dist

from fastcl import InfoNCELoss, MemoryBank, NegativeQueue, NTXentLoss, SupConLoss
from fastcl import functional as f
from fastcl.memory import shuffle_batch

F64, D, SIZE = torch.float64, 6, 11
EARLY = NegativeQueue(D, SIZE, distributed="shard")  # made before the process group

RICH = {"label_smoothing": 0.1, "return_metrics": True}
LOSSES = {
    "info_nce": lambda q: InfoNCELoss(0.2, queue=q, learnable=True, **RICH),
    "nt_xent": lambda q: NTXentLoss(0.2, queue=q, learnable=True, **RICH),
    "out": lambda q: SupConLoss(0.2, queue=q, learnable=True),
    "in": lambda q: SupConLoss(0.2, queue=q, learnable=True, form="in"),
}
# rows per rank: one each and a shard that is still empty, a wrap, a batch larger than the queue
STEPS = [[1, 1, 1], [1, 2, 1], [3, 1, 2], [4, 8, 6], [1, 3, 2]]


def step_results(name, loss, a, b, ids):
    """Losses, gradients of both inputs and of the scale (summed over ranks), metrics."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    if name in ("out", "in"):
        value = loss(torch.stack([a, b], 1), ids)
    else:
        value = loss(a, b, ids=ids)
    rows, metrics = value if isinstance(value, tuple) else (value, {})
    weights = torch.arange(1.0, len(rows) + 1.0, dtype=F64)
    grads = torch.autograd.grad((rows * weights).sum(), [a, b, loss.logit_scale])
    dist.all_reduce(grads[2])  # part of the scale's gradient arises on other ranks
    return (rows.detach(), *grads, *metrics.values())


def check_loss(rank, ranks, name, make):
    generator = torch.Generator().manual_seed(3)
    gathered = make(NegativeQueue(D, SIZE, dtype=F64)).double()
    sharded = make(NegativeQueue(D, SIZE, dtype=F64, distributed="shard")).double()
    gathered.reduction = sharded.reduction = "none"
    entered = []
    for sizes in STEPS:
        n = sum(sizes[:ranks])
        a, b = (torch.randn(n, D, dtype=F64, generator=generator) for _ in range(2))
        ids = torch.randint(0, 5, (n,), generator=generator)
        spans = [slice(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(ranks)]
        mine = spans[rank]
        keys, key_ids = gathered.queue.keys.clone(), gathered.queue.ids.clone()
        results = [
            step_results(name, loss, a[mine], b[mine], ids[mine]) for loss in (gathered, sharded)
        ]
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
        if name == "info_nce" and len(keys):
            plain = f.info_nce(
                a[mine], b[mine], keys, math.exp(-gathered.logit_scale), ids=ids[mine],
                negative_ids=key_ids, label_smoothing=0.1, reduction="none",
            )  # fmt: skip
            torch.testing.assert_close(results[0][0], plain, rtol=1e-11, atol=1e-13)
        # both hold what one process would, in the order of ranks
        for at in spans:
            for x in (b,) if name == "info_nce" else (a, b):
                entered += zip(torch.nn.functional.normalize(x[at]), ids[at].tolist(), strict=True)
        slots = {position % SIZE: item for position, item in enumerate(entered)}
        check_queue(gathered.queue, slots, range(len(slots)), len(entered))
        check_queue(sharded.queue, slots, range(rank, len(slots), ranks), len(entered))
    return sharded.queue


def check_queue(queue, slots, own, entered):
    assert queue.fill == len(slots)
    assert queue.pointer == entered % SIZE
    assert queue.ids.tolist() == [slots[s][1] for s in own]
    if len(own):
        torch.testing.assert_close(queue.keys, torch.stack([slots[s][0] for s in own]))


def check_global_mean(rank):
    """A sharded queue in a loss over all ranks: value and averaged gradients as gathered."""
    results = []
    for distributed in ("gather", "shard"):
        torch.manual_seed(0)
        queue = NegativeQueue(D, SIZE, dtype=F64, distributed=distributed)
        queue.enqueue(torch.randn(5 + rank, D, dtype=F64))
        loss = NTXentLoss(0.2, queue=queue, learnable=True, distributed="ring").double()
        encoder = torch.nn.Linear(4, D).double()
        z1, z2 = (encoder(torch.randn(2 + 3 * rank, 4, dtype=F64)) for _ in range(2))
        value = loss(z1, z2)
        grads = torch.autograd.grad(value, [*encoder.parameters(), loss.logit_scale])
        for grad in grads:
            dist.all_reduce(grad)
        results.append((value.detach(), *grads))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def check_refusals(rank, ranks, queue):
    grouped = NegativeQueue(D, SIZE, distributed="shard", group=dist.new_group())
    assert copy.deepcopy(InfoNCELoss(queue=grouped)).queue.group is grouped.group
    state = queue.state_dict()
    assert state["keys"].shape == (len(range(rank, SIZE, ranks)), D)
    twin = NegativeQueue(D, SIZE, dtype=F64, distributed="shard")
    twin.load_state_dict(state)
    assert torch.equal(twin.keys, queue.keys)
    state["shard"] = torch.tensor([rank, ranks + 1])
    message = f"shard is rank {rank} of {ranks + 1}; expected rank {rank} of {ranks}"
    with pytest.raises(RuntimeError, match=message):
        twin.load_state_dict(state)
    with pytest.raises(RuntimeError, match="expected a queue made after the process group"):
        EARLY.enqueue(torch.randn(2, D))


def check_shuffle(rank, ranks):
    """Every sample once, back where it came from."""
    x = torch.arange(10 * rank, 10 * rank + 4 + rank)[:, None].float()
    torch.manual_seed(rank)
    shuffled, shuffle = shuffle_batch(x)
    assert shuffled.shape == x.shape
    assert torch.equal(shuffle.restore(shuffled), x)
    parts: list = [None] * ranks
    dist.all_gather_object(parts, (x, shuffled))
    samples, exchanged = (torch.cat(p) for p in zip(*parts, strict=True))
    assert torch.equal(samples, exchanged.sort(0).values)
    assert not torch.equal(samples, exchanged)


def check_bank(rank, ranks):
    """The bank of every rank sees every rank's samples; index 3 occurs on all of them."""
    bank = MemoryBank(20, D, generator=torch.Generator().manual_seed(0))
    alone = copy.deepcopy(bank)
    alone.group = dist.new_group([rank], use_local_synchronization=True)
    features = [torch.randn(2, D, generator=torch.Generator().manual_seed(r)) for r in range(ranks)]
    bank.update(torch.tensor([3, 5 + rank]), features[rank])
    alone.update(torch.tensor([i for r in range(ranks) for i in (3, 5 + r)]), torch.cat(features))
    assert torch.equal(bank.features, alone.features)
    scores = torch.randn(ranks, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(bank.normalizer(scores[rank]), alone.normalizer(scores))


def agreement(rank, ranks):
    for name, make in LOSSES.items():
        queue = check_loss(rank, ranks, name, make)
    check_refusals(rank, ranks, queue)
    check_global_mean(rank)
    check_shuffle(rank, ranks)
    check_bank(rank, ranks)
    dist.barrier()
    return "all equal"

"""Who is measured. Other libraries' code is imported, never typed again.

Each builder takes a case and returns ``step(*inputs) -> loss``, normalisation included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcl
from fastcl.functional import clip, dcl, info_nce, nt_xent, siglip, sup_con
from fastcl.ops import l2_normalize

from . import peers
from .cases import SIGLIP_BIAS, TEMPERATURE, Case
from .peers import Step


@dataclass(frozen=True)
class Contestant:
    """Somebody's loss.

    Attributes:
        name: as in tables.
        builders: task -> function of a case that returns the step.
        copies: score matrices alive at the peak, for refusing what cannot fit (0: none).
        limit: largest number of scores it is asked for, with ``why``.
        scope: entered around every forward and backward.
    """

    name: str
    builders: dict[str, Callable[[Case], Step]]
    copies: float = 0.0
    limit: int | None = None
    why: str = ""
    scope: Callable[[], AbstractContextManager] = nullcontext

    def refusal(self, case: Case, memory: int) -> str:
        """Why it does not run ``case`` in ``memory`` bytes; empty if it does."""
        if case.task not in self.builders:
            return "has no such loss"
        if self.limit is not None and case.scores > self.limit:
            return self.why
        needed = int(self.copies * case.scores * 4)
        if needed > memory:
            return f"would take about {needed / 2**30:.0f} GiB"
        return ""


# ------------------------------------------------------------------------------------- fastcl


def _fastcl_ntxent(case: Case) -> Step:
    return lambda z1, z2: nt_xent(z1, z2, TEMPERATURE)


def _fastcl_clip(case: Case) -> Step:
    return lambda a, b: clip(a, b, TEMPERATURE)


def _fastcl_queue(case: Case) -> Step:
    def step(q, k, queue):
        q, k = (l2_normalize(x)[0].to(queue.dtype) for x in (q, k))
        return info_nce(q, k, queue, TEMPERATURE, normalize=False)

    return step


def _fastcl_supcon(case: Case) -> Step:
    return lambda z1, z2, labels: sup_con(torch.stack([z1, z2], 1), labels, TEMPERATURE)


def _fastcl_dcl(case: Case) -> Step:
    return lambda z1, z2: dcl(z1, z2, TEMPERATURE)


def _fastcl_siglip(case: Case) -> Step:
    return lambda a, b: siglip(a, b, TEMPERATURE, SIGLIP_BIAS)


_FASTCL = {
    "ntxent": _fastcl_ntxent, "dcl": _fastcl_dcl, "supcon": _fastcl_supcon, "clip": _fastcl_clip,
    "siglip": _fastcl_siglip, "queue": _fastcl_queue,
}  # fmt: skip


def fastcl_backends(names: tuple[str, ...] | None = None) -> list[Contestant]:
    """fastcl with each usable backend but the oracle, the preferred one first."""
    usable = [n for n, b in fastcl.backends().items() if not b.unavailable and n != "reference"]
    return [
        Contestant(f"fastcl {name}", _FASTCL, scope=partial(fastcl.use_backend, name))
        for name in (usable if names is None else names)
    ]


# -------------------------------------------------------------------- PyTorch as users write it


def eager_ntxent(z1: Tensor, z2: Tensor) -> Tensor:
    n = z1.shape[0]
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    scores = z @ z.T / TEMPERATURE
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    scores = scores.masked_fill(itself, float("-inf"))
    return F.cross_entropy(scores, torch.arange(2 * n, device=z.device).roll(n))


def eager_dcl(z1: Tensor, z2: Tensor) -> Tensor:
    n = z1.shape[0]
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    scores = z @ z.T / TEMPERATURE
    pair = torch.eye(n, dtype=torch.bool, device=z.device).repeat(2, 2)  # itself and its partner
    negatives = scores.masked_fill(pair, float("-inf")).logsumexp(1)
    return negatives.mean() - (z[:n] * z[n:]).sum(1).mean() / TEMPERATURE


def eager_supcon(z1: Tensor, z2: Tensor, labels: Tensor) -> Tensor:
    z, labels = F.normalize(torch.cat([z1, z2]), dim=1), labels.repeat(2)
    itself = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    scores = (z @ z.T / TEMPERATURE).masked_fill(itself, float("-inf"))
    positive = (labels[:, None] == labels) & ~itself
    log_probability = F.log_softmax(scores, 1).masked_fill(~positive, 0.0)
    return -(log_probability.sum(1) / positive.sum(1)).mean()


def eager_clip(a: Tensor, b: Tensor) -> Tensor:
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / TEMPERATURE
    target = torch.arange(a.shape[0], device=a.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def eager_siglip(a: Tensor, b: Tensor) -> Tensor:
    n = a.shape[0]
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / TEMPERATURE + SIGLIP_BIAS
    signs = 2 * torch.eye(n, device=a.device, dtype=a.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / n


def eager_queue(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    scores = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / TEMPERATURE
    return F.cross_entropy(scores, _zeros(q))


def _zeros(q: Tensor) -> Tensor:
    """The first class for every row."""
    return torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)


_EAGER = {
    "ntxent": eager_ntxent, "dcl": eager_dcl, "supcon": eager_supcon, "clip": eager_clip,
    "siglip": eager_siglip, "queue": eager_queue,
}  # fmt: skip


def _eager(case: Case) -> Step:
    return _EAGER[case.task]


def _compiled(case: Case) -> Step:
    torch.compiler.reset()  # code for other shapes counts against a limit, then eager would run
    return torch.compile(_EAGER[case.task], dynamic=False)


# ------------------------------------------------------------- memory-bounded parts of PyTorch


def _linear_clip(case: Case) -> Step:
    options = nn.LinearCrossEntropyOptions()

    def step(a, b):
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        target = torch.arange(a.shape[0], device=a.device)
        there = F.linear_cross_entropy(a / TEMPERATURE, b, target, options=options)
        back = F.linear_cross_entropy(b / TEMPERATURE, a, target, options=options)
        return (there + back) / 2

    return step


def _linear_queue(case: Case) -> Step:
    # its default takes one row at a time here
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=64, chunking_method=None)

    def step(q, k, queue):
        # Each row has a positive of its own, which is no class of the shared queue: class 0 stands
        # in, and adding its score back leaves the log-sum-exp.
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        negatives = (
            F.linear_cross_entropy(
                q / TEMPERATURE, queue, _zeros(q), reduction="none", options=options
            )
            + (q @ queue[0]) / TEMPERATURE
        )
        return F.softplus(negatives - (q * k).sum(1) / TEMPERATURE).mean()

    return step


def _flash(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Mean of k and log-sum-exp, by PyTorch's flash attention."""
    if q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, scale=scale)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=scale)


def _cudnn(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same by cuDNN."""
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    return cudnn(q, k, k, None, True, scale=scale)[:2]


class _AttentionLogSumExp(torch.autograd.Function):
    """Attention's log-sum-exp [B]; its output with the queue as value is the gradient.

    A GPU needs more programs than a few queries give: there the queue is folded into the batch.
    """

    @staticmethod
    def forward(ctx, q, queue, scale, attend):
        (rows, width), keys = q.shape, queue.shape[0]
        splits = math.gcd(keys, 128) if q.is_cuda else 1
        parts = queue.view(splits, 1, keys // splits, width)
        means, logsumexps = attend(q.expand(splits, 1, rows, width), parts, scale)
        logsumexps = logsumexps.reshape(splits, rows)
        shares = logsumexps.softmax(0)[:, :, None]
        ctx.save_for_backward((shares * means.reshape(splits, rows, width)).sum(0))
        ctx.scale, ctx.dtype = scale, q.dtype
        return logsumexps.logsumexp(0)

    @staticmethod
    def backward(ctx, grad):
        gradient = ctx.scale * grad[:, None] * ctx.saved_tensors[0]
        return gradient.to(ctx.dtype), None, None, None


def _attention_queue(attend: Callable, case: Case) -> Step:
    def step(q, k, queue):
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        negatives = _AttentionLogSumExp.apply(q, queue, 1 / TEMPERATURE, attend)
        return F.softplus(negatives - (q * k).sum(1) / TEMPERATURE).mean()

    return step


# score matrices at the peak: measured, see the memory column
PEERS = (
    Contestant("eager", dict.fromkeys(_EAGER, _eager), copies=3.2),
    Contestant("torch.compile", dict.fromkeys(_EAGER, _compiled), copies=2.0),
    Contestant("torch linear_cross_entropy", {"clip": _linear_clip, "queue": _linear_queue}),
    Contestant("torch flash attention", {"queue": partial(_attention_queue, _flash)}),
    Contestant(
        "pytorch-metric-learning SupConLoss",
        {"ntxent": peers.pml_views, "supcon": peers.pml_supcon},
        copies=11.0,
    ),
    Contestant(
        "pytorch-metric-learning NTXentLoss", {"ntxent": peers.pml_ntxent}, limit=256**2,
        why="stores positives x negatives, cubic in the batch: 256 rows at most",
    ),
    Contestant(
        "info-nce-pytorch", {"clip": peers.info_nce_clip, "queue": peers.info_nce_queue}, copies=4.0
    ),
    Contestant("lightly NTXentLoss", {"ntxent": peers.lightly}, copies=5.0),
    Contestant("lightly DCLLoss", {"dcl": peers.lightly_dcl}, copies=5.0),
    Contestant("open_clip ClipLoss", {"clip": peers.open_clip}, copies=4.0),
    Contestant("open_clip SigLipLoss", {"siglip": peers.open_clip_siglip}, copies=5.0),
    Contestant(
        "sentence-transformers symmetric", {"clip": peers.sentence_transformers}, copies=5.5
    ),
    Contestant("Inf-CL", {"clip": peers.inf_cl}),
)  # fmt: skip
# those that run on a GPU only
GPU_PEERS = (
    *PEERS,
    Contestant("torch cuDNN attention", {"queue": partial(_attention_queue, _cudnn)}),
    *(
        Contestant(
            f"cut_cross_entropy {impl}",
            {"clip": partial(peers.cce_clip, impl), "queue": partial(peers.cce_queue, impl)},
        )
        for impl in ("cce", "cce_exact")
    ),
)

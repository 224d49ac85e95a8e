"""``python -m benchmarks.moco``: a whole MoCo step on the CPU, queue and enqueue included.

Loss against the queue, its backward and the storing of the batch's keys, B = 256, K = 65536,
D = 128, temperature 0.07; beside what He et al.'s code does with ``cat`` and cross-entropy. The
last column is the speed on the minimal 4 B K D operations, which no method takes above the
processor's multiply-add peak: in fp32 that peak bounds the factor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcl import InfoNCELoss, NegativeQueue

from .measure import interleave, summary

_B, _K, _D, _TEMPERATURE = 256, 65536, 128, 0.07
_FLOP = 4 * _B * _K * _D

Step = Callable[[Tensor, Tensor], Tensor]


def _eager() -> Step:
    queue, pointer = F.normalize(torch.randn(_K, _D)).T.contiguous(), 0
    labels = torch.zeros(_B, dtype=torch.int64)

    def step(query: Tensor, key: Tensor) -> Tensor:
        nonlocal pointer
        q, k = F.normalize(query), F.normalize(key)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.clone()], 1) / _TEMPERATURE
        loss = F.cross_entropy(logits, labels)
        queue[:, pointer : pointer + _B] = k.T
        pointer = (pointer + _B) % _K
        return loss

    return step


def _fastcl(dtype: torch.dtype, ids: bool = False) -> Step:
    queue = NegativeQueue(_D, _K, dtype=dtype)
    queue.enqueue(torch.randn(_K, _D), torch.arange(_K))
    loss = InfoNCELoss(_TEMPERATURE, queue=queue)
    own = torch.arange(_B) if ids else None
    return lambda query, key: loss(query, key, ids=own)


def _timer(step: Step, autocast: bool) -> Callable[[], float]:
    def run() -> float:
        query, key = torch.randn(_B, _D, requires_grad=True), torch.randn(_B, _D)
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = step(query, key)
        loss.backward()
        return time.perf_counter() - start

    return run


def main(argv: list[str] | None = None) -> None:
    """Print a line per way of taking the step: median milliseconds, factor, GFLOP/s."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moco", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    runs = {
        "cat + cross-entropy": _timer(_eager(), False),
        "cat + cross-entropy, autocast": _timer(_eager(), True),
        "fastcl": _timer(_fastcl(torch.float32), False),
        "fastcl, ids": _timer(_fastcl(torch.float32, ids=True), False),
        "fastcl, bf16 storage": _timer(_fastcl(torch.bfloat16), False),
        "fastcl, bf16 storage, autocast": _timer(_fastcl(torch.bfloat16), True),
    }
    samples = interleave(runs, options.rounds, 1.0)
    slowest = summary(samples["cat + cross-entropy"])["median_ms"]
    print(f"B = {_B}, K = {_K}, D = {_D}, {options.threads} threads")
    for name, values in samples.items():
        median = summary(values)["median_ms"]
        speed = _FLOP / median / 1e6
        print(f"{name:32}{median:8.1f} ms {slowest / median:6.1f}x {speed:8.0f} GFLOP/s")


if __name__ == "__main__":
    main()

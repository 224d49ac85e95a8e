"""``python -m benchmarks.overhead``: what a call costs beside its arithmetic.

Microseconds of the primitives and of two losses at N = 16, D = 32, where dispatch, allocation and
autograd are nearly everything; an eager equivalent stands beside each. One thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcl
from fastcl import ops
from fastcl.functional import clip, nt_xent

from .cases import TEMPERATURE
from .contestants import eager_clip, eager_ntxent, fastcl_backends
from .measure import interleave, summary

_ROWS, _WIDTH = 16, 32
_CALLS = 20  # per sample: the clock itself costs 0.1 us
_SCALE = 1 / TEMPERATURE

Function = Callable[[Tensor, Tensor], Tensor]

# primitive or loss -> fastcl's call and the eager one, both of (a, b)
_PAIRS: dict[str, tuple[Function, Function]] = {
    "l2_normalize": (
        lambda a, b: ops.l2_normalize(a)[0],
        lambda a, b: F.normalize(a, dim=1),
    ),
    "similarity_logsumexp": (
        lambda a, b: ops.similarity_logsumexp(a, b, _SCALE).rows,
        lambda a, b: torch.logsumexp(a @ b.T * _SCALE, 1),
    ),
    "similarity_sum": (
        lambda a, b: ops.similarity_sum(a, b, _SCALE, phi="softplus"),
        lambda a, b: F.softplus(a @ b.T * _SCALE).sum(1),
    ),
    "similarity_topk": (
        lambda a, b: ops.similarity_topk(a, b, _SCALE, k=5).values,
        lambda a, b: (a @ b.T * _SCALE).topk(5, dim=1).values,
    ),
    "nt_xent": (lambda a, b: nt_xent(a, b, TEMPERATURE), eager_ntxent),
    "clip": (lambda a, b: clip(a, b, TEMPERATURE), eager_clip),
}


def _timer(function: Function, scope: Callable, backward: bool) -> Callable[[], float]:
    """Mean seconds of a call, over a few calls."""
    a, b = (torch.randn(_ROWS, _WIDTH, requires_grad=backward) for _ in range(2))

    def run() -> float:
        with scope():
            start = time.perf_counter()
            for _ in range(_CALLS):
                result = function(a, b)
                if backward:
                    result.sum().backward()
            return (time.perf_counter() - start) / _CALLS

    return run


def main(argv: list[str] | None = None) -> None:
    """Print a line per primitive: median microseconds of every backend and of eager PyTorch."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    backends = fastcl_backends()
    names = [*(c.name for c in backends), "eager"]
    print(f"fastcl {fastcl.__version__}: microseconds per call, N = {_ROWS}, D = {_WIDTH}, fp32")
    print(f"{'':24}{'':20}" + "".join(f"{name:>16}" for name in names))
    for name, (ours, eager) in _PAIRS.items():
        for backward in (False, True):
            if backward and name == "similarity_topk":  # a selection has no gradient
                continue
            runs = {c.name: _timer(ours, c.scope, backward) for c in backends}
            runs["eager"] = _timer(eager, torch.enable_grad, backward)
            samples = interleave(runs, options.rounds, 1.0)
            line = "".join(f"{1e3 * summary(samples[n])['median_ms']:>16.1f}" for n in names)
            print(
                f"{name:24}{'forward + backward' if backward else 'forward':20}{line}", flush=True
            )


if __name__ == "__main__":
    main()

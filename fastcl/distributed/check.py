"""Proving the contract of :mod:`fastcl.distributed` for a loss: several processes against one."""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# in 16 bits what rounding costs where a gradient nearly cancels, as a scale's may
_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 0.1,
    torch.float16: 0.02,
}
_WIDTH = 6  # of the default inputs


@dataclass
class Case:
    """A loss and one global batch for it; see :func:`check_distributed`."""

    loss: Callable
    inputs: tuple[Tensor, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    tolerance: float | None = None
    batches: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self):
        if not self.inputs:
            generator = torch.Generator().manual_seed(0)
            first = torch.randn(13, _WIDTH, generator=generator, dtype=torch.float64)
            noise = torch.randn(13, _WIDTH, generator=generator, dtype=torch.float64)
            self.inputs = (first, first + noise)
        if self.tolerance is None:
            self.tolerance = _TOLERANCE[self.dtype]

    def sizes(self, world: int) -> list[int]:
        """Rows on each rank: as given, or ever more and on the last rank one."""
        total = len(self.inputs[0])
        if world in self.batches:
            sizes = list(self.batches[world])
            if len(sizes) != world or sum(sizes) != total or min(sizes) < 1:
                raise ValueError(
                    f"batches[{world}] is {sizes}; expected {world} positive numbers that sum to "
                    f"{total}"
                )
            return sizes
        if total < world:
            raise ValueError(f"inputs have {total} rows; expected at least one for each of {world}")
        sizes = [1] * world
        for extra in range(total - world):  # 1, 2, 3, ... shares of what is left
            ranks = [rank for rank in range(world - 1) for _ in range(rank + 1)] or [0]
            sizes[ranks[extra % len(ranks)]] += 1
        return sizes


@dataclass
class Outcome:
    """How far the ranks are from one process, relative to its largest entry."""

    name: str
    sizes: list[int]
    loss_error: float
    gradient_error: float
    worst: str
    tolerance: float

    @property
    def passed(self) -> bool:
        return max(self.loss_error, self.gradient_error) <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.passed else f"WRONG (allowed {self.tolerance:.0e})"
        return (
            f"{self.name}, rows {self.sizes}: loss {self.loss_error:.1e}, gradients "
            f"{self.gradient_error:.1e} (worst: {self.worst}), {verdict}"
        )


def check_distributed(
    loss: Callable,
    world_size: Sequence[int] = (1, 2, 3, 4),
    *,
    inputs: tuple[Tensor, ...] = (),
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    batches: Mapping[int, Sequence[int]] | None = None,
    timeout: float = 60.0,
) -> list[Outcome]:
    """Prove that a loss on several ranks trains as it would on one.

    Processes on this machine (gloo) train a small encoder and the loss's own parameters under
    DDP, the batch spread over them; loss and averaged gradients must equal those of a single
    process on the whole batch. Call it below ``if __name__ == "__main__":``, as anything that
    starts processes.

    Args:
        loss: a module or picklable function of ``inputs`` and ``options`` that returns a scalar,
            or a tuple that begins with one.
        world_size: numbers of ranks.
        inputs: tensors with one row per sample. Floating ones of two or more dimensions pass
            through the encoder, others (labels) come as they are. By default two views [13, 6].
        options: keyword arguments; tensors among them also have one row (or entry) per sample.
        dtype: of the embeddings; the encoder is float64, the loss's parameters only with float64.
        tolerance: largest deviation, relative to the largest entry of each tensor; by default
            1e-10 for float64, 1e-4 for float32, and what rounding costs in 16 bits.
        batches: rows on each rank for a number of ranks, ``{2: [8, 5]}``; by default unequal, the
            last rank holding one.
        timeout: seconds that a rank waits for another.

    Returns:
        One outcome per number of ranks; printed, they say what was compared.

    Raises:
        AssertionError: loss or gradients differ.
        RuntimeError: a rank failed, with its traceback.
    """
    case = Case(loss, inputs, options or {}, dtype, tolerance, batches or {})
    return check_cases({type(loss).__name__: case}, world_size, timeout)


def check_cases(
    cases: Mapping[str, Case], world_size: Sequence[int] = (1, 2, 3, 4), timeout: float = 60.0
) -> list[Outcome]:
    """:func:`check_distributed` for many cases at the cost of starting processes once."""
    worlds = sorted(set(world_size))
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        # by file: pickled to another process, every tensor would take a file descriptor
        torch.save(dict(cases), Path(folder, "cases"))
        _start(max(worlds), worlds, Path(folder), timeout)
        results = {
            world: [torch.load(Path(folder, f"{world}-{rank}.pt")) for rank in range(world)]
            for world in {1, *worlds}
        }
    for world in worlds:
        for name, case in cases.items():
            truth, copies = results[1][0][name], [result[name] for result in results[world]]
            outcomes.append(_compare(name, case, world, truth, copies))
    wrong = [str(outcome) for outcome in outcomes if not outcome.passed]
    if wrong:
        raise AssertionError("ranks differ from one process:\n" + "\n".join(wrong))
    return outcomes


def _compare(name: str, case: Case, world: int, truth: dict, copies: list[dict]) -> Outcome:
    errors: dict[str, float] = {}
    for copy_ in copies:
        for key, expected in truth.items():
            difference = (copy_[key].double() - expected.double()).abs().max()
            error = float(difference / expected.double().abs().max().clamp_min(1e-30))
            errors[key] = max(errors.get(key, 0.0), error if error == error else float("inf"))
    loss_error = errors.pop("loss")
    worst = max(errors, key=lambda key: errors[key])
    assert case.tolerance is not None
    return Outcome(name, case.sizes(world), loss_error, errors[worst], worst, case.tolerance)


# --------------------------------------------------------------------------------- processes


def _start(ranks: int, worlds: list[int], folder: Path, timeout: float) -> None:
    context = _context()
    processes = [
        context.Process(target=_work, args=(rank, worlds, folder, timeout), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            time.sleep(0.02)
        if any(p.exitcode for p in processes):
            time.sleep(0.5)  # the others' reports may name the rank at fault better
            reports = [f.read_text() for f in sorted(folder.glob("*.error"))]
            codes = [p.exitcode for p in processes]
            raise RuntimeError("\n".join(reports) or f"ranks ended with exit codes {codes}")
    finally:
        for process in processes:
            process.kill()
            process.join()


def _context():
    """A way to start processes that does not fork this one, which may have threads: forks of a
    server that has imported torch where there is such a thing, since importing takes seconds
    (and what DDP imports when it is first used, another one)."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    return context


def _work(rank: int, worlds: list[int], folder: Path, timeout: float) -> None:
    torch.set_num_threads(1)
    name = ""
    try:
        cases: dict[str, Case] = torch.load(folder / "cases", weights_only=False)
        for world in sorted({1, *worlds}):
            if rank >= world:
                continue
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous-{world}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
            )
            results = {}
            for name, case in cases.items():
                results[name] = _train_once(case, rank, world)
            torch.save(results, folder / f"{world}-{rank}.pt")
            dist.destroy_process_group()
    except Exception:
        report = f"{name}, rank {rank}:\n{traceback.format_exc()}"
        (folder / f"{rank}.error").write_text(report)
        raise SystemExit(1) from None


class _Trained(nn.Module):
    """An encoder and a loss; both have parameters whose gradients are compared."""

    def __init__(self, case: Case):
        super().__init__()
        width = next(x.shape[-1] for x in case.inputs if _is_encoded(x))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.encoder = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 8))
        # in float64, so that embeddings round alike however the batch is divided
        self.encoder.to(torch.float64)
        self.dtype = case.dtype
        self.loss = copy.deepcopy(case.loss)
        if isinstance(self.loss, nn.Module) and case.dtype == torch.float64:
            self.loss.to(torch.float64)

    def forward(self, *inputs, **options):
        embedded = [
            self.encoder(x.to(torch.float64)).to(self.dtype) if _is_encoded(x) else x
            for x in inputs
        ]
        return self.loss(*embedded, **options)


def _is_encoded(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2


def _train_once(case: Case, rank: int, world: int) -> dict[str, Tensor]:
    sizes = case.sizes(world)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def mine(value):
        return value[rows] if isinstance(value, Tensor) else value

    model = nn.parallel.DistributedDataParallel(_Trained(case))
    output = model(*map(mine, case.inputs), **{k: mine(v) for k, v in case.options.items()})
    loss = output[0] if isinstance(output, tuple) else output
    loss.backward()
    results = {"loss": loss.detach()}
    if isinstance(output, tuple) and isinstance(output[1], dict):
        results |= {f"metric {name}": value for name, value in output[1].items()}
    for name, parameter in model.module.named_parameters():
        missing = torch.full_like(parameter, float("nan"))
        results[name] = (missing if parameter.grad is None else parameter.grad).detach()
    return results

"""SimCLR, MoCo and code search trained on the GPU, and their steps captured in graphs."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcl import InfoNCELoss, MomentumEncoder, NegativeQueue, NTXentLoss
from fastcl.data.extras import require
from fastcl.encoders import RESNETS, SmallCNN, projection_head
from fastcl.trainers.command import MODULES

from .. import report
from ..measure import interleave, reason_of, summary
from ..training import CONFIDENCE, METHODS, Run, compare, held_out
from .stage import Stage

_REFERENCE = Path(__file__).parents[1] / "results/epyc-zen4-2cores/train.json"
_PRECISIONS = ("32-true", "bf16-mixed")
_AT_A_TIME = 4  # processes that share the device; steps this small leave it idle for the most part
_PATIENCE = 60  # seconds beyond the budget for what has begun
_TOLERANCE = 0.02  # of a loss after four steps in bf16, whose sums a compiler orders anew
_TOY = ("--epochs", "1", "--width", "4", "--label_draws", "1", "--warmup_epochs", "0")


def runs(toy: bool) -> list[Run]:
    """The runs on the device, with the seeds of ``make demo``."""
    if toy:
        return [Run("simclr", seeds=(0, 1), options=_TOY)]
    return [Run(method, precision, "gpu") for method in METHODS for precision in _PRECISIONS]


def references() -> dict[str, dict]:
    """The kept runs on a CPU by method, those of them that learnt from the data that is here.

    Code search learns from the library of the Python that runs.
    """
    if not _REFERENCE.exists():
        return {}
    kept = json.loads(_REFERENCE.read_text())
    same = kept["machine"]["python"] == platform.python_version()
    return {r["method"]: r for r in kept["runs"] if same or r["method"] != "clip"}


def run(stage: Stage) -> None:
    """Everything of this stage."""
    train(stage)
    stage.each(stage.chosen(cases(stage.toy)), partial(measure, stage), "step")


# ------------------------------------------------------------------------------------ training


def train(stage: Stage) -> None:
    """Every run, several at a time; then what its scores are beside those of a CPU."""
    wanted = stage.chosen(runs(stage.toy))
    try:
        require(*MODULES, user="training")
    except ModuleNotFoundError as error:
        for one in wanted:
            stage.add({"kind": "training", "case": one.name, "declined": str(error)})
        return
    known = {} if stage.toy else references()
    absent = [] if stage.toy else [m for m in METHODS if m not in known]
    here = [Run(m, seeds=tuple(range(8))) for m in absent if any(r.method == m for r in wanted)]
    jobs = here + wanted  # the slowest first
    done = {}
    with ThreadPoolExecutor(min(stage.workers, _AT_A_TIME + len(here))) as threads:
        for job, record in zip(jobs, threads.map(partial(_attempt, stage), jobs), strict=True):
            if record is None:
                stage.skip(f"training {job.name}")
                continue
            stage.add({"kind": "training", "case": job.name} | record)
            if "failed" not in record:
                done[job] = record
    known |= {job.method: done[job] for job in here if job in done}
    for job in (job for job in wanted if job in done):
        reference = done[job] if stage.toy else known.get(job.method)
        stage.add({"kind": "verdict", "case": job.name} | judge(done[job], reference))


def _attempt(stage: Stage, job: Run) -> dict | None:
    """A run's record, or ``None`` where no time is left."""
    if stage.left() <= 0:
        return None
    try:
        return job.train(stage.left() + _PATIENCE) | {"held_out": held_out(job.method)}
    except Exception as error:  # the others may still go well
        return {"failed": reason_of(error)}


def judge(record: dict, reference: dict | None) -> dict:
    """The scores of a run beside those of ``reference``; failed where one is too far off."""
    if reference is None:
        return {"failed": "no run on a CPU to compare with"}
    metrics = compare(record, reference)
    verdict = {"reference": reference["command"], "confidence": CONFIDENCE, "metrics": metrics}
    outside = [name for name, m in metrics.items() if not abs(m["difference"]) <= m["allowed"]]
    if outside:
        verdict["failed"] = f"outside the spread of seeds on a CPU: {', '.join(outside)}"
    return verdict


# --------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Step:
    """A training step from views to parameters.

    Attributes:
        method: simclr or moco.
        encoder: small_cnn, the demo's, or a ResNet for small images.
        side: of the images.
        batch: images.
        keys: in MoCo's queue.
    """

    method: str
    encoder: str
    side: int
    batch: int
    keys: int = 0

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.method}-{self.encoder}-{self.side}px-{self.batch}"


def cases(toy: bool) -> list[Step]:
    """Steps of the demo's size, which are all launches, and of CIFAR's usual one."""
    if toy:
        return [Step("simclr", "small_cnn", 8, 8), Step("moco", "small_cnn", 8, 8, 32)]
    return [
        Step("simclr", "small_cnn", 8, 256),
        Step("moco", "small_cnn", 8, 256, 1024),
        Step("simclr", "resnet18", 32, 512),
        Step("moco", "resnet18", 32, 256, 65536),
    ]


class Objective(nn.Module):
    """The loss of two views [B, C, H, W] by the parts that the trainers have.

    MoCo's comes without the shuffling of keys, whose permutation the host draws.
    """

    def __init__(self, step: Step):
        super().__init__()
        channels = 1 if step.encoder == "small_cnn" else 3
        if step.encoder == "small_cnn":
            encoder: nn.Module = SmallCNN(channels, 16)
        else:
            encoder = RESNETS[step.encoder](stem="cifar", in_channels=channels)
        head = projection_head("simclr" if step.method == "simclr" else "moco_v2",
                               encoder.feature_dim, 128, hidden_features=128)  # fmt: skip
        self.encoder = nn.Sequential(encoder, head).to(memory_format=torch.channels_last)
        self.keys = MomentumEncoder(self.encoder) if step.method == "moco" else None
        self.loss: nn.Module = NTXentLoss(0.5)
        if self.keys is not None:
            self.loss = InfoNCELoss(0.2, queue=NegativeQueue(128, step.keys))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of views [B, C, H, W]."""
        if self.keys is None:
            return self.loss(*self.encoder(torch.cat([first, second])).chunk(2))
        return self.loss(self.encoder(first), self.keys(second))


def _ready(stage: Stage, step: Step, compiled: bool) -> Callable[[], Tensor]:
    """A whole step in bf16, ever the same views; alike for every way of taking it."""
    device = stage.device.name
    torch.manual_seed(0)
    objective = Objective(step).to(device)
    channels = 1 if step.encoder == "small_cnn" else 3
    views = torch.rand(2, step.batch, channels, step.side, step.side).to(device)
    if objective.keys is not None:  # a queue that grows would be another graph every step
        objective.loss.queue.enqueue(torch.randn(step.keys, 128).to(device))
    optimizer = torch.optim.AdamW(
        objective.encoder.parameters(), lr=1e-3, capturable=stage.device.graphs
    )
    backend = "eager" if stage.toy else "inductor"  # whose C++ compiler takes half a minute
    forward = torch.compile(objective, backend=backend) if compiled else objective

    def work() -> Tensor:
        if objective.keys is not None:
            objective.keys.update(objective.encoder)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = forward(*views)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return work


def measure(stage: Stage, step: Step) -> dict:
    """Times of a step launched from Python, compiled, and replayed as a graph."""
    device = stage.device
    eager, compiled, captured = (_ready(stage, step, flag) for flag in (False, True, False))
    replay, replayed = device.capture(captured)
    taken = 3 if device.graphs else 1  # steps while capturing
    for work in (eager, compiled):
        for _ in range(taken):
            work()
    losses = {"eager": float(eager()), "compiled": float(compiled())}
    result = replay()
    losses["graph"] = float(replayed if device.graphs else result)
    record = {**vars(step), "losses": losses}
    for way, loss in losses.items():
        if not abs(loss - losses["eager"]) <= _TOLERANCE * abs(losses["eager"]):
            return record | {"failed": f"{way} gives {loss}, eager {losses['eager']}"}
    ways = {"eager": eager, "compiled": compiled, "graph": replay}
    samples = interleave(
        {way: partial(device.seconds, work) for way, work in ways.items()},
        1 if stage.toy else None, 2.0, 20,
    )  # fmt: skip
    times = {way: summary(taken) for way, taken in samples.items()}
    best = times["graph"]["median_ms"]
    return record | {
        "times": times,
        "graph_speedup": {way: t["median_ms"] / best for way, t in times.items()},
        "peak_bytes": device.peak(eager),
    }


# -------------------------------------------------------------------------------------- tables


def lines(records: list[dict]) -> list[str]:
    """Scores beside those of a CPU, what they took, and the steps."""
    number, found = report.number, []
    trained = {r["case"]: r for r in records if r["kind"] == "training" and "seeds" in r}
    rows = []
    for r in (r for r in records if r["kind"] == "verdict" and "metrics" in r):
        seeds = trained[r["case"]]["seeds"].values()
        peaks = [s["device"].get("peak_bytes") for s in seeds]
        epoch = statistics.fmean(s["seconds_per_epoch"] for s in seeds)
        for metric, m in r["metrics"].items():
            rows.append(
                (
                    r["case"], metric, *(f"{100 * m[k]:.2f}" for k in ("mean", "reference")),
                    f"{100 * m['difference']:+.2f}", f"{100 * m['allowed']:.2f}",
                    "yes" if abs(m["difference"]) <= m["allowed"] else "NO", number(epoch),
                    number(trained[r["case"]]["seconds"]),
                    number(None if None in peaks else max(peaks) / 2**20),
                )
            )  # fmt: skip
    header = (
        "run", "score", "%", "CPU", "difference", "allowed", "inside", "s/epoch", "s in all", "MB",
    )  # fmt: skip
    found += [report.plain("", header, rows)] if rows else []
    found += list(dict.fromkeys(r["declined"] for r in records if "declined" in r))
    header = ("step in bf16", "eager ms", "compiled", "graph", "graph x eager", "x compiled", "MB")
    rows = []
    for r in (r for r in records if "times" in r):
        peak, speedup = r["peak_bytes"], r["graph_speedup"]
        rows.append(
            (
                r["case"], *(number(r["times"][way]["median_ms"]) for way in r["times"]),
                number(speedup["eager"]), number(speedup["compiled"]),
                number(None if peak is None else peak / 2**20),
            )
        )  # fmt: skip
    return found + ([report.plain("", header, rows)] if rows else [])

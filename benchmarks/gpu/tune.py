"""Time other tiles than those of kernels/configs.json, and write a table that prefers the faster.

Nothing of this happens at import or at a first call: the table written to OUT/configs.json takes
effect when somebody puts it in the place of the shipped one, entries, reasons and all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from fastcl.kernels import configs

import fastcl
from fastcl.ops import Pairs, similarity_logsumexp, similarity_topk

from .. import device, report
from ..measure import interleave, reason_of, summary
from .stage import Stage, fatal

_ROWS = {1024: 2048, 4096: 8192, 16384: None}  # timed at -> largest number it is then used for
_WIDTHS = {64: 64, 128: 128, 256: 256, 512: None}
_KERNELS = ("product", "sweep", "weights", "sweep maxima", "topk", "finish")
_DTYPES = {16: torch.bfloat16, 32: torch.float32}
_GAIN = 0.97  # of the time: smaller gains are noise
_AGREE = {16: 2e-2, 32: 1e-4}  # relative, between results of two tiles
_CHANGED = ("own", "other", "fold", "warps", "stages", "programs")


@dataclass(frozen=True)
class Target:
    """A kernel at one size."""

    kernel: str
    bits: int
    width: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.rows}x{self.width} {self.bits} bits"

    def work(self, device_name: str) -> Callable[[], list[torch.Tensor]]:
        """The operator that spends its time in this kernel."""
        generator = torch.Generator(device_name).manual_seed(0)
        z = torch.randn(self.rows, self.width, generator=generator, device=device_name)
        z = torch.nn.functional.normalize(z).to(_DTYPES[self.bits])
        half = self.rows // 2
        views = Pairs(skip=(0, half, -half))
        if self.kernel == "topk":
            return lambda: [similarity_topk(z, None, 10.0, k=8, pairs=views).values]
        if self.kernel == "sweep maxima":
            keys = z.flip(0)
            return lambda: list(similarity_logsumexp(z, keys, 10.0, columns=True, maxima=True))
        if self.kernel in ("sweep", "finish"):
            return lambda: [similarity_logsumexp(z, None, 10.0, pairs=views).rows]
        z.requires_grad_()

        def both():
            rows = similarity_logsumexp(z, None, 10.0, pairs=views).rows
            return [rows.detach(), *torch.autograd.grad(rows.sum(), z)]

        return both


def targets(quick: bool, toy: bool) -> list[Target]:
    """Every entry of the table that a size of its own can be timed for."""
    if toy:
        return [Target(kernel, 32, 16, 40) for kernel in ("sweep", "product")]
    rows = (16384,) if quick else (16384, 4096, 1024)
    return [
        Target(kernel, bits, width, n)
        for bits in _DTYPES
        for n in rows
        for kernel in _KERNELS
        for width in _WIDTHS
    ]


def _arch(device_name: str) -> int:
    if device_name == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _incumbent(target: Target, arch: int) -> configs.Config:
    return configs.lookup(target.kernel, arch, target.bits, target.width, target.rows)


def candidates(entry: configs.Config) -> list[configs.Config]:
    """``entry``, then its neighbours: other tiles, warps, stages and shares of the device."""
    found = [entry]

    def consider(**changes: int) -> None:
        new = replace(entry, **changes)
        if new.fold:  # one group of 16 rows per warp stays in its threads
            new = replace(new, fold=max(1, new.other // (16 * new.warps)))
        if 16 <= new.other <= 256 and 16 <= new.own <= 256 and new not in found:
            found.append(new)

    for own in (entry.own, entry.own // 2, 2 * entry.own):
        for other in (entry.other, entry.other // 2, 2 * entry.other):
            consider(own=own, other=other)
            if own * other >= 64 * 128:
                consider(own=own, other=other, warps=8 if entry.warps == 4 else 4)
    for stages in (entry.stages - 1, entry.stages + 1):
        if 1 <= stages <= 5:
            consider(stages=stages)
    for programs in (1, 2, 3, 4):
        consider(programs=programs)
    return found


@contextmanager
def using(entry: configs.Config) -> Iterator[None]:
    """Let ``entry`` serve every launch of its kernel."""
    before = configs.ENTRIES
    anywhere = {"d": None, "rows": None, "triton": None}
    configs.ENTRIES = (replace(entry, **anywhere), *before)
    configs.lookup.cache_clear()
    try:
        with fastcl.use_backend("triton"):
            yield
    finally:
        configs.ENTRIES = before
        configs.lookup.cache_clear()


def run(stage: Stage) -> None:
    """Everything of this stage."""
    arch = _arch(stage.device.name)
    chosen = stage.chosen(targets(stage.quick, stage.toy))
    if not stage.toy:
        kinds = dict.fromkeys(replace(t, rows=1024) for t in chosen)
        stage.parallel([(kind,) for kind in kinds], compile_all)
    winners: dict[Target, configs.Config] = {}

    def measure(target: Target) -> dict:
        record, winner = _time(stage, target, arch)
        if winner is not None:
            winners[target] = winner
            write(stage.out / "configs.json", winners, arch)
        return record

    stage.each(chosen, measure, "tile")


def compile_all(device_name: str, seconds: float, target: Target) -> list[dict]:
    """Compile every candidate of ``target``; in a process of its own, into the cache on disk.

    Half of the time is left for timing: what is not compiled by then is when its turn comes.
    """
    end = time.time() + 0.5 * seconds
    work = target.work(device_name)
    if target.kernel not in _asked_for(work):
        return []
    for entry in candidates(_incumbent(target, _arch(device_name))):
        if time.time() > end:
            break
        with using(entry):
            try:
                work()
            except Exception as error:  # too large for the device; seen again where it is timed
                if fatal(error):
                    break
    return []


def _time(stage: Stage, target: Target, arch: int) -> tuple[dict, configs.Config | None]:
    """Times of every candidate, and the entry to write: the incumbent unless one is faster."""
    work, incumbent = target.work(stage.device.name), _incumbent(target, arch)
    if target.kernel not in _asked_for(work):
        return {"result": "not used at this size"}, None
    entries = candidates(incumbent)[: 2 if stage.toy else None]
    runs, refused, exact = {}, {}, None
    for number, entry in enumerate(entries):
        with using(entry):
            try:
                replay, results = stage.device.capture(work)
                replay()
                stage.device.synchronize()
            except Exception as error:
                if fatal(error):
                    raise
                refused[_shape(entry)] = reason_of(error)
                continue
        if exact is None:
            exact = [x.clone() for x in results]
        if not _agree(results, exact, _AGREE[target.bits]):
            refused[_shape(entry)] = "wrong: another result than the incumbent's"
            continue
        runs[number] = partial(_replayed, stage.device, entry, replay)
    if 0 not in runs:
        return {"failed": f"the present entry: {refused}", "refused": refused}, None
    rounds = 1 if stage.toy else None
    samples = interleave(runs, rounds, 1.0, 20)
    times = {_shape(entries[number]): summary(taken) for number, taken in samples.items()}
    before = times[_shape(incumbent)]["median_ms"]
    best = min(runs, key=lambda number: times[_shape(entries[number])]["median_ms"])
    after = times[_shape(entries[best])]["median_ms"]
    if after > _GAIN * before:
        best, after = 0, before
    reason = (
        f"measured, {stage.device.describe().get('device', 'interpreter')}, triton "
        f"{configs.TRITON}: {target.name} in {1e3 * after:.1f} us"
    )
    reason += f", best of {len(runs)}" if best == 0 else f"; {_shape(incumbent)} {1e3 * before:.1f}"
    winner = replace(
        entries[best], arch=(arch,), d=_WIDTHS.get(target.width), rows=_ROWS.get(target.rows),
        triton=(configs.TRITON,), by=reason,
    )  # fmt: skip
    record = {"times": times, "refused": refused, "best": _shape(entries[best]),
              "incumbent": _shape(incumbent), "gain": before / after}  # fmt: skip
    return record, winner


def _asked_for(work: Callable) -> set[str]:
    """The kernels whose configuration ``work`` looks up."""
    asked, lookup = set(), configs.lookup

    def note(kernel: str, *where: int) -> configs.Config:
        asked.add(kernel)
        return lookup(kernel, *where)

    configs.lookup = note
    try:
        with fastcl.use_backend("triton"):
            work()
    finally:
        configs.lookup = lookup
    return asked


def _replayed(on: device.Cpu, entry: configs.Config, replay: Callable) -> float:
    with using(entry):  # where there is no graph, a replay launches again
        return on.seconds(replay)


def _agree(ours: list[torch.Tensor], exact: list[torch.Tensor], tolerance: float) -> bool:
    return all(
        float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm())
        for a, b in zip(ours, exact, strict=True)
    )


def _shape(entry: configs.Config) -> str:
    return (
        f"{entry.own}x{entry.other} w{entry.warps} s{entry.stages} f{entry.fold} p{entry.programs}"
    )


def write(file: Path, winners: dict[Target, configs.Config], arch: int) -> None:
    """The shipped table with ``winners`` before the entries that they replace.

    Narrower and shorter entries stand first, so that none hides one that was not timed.
    """
    new = list(winners.values())
    for a in winners.values():  # an entry for fewer rows that is the next longer one's is no entry
        longer = [
            b for b in new
            if (b.kernel, b.bits, b.d) == (a.kernel, a.bits, a.d) and _end(b.rows) > _end(a.rows)
        ]  # fmt: skip
        if longer:
            following = min(longer, key=lambda b: _end(b.rows))
            if all(getattr(a, name) == getattr(following, name) for name in _CHANGED):
                new.remove(a)
    entries = sorted([*new, *configs.ENTRIES], key=lambda e: (_end(e.d), _end(e.rows)))
    names = [field.name for field in fields(configs.Config)]
    lines = []
    for entry in sorted(entries, key=lambda e: e.kernel):
        row = {name: asdict(entry)[name] for name in names}
        lines.append("  " + json.dumps(row))
    table = json.loads((Path(configs.__file__).parent / "configs.json").read_text())
    rules = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table["rules"].items())
    body = ",\n".join(lines)
    file.write_text(f'{{\n "rules": {{\n{rules}\n }},\n "configs": [\n{body}\n ]\n}}\n')


def _end(limit: int | None) -> float:
    return float("inf") if limit is None else limit


def lines(records: list[dict]) -> list[str]:
    """A row per kernel and size."""
    rows = []
    for r in (r for r in records if "times" in r):
        best, before = r["times"][r["best"]], r["times"][r["incumbent"]]
        rows.append(
            (
                r["case"], r["incumbent"], f"{before['median_ms']:.4g}", r["best"],
                f"{best['median_ms']:.4g}", f"{r['gain']:.2f}",
                f"{len(r['times'])} of {len(r['times']) + len(r['refused'])}",
            )
        )  # fmt: skip
    header = ("kernel", "present", "ms", "best", "ms", "gain", "timed")
    return [report.plain("", header, rows)] if rows else []

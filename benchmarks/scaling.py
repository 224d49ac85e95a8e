"""``python -m benchmarks.scaling``: memory and time of a loss over many ranks, on paper.

Prints the tables of docs/scaling.md from the formulas below. ``--check`` and ``--time`` run the
losses on this machine and hold the formulas against what happens; ``--plot FOLDER`` draws.
Times on GPUs are predictions: nothing here was measured on one.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

GRADIENT = 4  # bytes of a gradient, which is fp32 on the wire and in sums


@dataclass(frozen=True)
class Problem:
    """``rows`` queries and as many keys of ``width`` numbers on each of ``ranks``."""

    ranks: int
    rows: int
    width: int
    key_bytes: int = 2  # on the wire: what products are formed in
    symmetric: bool = False  # NT-Xent (rows are both views), else CLIP

    @property
    def shard(self) -> int:
        """Numbers in a shard."""
        return self.rows * self.width

    @property
    def others(self) -> int:
        """Shards that a rank meets besides its own."""
        return self.ranks // 2 if self.symmetric else self.ranks - 1

    @property
    def flops(self) -> tuple[float, float]:
        """Forward and backward, per rank: 1 and 3 products of 2 D operations per pair."""
        pairs = self.rows * self.rows * self.ranks / (2 if self.symmetric else 1)
        return 2 * pairs * self.width, 6 * pairs * self.width


def sent_bytes(p: Problem, mode: str) -> tuple[int, int]:
    """What a rank sends in forward and backward: keys out, sums home; keys and sums out,
    gradients home. A collective counts what its ring algorithm sends."""
    keys, sums = p.shard * p.key_bytes, 4 * p.rows
    gradients = p.shard * GRADIENT
    if mode == "ring":
        return p.others * (keys + sums), p.others * (keys + 2 * sums + gradients)
    everyone = p.ranks - 1
    return everyone * keys + p.others * sums, everyone * (2 * sums + gradients)


def memory_bytes(p: Problem, mode: str, collective_copy: bool = False) -> int:
    """Peak of a step beyond the embeddings, reached in backward.

    ``collective_copy``: gloo's reduce-scatter copies its input, NCCL's does not.
    """
    gradients = 1 if p.symmetric else 2  # of the own queries, and of the own keys
    own = 4 * gradients + (p.key_bytes if p.key_bytes == 2 else 0)  # unit rows, what travels
    if mode == "ring":  # from 6 ranks (NT-Xent) on; below, fewer of these are alive at once
        # shard held and arriving; the block's two gradients; gift leaving and gift arriving
        flying = 2 * p.key_bytes + 4 * GRADIENT
        return p.shard * (own + gradients * GRADIENT + flying)
    wide = p.others * (p.key_bytes + GRADIENT) + p.ranks * GRADIENT * (1 + collective_copy)
    return p.shard * (own + (gradients + 1) * GRADIENT + wide)


# ------------------------------------------------------------------------------ time on paper


@dataclass(frozen=True)
class Cluster:
    """Assumed rates, per GPU: an H100-class node with a 400 Gb/s link per GPU."""

    flops: float = 400e12  # bf16 products in a fused sweep, about 40 % of peak
    inside: float = 300e9  # bytes/s between GPUs of a node
    outside: float = 40e9  # bytes/s of a GPU's own link to other nodes
    node: int = 8
    latency: float = 15e-6  # of one exchange
    memory: float = 80e9


def seconds(p: Problem, mode: str, c: Cluster) -> dict[str, float]:
    """Predicted time of a step: ``compute``, ``wire`` if nothing overlapped, and ``step``."""
    forward, backward = (flops / c.flops for flops in p.flops)
    if mode == "ring":  # one GPU of each node sends to the next: its own link is the bottleneck
        link = c.inside if p.ranks <= c.node else c.outside
        wires = [sent / link + p.others * c.latency for sent in sent_bytes(p, mode)]
        own = 1 / (p.others + 1)  # the own block runs while the first shard arrives
        step = sum(
            work * own + max(work * (1 - own), wire)
            for work, wire in zip((forward, backward), wires, strict=True)
        )
    else:  # a collective brings each number into a node once and uses all of its links
        remote = max(0, p.ranks - c.node) / max(1, p.ranks - 1)
        wires = [
            max(sent / c.inside, sent * remote / (c.outside * c.node))
            + c.latency * math.log2(max(2, p.ranks))
            for sent in sent_bytes(p, mode)
        ]
        step = forward + backward + sum(wires)
    return {"compute": forward + backward, "wire": sum(wires), "step": step}


def sharded_queue(ranks: int, queries: int, keys: int, width: int, c: Cluster) -> dict[str, float]:
    """A queue of ``keys`` in all, a part on each rank: queries visit, sums and gradients return.

    Keys need no gradient, so a sweep is 2 products and there is no backward.
    """
    flops = 4 * queries * ranks * (keys / ranks) * width
    numbers = queries * ranks * width
    remote = max(0, ranks - c.node) / max(1, ranks - 1)
    rate = min(c.inside, c.outside * c.node / remote if remote else c.inside)
    wire = numbers * (2 + GRADIENT) / rate
    return {
        "compute": flops / c.flops,
        "wire": wire,
        "step": flops / c.flops + wire,
        "memory": keys / ranks * width * 2 + numbers * (2 + GRADIENT),
    }


def hiding_rows(c: Cluster, key_bytes: int = 2) -> float:
    """Rows per rank from which a ring's forward hides its keys: 2 n^2 D / F >= n D b / B."""
    return c.flops * key_bytes / (2 * c.outside)


# ------------------------------------------------------------------------------------- tables


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def _time(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.1f} s"


def tables(c: Cluster) -> str:
    """The predictions as Markdown."""
    lines = [
        "| GPUs | rows per GPU | negatives | mode | sent | memory | compute | wire | step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks, rows in ((8, 1024), (64, 1024), (1024, 1024), (1024, 8192), (10_000, 1024)):
        p = Problem(ranks, rows, 512)
        for mode in ("gather", "ring"):
            t = seconds(p, mode, c)
            lines.append(
                f"| {ranks:,} | {rows:,} | {ranks * rows:,} | {mode} | "
                f"{_gb(sum(sent_bytes(p, mode)))} | {_gb(memory_bytes(p, mode))} | "
                f"{_time(t['compute'])} | {_time(t['wire'])} | **{_time(t['step'])}** |"
            )
    lines += ["", "A billion negatives, 10,000 GPUs, D = 128:", ""]
    lines += ["| how | memory per GPU | compute | wire | step |", "|---|---|---|---|---|"]
    p = Problem(10_000, 100_000, 128)
    for mode in ("gather", "ring"):
        t = seconds(p, mode, c)
        lines.append(
            f"| in batch, 100,000 rows per GPU, {mode} | {_gb(memory_bytes(p, mode))} | "
            f"{_time(t['compute'])} | {_time(t['wire'])} | **{_time(t['step'])}** |"
        )
    q = sharded_queue(10_000, 32, 10**9, 128, c)
    lines.append(
        f"| queue of 10^9 sharded, 32 queries per GPU | {_gb(q['memory'])} | "
        f"{_time(q['compute'])} | {_time(q['wire'])} | **{_time(q['step'])}** |"
    )
    lines += ["", f"A ring hides its keys from {hiding_rows(c):,.0f} rows per GPU on."]
    return "\n".join(lines)


def plot(folder: Path, c: Cluster) -> None:
    """Memory and predicted time against the number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ranks = [2**k for k in range(1, 14)] + [10_000]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for rows, style in ((1024, "--"), (8192, "-")):
        for mode, colour in (("gather", "tab:orange"), ("ring", "tab:blue")):
            problems = [Problem(w, rows, 512) for w in ranks]
            label = f"{mode}, {rows} rows per GPU"
            memory = [memory_bytes(p, mode) / 1e9 for p in problems]
            axes[0].loglog(ranks, memory, style, color=colour, label=label)
            times = [seconds(p, mode, c)["step"] * 1e3 for p in problems]
            axes[1].loglog(ranks, times, style, color=colour, label=label)
    axes[0].axhline(c.memory / 1e9, color="grey", lw=0.8, label="memory of one GPU")
    axes[0].set(xlabel="GPUs", ylabel="GB per GPU", title="memory (formula, checked)")
    axes[1].set(xlabel="GPUs", ylabel="ms per step", title="time (prediction)")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "scaling.png", dpi=110)


# -------------------------------------------------------------------------------------- check


def _measure(rank: int, problem: Problem, mode: str, folder: str) -> None:
    """One step on one rank; rank 0 prints bytes and memory beside the formulas."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    import fastcl
    from fastcl.distributed.group import Group

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=problem.ranks,
        timeout=timedelta(seconds=300),
    )  # fmt: skip
    sent = _count_bytes(Group)
    batch = problem.rows // 2 if problem.symmetric else problem.rows
    loss = (fastcl.NTXentLoss if problem.symmetric else fastcl.CLIPLoss)(distributed=mode)
    dtype = torch.bfloat16 if problem.key_bytes == 2 else torch.float32
    z = torch.randn(2, batch, problem.width).to(dtype)

    def step():
        a, b = (x.detach().requires_grad_() for x in z)
        loss(a, b).backward()

    step()
    sent.clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    peak = int(torch.tensor([e.nbytes() for e in events]).cumsum(0).max())
    if rank == 0:
        expected = sum(sent_bytes(problem, mode)), memory_bytes(problem, mode, True)
        name = f"{'NT-Xent' if problem.symmetric else 'CLIP'} {mode}"
        print(
            f"| {name} | {problem.ranks} | {problem.key_bytes} | {sum(sent):,} | "
            f"{expected[0]:,} | {peak:,} | {expected[1]:,} |",
            flush=True,
        )
    dist.barrier()
    os._exit(0)


def _count_bytes(group) -> list[int]:
    """Make ``group`` note what it sends, collectives as their ring algorithms do."""
    sent: list[int] = []

    def counted(name, count):
        method = getattr(group, name)

        def call(self, *arguments):
            sent.append(count(self, *arguments))
            return method(self, *arguments)

        setattr(group, name, call)

    counted("all_gather", lambda g, x, *_: (g.size - 1) * x.nbytes)
    counted("reduce_scatter", lambda g, x, *_: (g.size - 1) * x[0].nbytes)
    counted("all_to_all", lambda g, parts, *_: sum(part.nbytes for part in parts))
    counted("shift", lambda g, tensors, *_: sum(x.nbytes for x in tensors))
    return sent


def check(rows: int, width: int) -> None:
    """Bytes sent and peak memory of rank 0, measured and by formula."""
    print("| loss | ranks | key bytes | sent | formula | peak memory | formula |")
    print("|---|---|---|---|---|---|---|")
    for symmetric in (True, False):
        for mode in ("gather", "ring"):
            for ranks, key_bytes in ((3, 4), (6, 4), (6, 2), (8, 4)):
                _run(_measure, Problem(ranks, rows, width, key_bytes, symmetric), mode)


def _time_steps(rank: int, problem: Problem, mode: str, folder: str) -> None:
    """Median seconds of a step, saved by rank 0."""
    import torch
    import torch.distributed as dist

    import fastcl

    torch.set_num_threads(1)
    fastcl.set_workspace(0)  # blocks of a sweep keep no exponentials; nor does one process then
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=problem.ranks
    )
    loss = (fastcl.NTXentLoss if problem.symmetric else fastcl.CLIPLoss)(distributed=mode)
    batch = problem.rows // 2 if problem.symmetric else problem.rows
    z = torch.randn(2, batch, problem.width)
    samples = []
    for _ in range(9):
        a, b = (x.detach().requires_grad_() for x in z)
        dist.barrier()
        started = time.perf_counter()
        loss(a, b).backward()
        samples.append(time.perf_counter() - started)
    Path(folder, f"{rank}.txt").write_text(str(sorted(samples)[len(samples) // 2]))
    dist.barrier()
    os._exit(0)


def check_time(rows: int, width: int) -> None:
    """Time on two processes of this machine, against one process's rate and the formula."""
    print("| loss | rows | mode | one process | two: measured | two: formula |")
    print("|---|---|---|---|---|---|")
    for symmetric in (True, False):
        alone = Problem(1, rows, width, 4, symmetric)
        rate = sum(alone.flops) / _run(_time_steps, alone, "ring")
        for mode in ("gather", "ring"):
            two = Problem(2, rows, width, 4, symmetric)
            print(
                f"| {'NT-Xent' if symmetric else 'CLIP'} | {rows} | {mode} | "
                f"{_time(sum(alone.flops) / rate)} | {_time(_run(_time_steps, two, mode))} | "
                f"{_time(sum(two.flops) / rate)} |",
                flush=True,
            )


def _run(function, problem: Problem, mode: str) -> float:
    """``function`` on every rank of a problem; the number that rank 0 leaves, if it does."""
    import fastcl  # noqa: F401  before forking, so that each rank need not import it

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=function, args=(rank, problem, mode, folder))
            for rank in range(problem.ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        left = Path(folder, "0.txt")
        return float(left.read_text()) if left.exists() else math.nan


def main(argv: list[str] | None = None) -> None:
    """Print the tables; check or draw if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--check", action="store_true", help="run on this machine")
    parser.add_argument("--time", action="store_true", help="time two processes")
    parser.add_argument("--rows", type=int, help="per rank, of a check")
    parser.add_argument("--width", type=int, help="of a check")
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    if options.check:
        check(options.rows or 128, options.width or 1024)
        return
    if options.time:
        check_time(options.rows or 2048, options.width or 256)
        return
    print(tables(Cluster()))
    if options.plot is not None:
        plot(options.plot, Cluster())


if __name__ == "__main__":
    main()

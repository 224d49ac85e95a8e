"""Memory errors and races in the smallest launches of every kernel, by compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import fastcl

from .stage import Stage

# by themselves first: what is not the sanitizer's doing shows, and Triton has compiled them
_TOOLS = ("plain", "memcheck", "racecheck")
_BACKENDS = ("triton", "cuda")


def run(stage: Stage) -> None:
    """Everything of this stage."""
    tools = _TOOLS[:1] if stage.toy else _TOOLS
    pairs = [f"{tool} {backend}" for tool in tools for backend in _BACKENDS]
    stage.each(stage.chosen(pairs), lambda pair: sanitize(stage, *pair.split()), "sanitizer")


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on the path, or where it is usually installed."""
    places = [shutil.which(name), os.environ.get("CUDA_HOME", "") + f"/bin/{name}"]
    places += sorted(map(str, Path("/usr/local").glob(f"cuda*/bin/{name}")), reverse=True)
    return next((p for p in places if p and Path(p).exists()), None)


def sanitize(stage: Stage, tool: str, backend: str) -> dict:
    """The smallest launches of ``backend`` under one of compute-sanitizer's tools, or plainly."""
    record = {"tool": tool, "backend": backend}
    if reason := fastcl.backends()[backend].unavailable:
        return record | {"result": reason}
    command = [sys.executable, "-m", f"{__package__}.sanitize", stage.device.name, backend]
    if tool != "plain":
        sanitizer = find_tool("compute-sanitizer")
        if sanitizer is None:
            return record | {"result": "compute-sanitizer is not installed"}
        # what an API call of torch's refuses, as when it asks what a driver can do, is no error
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [sanitizer, "--tool", tool, *quiet, "--error-exitcode", "9", *command]
    # separate allocations, so that a read beyond a tensor's end is a read beyond memory
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True,
            timeout=max(30.0, min(180.0, stage.left())),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return record | {"result": "no time to finish"}
    text = (done.stdout + done.stderr).strip()
    record |= {"code": done.returncode, "output": text[-2000:]}
    if tool != "plain" and ("not supported" in text or "Unable to" in text):
        return record | {"result": "does not work on this machine"}
    if done.returncode:
        return record | {"failed": f"exit code {done.returncode}"}
    return record | {"result": "the launches run" if tool == "plain" else text.splitlines()[-1]}


def smallest(device: str, backend: str) -> None:
    """A few tiles of every kernel, ragged: what the sanitizer watches."""
    with fastcl.use_backend(backend):
        _primitives(device)
        if backend == "cuda":
            _kernels(device)


def _primitives(device: str) -> None:
    z = torch.randn(70, 24, device=device, requires_grad=True)
    k = torch.randn(67, 24, device=device, requires_grad=True)
    wide = torch.randn(67, 300, device=device, requires_grad=True)
    pairs = fastcl.ops.Pairs(skip=(0,))
    results = [
        fastcl.ops.similarity_logsumexp(z, None, 4.0, pairs=pairs).rows,
        *fastcl.ops.similarity_logsumexp(z, k, 4.0, columns=True)[:2],
        fastcl.ops.similarity_logsumexp(z, k.detach(), 4.0).rows,
        fastcl.ops.similarity_logsumexp(wide, None, 1.0, pairs=pairs).rows,
        fastcl.ops.similarity_sum(z, k, 1.0, phi="softplus"),
        fastcl.ops.l2_normalize(z)[0].sum(1),
    ]
    fastcl.ops.similarity_topk(z, k, k=5)
    torch.cat(results).sum().backward()


def _kernels(device: str) -> None:
    """Whole losses, a queue that wraps around, and rows that tensor cores take as they are."""
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(150, 64, device=device, dtype=dtype, requires_grad=True)
        b = torch.randn(150, 64, device=device, dtype=dtype, requires_grad=True)
        for loss in (fastcl.NTXentLoss(), fastcl.InfoNCELoss(), fastcl.CLIPLoss().to(device)):
            loss(a, b).backward()
        queue = fastcl.NegativeQueue(64, 200, dtype=dtype, device=device)
        for _ in range(2):
            queue.enqueue(a.detach(), torch.arange(150, device=device))
        fastcl.InfoNCELoss(queue=queue)(a, b.detach()).backward()
        rows = fastcl.ops.similarity_logsumexp(a, b, 4.0, columns=True)
        (rows.rows.sum() + rows.columns.sum()).backward()
        pairs = fastcl.ops.Pairs(skip=(0,))
        fastcl.ops.similarity_logsumexp(a, None, 4.0, pairs=pairs).rows.sum().backward()


def lines(records: list[dict]) -> list[str]:
    """What each tool said of each backend."""
    return [
        f"{r['tool']}, {r['backend']}: {r.get('result', r.get('failed'))}"
        for r in records
        if "tool" in r
    ]


if __name__ == "__main__":
    smallest(*sys.argv[1:3])

"""What the numbers belong to: processor and versions, no names of hosts or folders."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import torch

import fastcl

_PACKAGES = (
    "pytorch-metric-learning", "info-nce-pytorch", "lightly", "open_clip_torch",
    "sentence-transformers", "inf-cl", "cut-cross-entropy", "triton",
)  # fmt: skip
_ISA = re.compile(r"^(avx|avx2|fma|avx512\w+|avx_vnni|amx_\w+|asimd|sve\w*|bf16)$")


def describe(threads: int) -> dict:
    """Processor, memory, versions and date, as in ``results.json``."""
    cpuinfo = _cpuinfo()
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "processor": cpuinfo.get("model name", platform.machine()),
        "family_model": f"{cpuinfo.get('cpu family', '?')}/{cpuinfo.get('model', '?')}",
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": sorted(
            flag
            for flag in cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
            if _ISA.match(flag)
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastcl": fastcl.__version__,
        "backends": {n: b.unavailable or b.detail for n, b in fastcl.backends().items()},
        "packages": installed,
        "load": os.getloadavg()[0],  # over the last minute: above 0.3 someone else was busy
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}

"""Loading a compiled module: by path, because it is no Python module but a library of operators."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch


def load(name: str, probe: Callable[[], object], package: Path | None = None) -> str:
    """Load ``fastcl/_NAME*.so`` and call ``probe``; why that fails, or an empty string.

    Never raises: a missing compiler, another torch or an older libc cost a backend, not the import.
    """
    package = package or Path(__file__).parent.parent
    libraries = sorted(package.glob(f"_{name}*.so"))
    if not libraries:
        try:
            why = json.loads((package / "_build_info.json").read_text())["not_built"][name]
        except (OSError, ValueError, KeyError):
            why = "build it with: pip install --no-build-isolation -e ."
        return f"not built: {why}"
    try:
        torch.ops.load_library(str(libraries[0]))
        probe()
    except Exception as error:
        cause = error.__cause__ or error  # torch's own names only the file
        reason = (str(cause).splitlines() or [""])[0]
        return f"does not load: {type(cause).__name__}: {reason}"
    return ""

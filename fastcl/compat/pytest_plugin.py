"""Run a library's own tests, or yours that use it, with fastcl's losses in place of its.

    pytest -p fastcl.compat.pytest_plugin --fastcl-patch lightly tests/loss

The report ends in how many names were rebound, and how often each class was called (functions are
not counted).
"""

from __future__ import annotations

from collections import Counter

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

from . import PEERS, patch, rebound, unpatch

_calls: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fastcl-patch", action="append", default=[], choices=sorted(PEERS), metavar="PEER",
        help="put fastcl's losses in place of this library's; may be given several times",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    peers = config.getoption("--fastcl-patch")
    if peers:
        try:
            patch(*peers)
        except ImportError as error:
            raise pytest.UsageError(str(error)) from error
        register_module_forward_pre_hook(_count)


def _count(module, _) -> None:
    kind = type(module)
    if kind.__module__.startswith("fastcl.compat."):
        _calls[f"{kind.__module__.rpartition('.')[2].strip('_')}.{kind.__name__}"] += 1


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.getoption("--fastcl-patch"):
        calls = ", ".join(f"{name} {number}" for name, number in sorted(_calls.items()))
        terminalreporter.write_line(
            f"fastcl in place of {rebound()} names; calls: {calls or 'none of a class'}"
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    peers = config.getoption("--fastcl-patch")
    if peers:  # without names it would undo every patch
        unpatch(*peers)

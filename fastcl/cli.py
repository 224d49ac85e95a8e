"""The command line: ``fastcl info | check | bench | train | transfer | ablate``."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from . import __version__, backends
from .compat import PEERS
from .ops.registry import OPS


def info() -> int:
    """Print versions, threads, and what each backend can do or why it cannot."""
    print(f"fastcl {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, CPU capability "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    print("\nbackends, in order of preference:")
    for backend in backends().values():
        reason = backend.unavailable
        if backend.devices == ("cuda",) and not reason and not torch.cuda.is_available():
            reason = f"torch sees no GPU ({backend.detail})"
        if reason:
            print(f"  {backend.name:<10} no   {reason}")
            continue
        print(f"  {backend.name:<10} yes  {backend.detail}")
        devices = "any device" if backend.devices is None else ", ".join(backend.devices)
        dtypes = ", ".join(str(p).removeprefix("torch.") for p in backend.precisions)
        print(f"             {devices}; {dtypes}")
        missing = [op for op in OPS if op not in backend.ops]
        if missing and not backend.partial:
            print(f"             not: {', '.join(missing)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 well, 1 failed, 2 wrong usage)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fastcl", description="Contrastive losses for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="versions, backends, and why one is missing")
    checking = commands.add_parser(
        "check", help="compare every backend with the float64 reference on this machine"
    )
    checking.add_argument(
        "--against", choices=sorted(PEERS), metavar="PEER",
        help=f"compare fastcl.compat with the installed library instead: {', '.join(PEERS)}",
    )  # fmt: skip
    commands.add_parser(
        "bench", help="time, memory and error beside what you use now, on this machine",
        add_help=False,
    )  # fmt: skip
    commands.add_parser(
        "train", help="train a method; 'fastcl train --help' says more", add_help=False
    )
    commands.add_parser(
        "transfer", help="what pretraining is worth to a classifier on few labels", add_help=False
    )
    commands.add_parser("ablate", help="train a method with one setting varied", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command in ("train", "transfer", "ablate"):
        from .trainers import command

        runs = {"train": command.main, "transfer": command.transfer, "ablate": command.ablate}
        return runs[arguments.command](rest)
    if arguments.command == "bench":
        from .benchmarks.__main__ import main as bench

        return bench(rest, prog="fastcl bench")
    if rest:
        parser.error(f"unexpected arguments: {' '.join(rest)}")
    if arguments.command == "check" and arguments.against:
        from .compat.against import main as against

        return against(arguments.against)
    if arguments.command == "check":
        from .check import main as check

        return check()
    return info()


if __name__ == "__main__":
    sys.exit(main())

"""``fastcl train``: reads the command line, answers errors in one sentence."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastcl.data.extras import require
from fastcl.trainers.options import ReportOptions, RunError, SimCLROptions, UsageError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

METHODS = {"simclr": "SimCLR on scikit-learn's handwritten digits, then a linear probe"}

_MODULES = ("lightning", "kornia", "sklearn", "jsonargparse", "rich", "matplotlib")

_KINDS = {"int": "an integer", "float": "a number", "str": "a text"}

_OVERVIEW = """usage: fastcl train METHOD [options]

Pretrain an encoder without labels and report what its features are worth.

methods:
{methods}

'fastcl train METHOD --help' lists the options of a method.
"""


def main(argv: list[str]) -> int:
    """Run ``fastcl train`` with the arguments after "train".

    Returns:
        0 when done, 1 when the run failed, 2 when an argument cannot be used.
    """
    if not argv or argv[0] in ("-h", "--help"):
        methods = "\n".join(f"  {name:<10}{text}" for name, text in METHODS.items())
        print(_OVERVIEW.format(methods=methods), end="")
        return 0 if argv else 2
    try:
        return _train(argv[0], argv[1:])
    except UsageError as error:
        return _fail(error, 2)
    except (RunError, ModuleNotFoundError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)


def _train(method: str, argv: list[str]) -> int:
    if method not in METHODS:
        raise UsageError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    require(*_MODULES, user="fastcl train")
    from jsonargparse import ArgumentError

    parser = simclr_parser()
    try:
        arguments = parser.parse_args(argv)
    except ArgumentError as error:
        raise UsageError(_one_sentence(error)) from error
    except SystemExit as exit_:  # --help and --print_config end here
        return int(exit_.code or 0)
    values = arguments.as_dict()
    options = SimCLROptions(**{name: values[name] for name in _fields(SimCLROptions)})
    report_options = ReportOptions(**{name: values[name] for name in _fields(ReportOptions)})
    # Lightning and kornia take seconds to import: --help and wrong arguments need not wait.
    options.check()
    report_options.check()
    from fastcl.trainers.run import run_simclr

    run_simclr(
        options,
        report_options,
        seeds=arguments.seeds,
        out=Path(arguments.out),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    return 0


def _fields(options: type) -> list[str]:
    return [field.name for field in dataclasses.fields(options)]


def simclr_parser() -> ArgumentParser:
    """The parser of ``fastcl train simclr``; its options are the fields of the option classes."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="fastcl train simclr",
        description=METHODS["simclr"] + ". Needs no download.",
        epilog="Three seeds: fastcl train simclr --seeds 0 1 2 --out runs/digits",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each.")
    parser.add_argument("--out", type=str, default="runs/simclr", help="folder for the results.")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the runs in --out after their last checkpoint.",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew over the runs in --out."
    )
    parser.add_class_arguments(SimCLROptions)
    parser.add_class_arguments(ReportOptions)
    return parser


def _one_sentence(error: Exception) -> str:
    """jsonargparse's message on one line, in the form of fastcl's own where it names a type."""
    message = " ".join(str(error).split())
    pattern = r"""Parser key "(\S+)": Expected an? <class '(\w+)'>\. Got value: (.*)"""
    if found := re.fullmatch(pattern, message):
        name, kind, value = found.groups()
        return f"{name}: expected {_KINDS.get(kind, kind)}, got {value!r}"
    return message


def _fail(error: object, code: int) -> int:
    print(f"fastcl train: {error}", file=sys.stderr)
    return code

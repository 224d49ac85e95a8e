"""``fastcl train``: reads the command line, answers errors in one sentence."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastcl.data.extras import require
from fastcl.trainers.methods import METHODS, Method
from fastcl.trainers.options import RunError, UsageError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_MODULES = ("lightning", "kornia", "sklearn", "jsonargparse", "rich", "matplotlib")

_KINDS = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false"}

_OVERVIEW = """usage: fastcl train METHOD [options]

Train an encoder by a contrastive method, on data that needs no download, and report what it learnt:
held-out scores of the trained module beside those of the untrained one, curves and pictures.

methods:
{methods}

'fastcl train METHOD --help' lists the options of a method; '--fast' is a short run to try it:

  fastcl train simclr --fast
  fastcl train simclr --seeds 0 1 2 --epochs 200 --out runs/long
  fastcl train simclr --print_config > run.yaml; fastcl train simclr --config run.yaml
"""


def main(argv: list[str]) -> int:
    """Run ``fastcl train`` with the arguments after "train".

    Returns:
        0 when done, 1 when the run failed, 2 when an argument cannot be used.
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, METHODS)) + 2
        methods = "\n".join(f"  {name:<{width}}{m.summary}" for name, m in METHODS.items())
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


def _train(name: str, argv: list[str]) -> int:
    if name not in METHODS:
        raise UsageError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    method = METHODS[name]
    require(*_MODULES, user="fastcl train")
    try:
        arguments = _parse(method, argv)
    except SystemExit as exit_:  # --help and --print_config end here
        return int(exit_.code or 0)
    fields = [field.name for field in dataclasses.fields(method.options)]
    options = method.options(**{name: getattr(arguments, name) for name in fields})
    # Lightning and kornia take seconds to import: --help and wrong arguments need not wait.
    options.check()
    if method.needs:
        require(*method.needs, extra=method.extra, user=f"fastcl train {method.name}")
    from fastcl.trainers.run import run

    run(
        method,
        options,
        seeds=arguments.seeds,
        out=Path(arguments.out),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
    )
    return 0


def _parse(method: Method, argv: list[str]) -> Namespace:
    from jsonargparse import ArgumentError

    parser = method_parser(method)
    try:
        arguments = parser.parse_args(argv)
        if arguments.fast:  # changes defaults, so that other arguments keep the last word
            parser.set_defaults(dict(method.fast))
            arguments = parser.parse_args(argv)
    except ArgumentError as error:
        raise UsageError(_one_sentence(error)) from error
    return arguments


def method_parser(method: Method) -> ArgumentParser:
    """The parser of a method; its options are the fields of the method's option class."""
    from jsonargparse import ArgumentParser

    fast = ", ".join(f"{name} {value}" for name, value in method.fast.items())
    parser = ArgumentParser(
        prog=f"fastcl train {method.name}",
        description=f"{method.title}: {method.summary}.",
        epilog=f"Three seeds: fastcl train {method.name} --seeds 0 1 2 --out runs/three",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each.")
    parser.add_argument(
        "--out", type=str, default=f"runs/{method.name}", help="folder for the results."
    )
    parser.add_argument(
        "--fast", action="store_true", help=f"a short run, by other defaults: {fast}."
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the runs in --out after their last checkpoint.",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew over the runs in --out."
    )
    parser.add_class_arguments(method.options)
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

"""``fastcl train | transfer | ablate``: reads the command line, answers errors in one sentence."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastcl.data.extras import require
from fastcl.trainers.methods import METHODS, Method
from fastcl.trainers.methods.studies import STUDIES
from fastcl.trainers.methods.transfer import METHODS_WITH_ENCODER, ClassifierOptions
from fastcl.trainers.options import RunError, UsageError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

MODULES = ("lightning", "kornia", "sklearn", "jsonargparse", "rich", "matplotlib")

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


_TRANSFER = """usage: fastcl transfer METHOD [options]

Pretrain an encoder by a method, then train classifiers on few labels: from scratch, on the frozen
encoder (batch norm in evaluation and in training mode) and fine-tuned, all with the same settings.
Prints a table of the last epoch; writes it as CSV, with curves, comparison and embeddings.

methods:
{methods}

  fastcl transfer simclr --fast
  fastcl transfer simclr --labels 1% 10% 100% --seeds 0 1 2 --out runs/transfer
  fastcl transfer simclr --config examples/stl10.yaml --data_root data
"""

_ABLATE = """usage: fastcl ablate STUDY [options]

Train a method with one setting varied, the others as they are, and draw what becomes of its score.

studies:
{methods}

  fastcl ablate temperature --fast --seeds 0 1 2
"""


def main(argv: list[str]) -> int:
    """Run ``fastcl train`` with the arguments after "train".

    Returns:
        0 when done, 1 when the run failed, 2 when an argument cannot be used.
    """
    summaries = {name: method.summary for name, method in METHODS.items()}
    return _answer("train", argv, _OVERVIEW, summaries, _train)


def transfer(argv: list[str]) -> int:
    """Run ``fastcl transfer`` with the arguments after "transfer"; returns as :func:`main`."""
    summaries = {name: METHODS[name].summary for name in METHODS_WITH_ENCODER}
    return _answer("transfer", argv, _TRANSFER, summaries, _transfer)


def ablate(argv: list[str]) -> int:
    """Run ``fastcl ablate`` with the arguments after "ablate"; returns as :func:`main`."""
    summaries = {name: study.summary for name, study in STUDIES.items()}
    return _answer("ablate", argv, _ABLATE, summaries, _ablate)


def _answer(
    command: str,
    argv: list[str],
    overview: str,
    summaries: Mapping[str, str],
    function: Callable[[str, list[str]], None],
) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, summaries)) + 2
        lines = "\n".join(f"  {name:<{width}}{text}" for name, text in summaries.items())
        print(overview.format(methods=lines), end="")
        return 0 if argv else 2
    try:
        if argv[0] not in summaries:
            what = "study" if command == "ablate" else "method"
            raise UsageError(f"{what}: expected one of {', '.join(summaries)}, got {argv[0]!r}")
        require(*MODULES, user=f"fastcl {command}")
        function(argv[0], argv[1:])
    except SystemExit as exit_:  # --help and --print_config end here
        return int(exit_.code or 0)
    except UsageError as error:
        return _fail(command, error, 2)
    except (RunError, ModuleNotFoundError, OSError) as error:
        return _fail(command, error, 1)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", 1)
    return 0


def _train(name: str, argv: list[str]) -> None:
    method = METHODS[name]
    arguments = _parse(method_parser(method), argv, method.fast)
    options = _options(method.options, arguments)
    # Lightning and kornia take seconds to import: --help and wrong arguments need not wait.
    options.check()
    if method.needs:
        require(*method.needs, extra=method.extra, user=f"fastcl train {method.name}")
    from fastcl.trainers.runner import run

    run(method, options, **_places(arguments))


def _transfer(name: str, argv: list[str]) -> None:
    method = METHODS[name]
    parser = method_parser(method, "transfer")
    parser.add_argument(
        "--labels",
        type=str,
        nargs="+",
        default=["1%", "10%", "100%"],
        help="how many training images have one: percentages, or numbers per class.",
    )
    parser.add_class_arguments(ClassifierOptions, "classifier")
    arguments = _parse(parser, argv, method.fast)
    options = _options(method.options, arguments)
    options.check()
    classifier = _options(ClassifierOptions, arguments.classifier)
    classifier.check()
    from fastcl.trainers.transfer import run_transfer

    run_transfer(method, options, classifier, labels=arguments.labels, **_places(arguments))


def _ablate(name: str, argv: list[str]) -> None:
    from jsonargparse import ArgumentParser

    study = STUDIES[name]
    parser = ArgumentParser(
        prog=f"fastcl ablate {name}", description=f"{study.title}.", exit_on_error=False
    )
    _add_places(parser, f"runs/ablate-{name}", "the methods' own short runs")
    allowed = study.options()
    for option, kind in allowed.items():
        parser.add_argument(f"--{option}", type=kind, help="as in fastcl train; for every run.")
    arguments = _parse(parser, argv, {})
    given = {key: getattr(arguments, key) for key in allowed}
    given = {key: value for key, value in given.items() if value is not None}
    from fastcl.trainers.ablation import run_study

    run_study(study, given, fast=arguments.fast, **_places(arguments))


def _options(kind: type, arguments: Namespace) -> Any:
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: getattr(arguments, name) for name in names})


def _places(arguments: Namespace) -> dict[str, Any]:
    return {
        "seeds": arguments.seeds,
        "out": Path(arguments.out),
        "resume": arguments.resume,
        "overwrite": arguments.overwrite,
    }


def _parse(parser: ArgumentParser, argv: list[str], fast: Mapping[str, Any]) -> Namespace:
    from jsonargparse import ArgumentError

    try:
        arguments = parser.parse_args(argv)
        if arguments.fast and fast:  # changes defaults, so that other arguments keep the last word
            parser.set_defaults(dict(fast))
            arguments = parser.parse_args(argv)
    except ArgumentError as error:
        raise UsageError(_one_sentence(error)) from error
    return arguments


def method_parser(method: Method, command: str = "train") -> ArgumentParser:
    """The parser of a method; its options are the fields of the method's option class."""
    from jsonargparse import ArgumentParser

    shorter = ", ".join(f"{name} {value}" for name, value in method.fast.items())
    place = f"runs/{method.name}" if command == "train" else f"runs/{command}-{method.name}"
    parser = ArgumentParser(
        prog=f"fastcl {command} {method.name}",
        description=f"{method.title}: {method.summary}.",
        epilog=f"Three seeds: fastcl {command} {method.name} --seeds 0 1 2 --out runs/three",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    _add_places(parser, place, shorter)
    parser.add_class_arguments(method.options)
    return parser


def _add_places(parser: ArgumentParser, out: str, fast: str) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each.")
    parser.add_argument("--out", type=str, default=out, help="folder for the results.")
    parser.add_argument(
        "--fast", action="store_true", help=f"a short run, by other defaults: {fast}."
    )
    parser.add_argument("--resume", action="store_true", help="continue what is found in --out.")
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew over the runs in --out."
    )


def _one_sentence(error: Exception) -> str:
    """jsonargparse's message on one line, in the form of fastcl's own where it names a type."""
    message = " ".join(str(error).split())
    pattern = (
        r"""Parser key "(\S+)"(?: element \d+)?: Expected an? <class '(\w+)'>\. Got value: (.*)"""
    )
    if found := re.fullmatch(pattern, message):
        name, kind, value = found.groups()
        return f"{name}: expected {_KINDS.get(kind, kind)}, got {value!r}"
    if found := re.fullmatch(r'Parser key "(\S+)": File does not exist: (.*)', message):
        return f"{found[1]}: expected a file, got {found[2]}, which does not exist"
    return message


def _fail(command: str, error: object, code: int) -> int:
    print(f"fastcl {command}: {error}", file=sys.stderr)
    return code

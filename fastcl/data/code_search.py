"""Code search without a download: the functions of Python's standard library and their docstrings.

A pair is a function's source, without its docstring, comments and name, and the first paragraph of
that docstring. Whole top-level packages go to training, validation or test by a hash of their name,
so no module is in two splits and a pair stays where it is when others come or go. Which pairs there
are depends on the Python that runs: figures must name its version.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LEAST_WORDS = 3
_TEST_SHARE, _VALIDATION_SHARE = 0.20, 0.15
_SALT = "stdlib"  # picked, before any training, for splits whose sizes come near those shares
# tests, and applications that are shipped with the library
_LEFT_OUT = {"test", "tests", "__pycache__", "idlelib", "lib2to3", "turtledemo"}


@dataclass(frozen=True)
class CodePair:
    """One documented function: its ``module`` (dotted), ``source`` and ``docstring``."""

    module: str
    source: str
    docstring: str

    @property
    def package(self) -> str:
        """First part of the module's name."""
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class CodeSearchSplits:
    """Pairs in a fixed order; no top-level package, so no module, is in two of the three."""

    train: tuple[CodePair, ...]
    validation: tuple[CodePair, ...]
    test: tuple[CodePair, ...]


@functools.cache
def load_code_search(folder: Path | None = None) -> CodeSearchSplits:
    """The documented functions below ``folder``, by default of the running Python's library.

    Of functions with the same docstring or the same source, the first in the order of files and
    lines is kept: a retrieval with two right answers would count one of them as wrong.

    Raises:
        FileNotFoundError: the folder holds no documented function (a Python without its sources).
    """
    found = standard_library_pairs() if folder is None else function_pairs(folder)
    splits: dict[str, list[CodePair]] = {"train": [], "validation": [], "test": []}
    docstrings, sources = set(), set()
    for pair in found:
        if pair.docstring.lower() in docstrings or pair.source in sources:
            continue
        docstrings.add(pair.docstring.lower())
        sources.add(pair.source)
        splits[split_of(pair.package)].append(pair)
    if not docstrings:
        where = folder or sysconfig.get_path("stdlib")
        raise FileNotFoundError(f"folder: expected Python sources with docstrings in {where}")
    return CodeSearchSplits(*(tuple(part) for part in splits.values()))


def split_of(package: str) -> str:
    """``"train"``, ``"validation"`` or ``"test"``, by a hash of the package's name."""
    digest = hashlib.sha256(f"{_SALT}{package.strip('_')}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < _TEST_SHARE:
        return "test"
    return "validation" if place < _TEST_SHARE + _VALIDATION_SHARE else "train"


def standard_library_pairs() -> Iterator[CodePair]:
    """Pairs of every module that Python itself counts as its standard library."""
    for pair in function_pairs(Path(sysconfig.get_path("stdlib"))):
        if pair.package in sys.stdlib_module_names:
            yield pair


def function_pairs(folder: Path) -> Iterator[CodePair]:
    """Pairs of the functions and methods below ``folder``, by file and line; no tests.

    A function needs a docstring of at least three words and a body that does something. Functions
    within functions are part of the outer one only. Files that this Python cannot parse are passed
    over.
    """
    for path in _files(folder):
        parts = path.relative_to(folder).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for function in _functions(tree):
            pair = _pair(module, function)
            if pair is not None:
                yield pair


def _files(folder: Path) -> list[Path]:
    def walk(place: Path) -> Iterator[Path]:
        for entry in place.iterdir():
            if entry.is_dir():
                if entry.name not in _LEFT_OUT and entry.name.isidentifier():
                    yield from walk(entry)
            elif entry.suffix == ".py":
                yield entry

    return sorted(walk(folder), key=lambda path: path.relative_to(folder).as_posix())


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif not isinstance(node, ast.Lambda):
            yield from _functions(node)


def _pair(module: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> CodePair | None:
    docstring = ast.get_docstring(function)
    if docstring is None:
        return None
    summary = " ".join(docstring.split("\n\n")[0].split())
    if len(re.findall(r"[^\W\d_]+", summary)) < _LEAST_WORDS:
        return None
    for node in ast.walk(function):  # an inner function's docstring would give that one away
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    if all(_does_nothing(statement) for statement in function.body):
        return None
    # The name goes wherever it stands alone: calls of itself, of an inherited or wrapped namesake.
    source = re.sub(rf"\b{function.name}\b", "_", ast.unparse(function))
    return CodePair(module, source, summary)


def _does_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass | ast.Raise)

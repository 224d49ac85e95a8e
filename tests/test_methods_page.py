"""docs/methods.md: its code runs, and the tests, commands and names it refers to exist."""

import importlib
import re

import pytest


@pytest.fixture
def page(root):
    return (root / "docs" / "methods.md").read_text()


def test_worked_example_is_what_the_code_computes(page):
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "docs/methods.md", "exec"), {})


def test_evidence_exists(root, page):
    named = re.findall(r"`([\w/]+)::(\w+)`", page)
    assert len(named) == page.count("::") > 60  # none is written in a way that escapes this test
    for file, test in named:
        assert f"\ndef {test}(" in (root / "tests" / f"{file}.py").read_text(), f"{file}::{test}"


def test_commands_exist(root, page):
    from fastcl.trainers.methods import METHODS
    from fastcl.trainers.methods.studies import STUDIES
    from fastcl.trainers.methods.transfer import METHODS_WITH_ENCODER

    kinds = {"train": METHODS, "ablate": STUDIES, "transfer": METHODS_WITH_ENCODER}
    commands = re.findall(r"`fastcl (\w+) ([a-z_]\w*)([^`]*)`", page)
    for kind, name, _ in commands:
        assert name in kinds[kind], f"fastcl {kind} {name}"
    assert {name for kind, name, _ in commands if kind == "train"} == set(METHODS)
    assert {name for kind, name, _ in commands if kind == "ablate"} == set(STUDIES)
    for kind, name, rest in commands:
        options = set(re.findall(r"--([a-z_]+)", rest)) - {"config", "labels", "fast", "seeds"}
        if kind == "train":
            assert options <= set(METHODS[name].options.__dataclass_fields__), (name, options)
    for path in re.findall(r"examples/\w+\.yaml", page):
        assert (root / path).exists()


def test_names_resolve(page):
    for name in re.findall(r"\]\[(fastcl\.[\w.]+)\]", page):
        home, attribute = name.rsplit(".", 1)
        if home.split(".")[-1] in ("data", "evaluation"):
            pytest.importorskip("sklearn", reason="needs the extra 'train'")
            pytest.importorskip("kornia", reason="needs the extra 'train'")
        assert hasattr(importlib.import_module(home), attribute), name

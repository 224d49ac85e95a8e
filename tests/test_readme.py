"""The README's code runs, and the names it promises exist."""

import re

import pytest

import fastcl


@pytest.fixture
def readme(root):
    return (root / "README.md").read_text()


def test_python_blocks_run(readme):
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_nothing_is_left_to_fill_in(readme):
    assert not re.search(r"^[A-Z]{4,}$|TODO|FIXME", readme, re.MULTILINE)


def test_names_exist(readme):
    losses = set(re.findall(r"`(\w+Loss)\b", readme))
    assert losses == {name for name in fastcl.__all__ if name.endswith("Loss")}
    table = readme[readme.index("## Losses") : readme.index("## Why")]
    functions = set(re.findall(r"`([a-z]+(?:_[a-z]+)*)`", table.split("All take")[0]))
    assert set(fastcl.functional.__all__) <= functions
    assert set(fastcl.backends()) <= set(re.findall(r"\| `(\w+)` \|", readme))


def test_make_targets_exist(root, readme):
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", readme, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)

"""The README's code runs, the names it promises exist, and its figures were measured."""

import json
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


@pytest.fixture
def measured(root):
    """Case -> its committed record."""
    file = root / "benchmarks/results/epyc-zen4-2cores/results.json"
    return {case["case"]: case for case in json.loads(file.read_text())["cases"]}


def rounds_to(value, shown):
    """Whether ``shown`` is ``value`` in as many digits as it has."""
    return abs(value - float(shown)) <= 0.5 * 10.0 ** -len(shown.partition(".")[2]) + 1e-9


def figures(readme):
    """Case, contestant's name or a part of it, ms and MB of every cell of the README's table."""
    header, _, *rows = re.search(r"^(\| \| fastcl \|.*\n)((?:\|.*\n)+)", readme, re.M)[
        0
    ].splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    names = {"fastcl": "fastcl cpu", "plain PyTorch": "eager"}
    for row in rows:
        label, *cells = (cell.strip(" *") for cell in row.strip("|").split("|"))
        task, size, *dtype = label.split(", ")
        sizes = "x".join(re.findall(r"\d+", size))
        kind = {"NT-Xent": "ntxent"}.get(task, task.lower())
        case = f"{kind}-{sizes}-{dtype[0] if dtype else 'fp32'}"
        for column, cell in zip(columns[1:], cells, strict=True):
            name, ms, mb = re.fullmatch(r"(.*?) ?([\d.]+) ms, ([\d.]+) MB", cell).groups()
            yield case, name or names.get(column, column), ms, mb


def test_figures_of_the_table_are_the_committed_ones(readme, measured):
    cells = list(figures(readme))
    assert len(cells) >= 20
    for case, name, ms, mb in cells:
        (record,) = (
            r for n, r in measured[case]["contestants"].items()
            if name in n and "median_ms" in r
        )  # fmt: skip
        assert rounds_to(record["median_ms"], ms), (case, name, ms, record["median_ms"])
        assert rounds_to(record["memory_mb"], mb), (case, name, mb, record["memory_mb"])


def test_figures_in_prose_are_the_committed_ones(root, readme, measured):
    from fastcl.benchmarks.report import of_ceiling, ratio

    low, high = map(int, re.search(r"run\s+at (\d+) to (\d+) %", readme).groups())
    large = [measured[f"ntxent-8192x{d}-fp32"] for d in (128, 512)]
    shares = [round(100 * of_ceiling(case, "fastcl cpu")) for case in large]
    assert (min(shares), max(shares)) == (low, high)

    tuned, ours = re.search(r"(\d+) ms at 8192 x 128, where\s+fastcl's (\d+) stay", readme).groups()
    records = large[0]["contestants"]
    assert rounds_to(records["eager"]["tuned"]["median_ms"], tuned)
    assert rounds_to(records["fastcl cpu"]["tuned"]["median_ms"], ours)

    guide = (root / "docs/benchmarks.md").read_text()
    said = re.findall(r"\b\d\.\d\d\b", guide[guide.index("## Where") :])
    factors = [
        ratio(case["contestants"], name, tuned)
        for case in measured.values() for name in case["contestants"] for tuned in (False, True)
    ]  # fmt: skip
    assert len(said) >= 5
    for factor in said:
        assert any(f is not None and rounds_to(f, factor) for f in factors), factor


def test_links_lead_somewhere(root, readme):
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (root / target).exists(), target

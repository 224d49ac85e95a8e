"""The command line through real processes."""

import subprocess
import sys

import pytest
import torch

import fastcl


def run(*arguments, code="from fastcl.cli import main; import sys; sys.exit(main())", **options):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300,
        **options,
    )  # fmt: skip


def test_info(tmp_path):
    result = run(
        "info", code="import runpy; runpy.run_module('fastcl', run_name='__main__')", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert f"fastcl {fastcl.__version__}, torch {torch.__version__}" in result.stdout
    for name, backend in fastcl.backends().items():
        assert name in result.stdout
        assert (backend.unavailable or backend.detail) in result.stdout


def test_check(tmp_path):
    result = run("check", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every backend agrees with the reference" in result.stdout


def test_check_finds_a_planted_bug(monkeypatch, capsys):
    from fastcl import check
    from fastcl.ops import chunked

    right = chunked.similarity_topk

    def wrong(*args):
        indices, values = right(*args)
        return indices, values * 1.001

    monkeypatch.setattr(chunked, "similarity_topk", wrong)
    assert check.main() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "BREACH" in line]
    assert lines
    assert all(line.startswith("chunked    topk") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "required: COMMAND"), (["dance"], "invalid choice: 'dance'"),
     (["info", "--loud"], "unexpected arguments: --loud")],
)  # fmt: skip
def test_wrong_usage(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_extra_is_one_sentence():
    code = (
        "import sys; sys.modules['lightning'] = None\n"
        "from fastcl.cli import main; sys.exit(main(['train', 'simclr']))"
    )
    result = run(code=code)
    assert result.returncode in (1, 2)
    assert "pip install 'fastcl[train]'" in result.stderr
    assert "lightning" in result.stderr
    assert "Traceback" not in result.stderr

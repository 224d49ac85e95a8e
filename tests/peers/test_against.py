"""Every library agrees, or is itself off: ``fastcl check --against`` on all of them."""

import os
from pathlib import Path

import pytest

from fastcl.cli import main


@pytest.mark.parametrize(
    "peer",
    ["info_nce", "lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers"],
)
def test_check(peer, capsys):
    assert main(["check", "--against", peer]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(("peer", "name"), [("solo", "solo-learn"), ("supcontrast", "SupContrast")])
def test_check_a_checkout(peer, name, capsys, monkeypatch):
    """Those that no registry has, or only with all of their training code."""
    checkout = Path(os.environ["FASTCL_PEERS"], name)
    if not checkout.is_dir():
        pytest.skip(f"no checkout {checkout}")
    monkeypatch.syspath_prepend(checkout)
    assert main(["check", "--against", peer]) == 0, capsys.readouterr().out

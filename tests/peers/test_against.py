"""Every library agrees, or is itself off: ``fastcl check --against`` on all of them."""

import pytest

from fastcl.cli import main


@pytest.mark.parametrize(
    "peer",
    ["info_nce", "lightly", "open_clip", "pytorch_metric_learning", "sentence_transformers"],
)
def test_check(peer, capsys):
    assert main(["check", "--against", peer]) == 0, capsys.readouterr().out

"""Rebinding, on modules that stand in for a library."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import fastcl
from fastcl import cli
from fastcl.compat import info_nce, open_clip


class ClipLoss:
    """The library's."""


class SigLipLoss:
    """The library's."""


@pytest.fixture
def library(monkeypatch):
    """A package with re-exports, and a module of the user's that has imported from it."""
    home, package, user = (ModuleType(n) for n in ("open_clip.loss", "open_clip", "training"))
    home.ClipLoss, home.SigLipLoss = ClipLoss, SigLipLoss
    package.ClipLoss, package.loss, package.__path__ = ClipLoss, home, []
    user.Contrastive = ClipLoss
    for module in (home, package, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield home, package, user
    fastcl.unpatch()


def test_everyone_who_holds_a_class_gets_ours(library):
    home, package, user = library
    fastcl.patch("open_clip")
    assert home.ClipLoss is package.ClipLoss is user.Contrastive is open_clip.ClipLoss
    assert home.SigLipLoss is open_clip.SigLipLoss
    package.late = home.ClipLoss  # a module of the library that was imported meanwhile
    fastcl.patch("open_clip")  # again
    fastcl.unpatch("open_clip")
    assert home.ClipLoss is package.ClipLoss is user.Contrastive is package.late is ClipLoss
    assert home.SigLipLoss is SigLipLoss
    assert fastcl.compat.open_clip.ClipLoss is open_clip.ClipLoss
    fastcl.unpatch("open_clip")


def test_context(library):
    home, package, _ = library
    with fastcl.patch("open_clip"):
        assert home.ClipLoss is open_clip.ClipLoss
        with fastcl.patch("open_clip"):
            pass  # not this one's to undo
        assert package.ClipLoss is open_clip.ClipLoss
    assert home.ClipLoss is ClipLoss
    again = fastcl.patch("open_clip")
    for _ in range(2):
        with again:
            assert home.ClipLoss is open_clip.ClipLoss
        assert home.ClipLoss is ClipLoss


def test_what_a_user_changed_meanwhile_stays(library):
    _, package, _ = library
    fastcl.patch("open_clip")
    package.ClipLoss = None
    fastcl.unpatch()
    assert package.ClipLoss is None


def test_a_library_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "info_nce", None)
    with pytest.raises(ImportError, match="info_nce cannot be patched, because info_nce with"):
        fastcl.patch("info_nce")


# ------------------------------------------------------------------- fastcl check --against


class Dense(torch.nn.Module):
    """The library's InfoNCE, correct or not."""

    factor = 1.0

    def __init__(self, temperature=0.1, reduction="mean", negative_mode="unpaired"):
        super().__init__()
        self.temperature = temperature

    def forward(self, query, positive_key, negative_keys=None):
        query, positive_key = F.normalize(query, dim=-1), F.normalize(positive_key, dim=-1)
        if negative_keys is None:
            scores, target = query @ positive_key.T, torch.arange(len(query))
        else:
            keys = F.normalize(negative_keys, dim=-1)
            others = torch.einsum("nd,nmd->nm" if keys.dim() == 3 else "nd,md->nm", query, keys)
            scores = torch.cat([(query * positive_key).sum(1, keepdim=True), others], 1)
            target = torch.zeros(len(query), dtype=torch.int64)
        return self.factor * F.cross_entropy(scores / self.temperature, target)


@pytest.fixture
def compared(monkeypatch):
    module = ModuleType("info_nce")
    module.InfoNCE, module.info_nce = Dense, None
    monkeypatch.setitem(sys.modules, "info_nce", module)


def test_agreement(compared, capsys):
    assert cli.main(["check", "--against", "info_nce"]) == 0
    assert "DISAGREES" not in capsys.readouterr().out


def test_a_library_that_is_off_is_told(compared, capsys, monkeypatch):
    monkeypatch.setattr(Dense, "factor", 1.1)
    assert cli.main(["check", "--against", "info_nce"]) == 0
    printed = capsys.readouterr().out
    assert "the library is off" in printed
    assert "0 disagreements" in printed


@pytest.mark.parametrize("wrong", ["value", "gradient", "error"])
def test_disagreement(compared, capsys, monkeypatch, wrong):
    ours = info_nce.InfoNCE.forward

    def forward(self, *inputs):
        if wrong == "error":
            raise RuntimeError("planted")
        loss = ours(self, *inputs)
        return loss + 1e-3 if wrong == "value" else loss.detach() + 1.001 * (loss - loss.detach())

    monkeypatch.setattr(info_nce.InfoNCE, "forward", forward)
    assert cli.main(["check", "--against", "info_nce"]) == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_nothing_to_compare_with(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)
    assert cli.main(["check", "--against", "lightly"]) == 1
    assert "lightly cannot be imported here" in capsys.readouterr().out


LIBRARY = "class InfoNCE:\n    pass\n\ndef info_nce():\n    pass\n"


@pytest.mark.parametrize(
    ("library", "options", "expected"),
    [
        ("", [], "1 passed"),
        (LIBRARY, ["--fastcl-patch", "info_nce"], "fastcl in place of 2 names"),
        ("raise ImportError", ["--fastcl-patch", "info_nce"], "ERROR: info_nce cannot be patched"),
    ],
    ids=["no library", "a library", "a broken one"],
)
def test_the_plugin(library, options, expected, tmp_path):
    """A process of its own, in which the folder's ``info_nce`` hides an installed one."""
    (tmp_path / "info_nce.py").write_text(library)
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert True\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "fastcl.compat.pytest_plugin", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (library != "raise ImportError")

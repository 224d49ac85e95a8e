"""Drop-in replacements for the losses of other libraries, one module per library.

    from fastcl.compat.open_clip import ClipLoss     # was: from open_clip.loss import ClipLoss

or, without touching the code that uses them,

    fastcl.patch("open_clip")                        # until fastcl.unpatch("open_clip")
    with fastcl.patch("lightly"): ...

The modules say what differs from the library and why; ``fastcl check --against lightly`` compares
with the installed one on this machine.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

# for each library, where it defines what is replaced; ours have the same names
PEERS: dict[str, dict[str, tuple[str, ...]]] = {
    "info_nce": {"info_nce": ("InfoNCE", "info_nce")},
    "lightly": {
        "lightly.loss.ntx_ent_loss": ("NTXentLoss",),
        "lightly.loss.dcl_loss": ("DCLLoss", "DCLWLoss"),
        "lightly.models.modules.memory_bank": ("MemoryBankModule",),
    },
    "open_clip": {"open_clip.loss": ("ClipLoss", "SigLipLoss")},
    "pytorch_metric_learning": {
        "pytorch_metric_learning.losses.contrastive_loss": ("ContrastiveLoss",),
        "pytorch_metric_learning.losses.cross_batch_memory": ("CrossBatchMemory",),
        "pytorch_metric_learning.losses.ntxent_loss": ("NTXentLoss",),
        "pytorch_metric_learning.losses.self_supervised_loss": ("SelfSupervisedLoss",),
        "pytorch_metric_learning.losses.supcon_loss": ("SupConLoss",),
        "pytorch_metric_learning.losses.triplet_margin_loss": ("TripletMarginLoss",),
    },
    "sentence_transformers": {
        f"sentence_transformers.sentence_transformer.losses.{name}": (loss,)
        for name, loss in (
            ("multiple_negatives_ranking", "MultipleNegativesRankingLoss"),
            ("cached_multiple_negatives_ranking", "CachedMultipleNegativesRankingLoss"),
        )
    },
    "solo": {
        f"solo.losses.{name}": (f"{name}_loss_func",)
        for name in ("simclr", "mocov2plus", "mocov3", "nnclr")
    },
    "supcontrast": {"losses": ("SupConLoss",)},  # a script's folder, not a package
}

_Change = tuple[ModuleType, str, Any, Any]  # module, name, theirs, ours
_changes: dict[str, list[_Change]] = {}


class Patch:
    """What :func:`patch` did; as a context manager it undoes that at the end."""

    def __init__(self, peers: list[str]):
        self.peers = peers

    def __enter__(self) -> Patch:
        if self.peers:  # once more where it was undone before
            patch(*self.peers)
        return self

    def __exit__(self, *_: object) -> None:
        if self.peers:  # without names it would undo every patch
            unpatch(*self.peers)


def patch(*peers: str) -> Patch:
    """Put fastcl's losses in the place of other libraries', in every module that holds them.

    Modules that import the library later find fastcl's too. Instances made before stay as they
    are, and so do classes derived before (open_clip's ``CoCaLoss``). A library that is patched
    already is left to whoever did it.

    Args:
        peers: of ``info_nce``, ``lightly``, ``open_clip``, ``pytorch_metric_learning``,
            ``sentence_transformers``, ``solo`` and ``supcontrast`` (whose ``losses`` must be
            importable).

    Returns:
        A context manager that undoes it.

    Raises:
        ValueError: an unknown library, or none at all. ImportError: one that is not installed.
    """
    if not peers:
        raise ValueError(f"peers is (); expected some of {tuple(PEERS)}")
    found = {peer: _replacements(peer) for peer in _known(peers) if peer not in _changes}
    for peer, pairs in found.items():
        _changes[peer] = [
            (module, name, theirs, ours)
            for theirs, ours in pairs
            for module, name in _holders(theirs, "")
        ]
        for module, name, _, ours in _changes[peer]:
            setattr(module, name, ours)
    return Patch(list(found))


def unpatch(*peers: str) -> None:
    """Undo :func:`patch`, of every library where none is named.

    A module outside the library that imported it in between keeps fastcl's losses.

    Raises:
        ValueError: an unknown library.
    """
    for peer in _known(peers) if peers else list(_changes):
        changes = _changes.pop(peer, [])
        for module, name, theirs, ours in changes:
            if vars(module).get(name) is ours:
                setattr(module, name, theirs)
        package = next(iter(PEERS[peer])).split(".")[0]
        for theirs, ours in {(theirs, ours) for _, _, theirs, ours in changes}:
            for module, name in _holders(ours, package):
                setattr(module, name, theirs)


def rebound() -> int:
    """How many names of modules :func:`patch` has rebound."""
    return sum(len(changes) for changes in _changes.values())


def _known(peers: tuple[str, ...]) -> tuple[str, ...]:
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"peer is {peer!r}; expected one of {tuple(PEERS)}")
    return peers


def _replacements(peer: str) -> list[tuple[Any, Any]]:
    """The library's objects and ours, pair by pair."""
    ours = importlib.import_module(f"{__name__}.{peer}")
    pairs = []
    for module, names in PEERS[peer].items():
        try:
            home = importlib.import_module(module)
            pairs += [(getattr(home, name), getattr(ours, name)) for name in names]
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"{peer} cannot be patched, because {module} with {', '.join(names)} cannot be "
                f"imported here: {error}"
            ) from error
    return pairs


def _holders(value: Any, package: str) -> Iterator[tuple[ModuleType, str]]:
    """Where modules hold ``value``, those of fastcl apart; of one package where it is named."""
    for name, module in list(sys.modules.items()):
        top = name.split(".")[0]
        if top == "fastcl" or (package and top != package) or not isinstance(module, ModuleType):
            continue
        for attribute, held in list(vars(module).items()):
            if held is value:
                yield module, attribute

"""``fastcl check --against PEER``: does the installed library say the same?

Every case runs three times: fastcl's class, the library's, and the definition densely in float64
(:mod:`~fastcl.compat.truth`), on random and on hostile inputs. Errors of value and gradient are
relative to the definition. fastcl must be within twice the library's error plus round-off; where
the library itself is not finite, or far off, the table says so.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import PEERS, truth

_FAR = 1e-2  # beyond this the library is off, not rounded


@dataclass
class Contest:
    """One class with its options: how to run it, and what it should return.

    ``run(cls, tensors)`` builds and calls the class, ours or the library's.
    """

    name: str
    cls: str
    run: Any  # (class, tensors) -> loss
    exact: Any  # tensors in float64 -> loss
    inputs: int = 2  # feature matrices that it takes
    unit: bool = False  # wants rows of unit length
    temperature: float = 0.1


def _inputs(kind: str, count: int, unit: bool) -> list[Tensor]:
    """Feature matrices [N, D] of one kind, the rows of each near those of the first."""
    generator = torch.Generator().manual_seed(0)
    n, d = {"one pair": (1, 16), "ragged": (37, 19)}.get(kind, (48, 32))
    if kind == "two pairs":
        n = 2
    first = torch.randn(n, d, generator=generator)
    found = [first + 0.7 * torch.randn(n, d, generator=generator) for _ in range(count)]
    if kind == "aligned":
        found = [first + 0.02 * torch.randn(n, d, generator=generator) for _ in range(count)]
    if kind == "duplicates":
        found = [torch.cat([x[: n // 2]] * 2) for x in found]
    if unit:
        found = [F.normalize(x) for x in found]
    elif kind == "huge rows":
        found = [1e15 * x for x in found]
    elif kind == "tiny rows":
        found = [1e-10 * x for x in found]
    if kind == "strided":
        found = [torch.stack([x, x], 2)[:, :, 0] for x in found]
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    return [x.to(dtypes.get(kind, torch.float32)) for x in found]


KINDS = (
    "random", "float64", "bfloat16", "float16", "ragged", "strided", "two pairs", "one pair",
    "aligned", "duplicates", "huge rows", "tiny rows",
)  # fmt: skip


def _measure(run, tensors: list[Tensor], dtype=None):
    """Value and gradients in float64, or the reason why there is none."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    try:
        value = run(leaves)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
    except Exception as error:  # whatever a library raises is a cell of the table
        return f"{type(error).__name__}: {error}".splitlines()[0]
    whole = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return value.detach().double(), torch.cat([g.double().flatten() for g in whole])


def _errors(found, exact) -> tuple[float, float]:
    """Relative errors of value and gradient; infinite where there is no finite one."""
    if isinstance(found, str):
        return float("inf"), float("inf")
    results = []
    for a, b in zip(found, exact, strict=True):
        error = float((a - b).norm()) / max(float(b.norm()), 1e-3 / max(1, b.numel()) ** 0.5)
        results.append(error if error == error else float("inf"))
    return results[0], results[1]


def main(peer: str) -> int:
    """Print a table; 0 where fastcl agrees, 1 where it does not or the library is missing."""
    try:
        theirs = {
            name: getattr(importlib.import_module(module), name)
            for module, names in PEERS[peer].items()
            for name in names
        }
        ours = importlib.import_module(f"fastcl.compat.{peer}")
        version = _version(peer)
    except (ImportError, AttributeError) as error:
        print(f"{peer} cannot be imported here, so there is nothing to compare with: {error}")
        return 1
    print(f"fastcl beside {peer} {version}; errors relative to float64, value and gradient\n")
    print(f"{'loss':<40}{'inputs':<12}{'fastcl':>18}{peer[:18]:>20}")
    disagreements = differs = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for contest in _contests(peer):
            for kind in KINDS:
                tensors = _inputs(kind, contest.inputs, contest.unit)
                exact = _measure(contest.exact, tensors, torch.float64)
                mine = _measure(lambda x, c=contest: c.run(getattr(ours, c.cls), x), tensors)
                other = _measure(lambda x, c=contest: c.run(theirs[c.cls], x), tensors)
                a, b = _errors(mine, exact), _errors(other, exact)
                round_off = _round_off(tensors[0].dtype, contest.temperature)
                wrong = any(x > 2 * min(y, _FAR) + round_off for x, y in zip(a, b, strict=True))
                off = max(b) > max(_FAR, round_off)
                disagreements += wrong
                differs += off and not wrong
                note = "   DISAGREES" if wrong else "   the library is off" if off else ""
                cells = "".join(f"{x:10.1e}{y:9.1e}" for x, y in (a, b))
                print(f"{contest.name:<40}{kind:<11}{cells}{note}")
                if wrong and isinstance(mine, str):
                    print(f"    fastcl: {mine}")
                if off and isinstance(other, str):
                    print(f"    {peer}: {other}")
    print(
        f"\n{disagreements} disagreements; {differs} cases in which the library itself is off"
        if disagreements or differs
        else "\nno disagreement"
    )
    return 1 if disagreements else 0


def _version(peer: str) -> str:
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    try:
        return version(packages_distributions()[peer][0])
    except (KeyError, PackageNotFoundError):
        return "(a version that it does not tell)"


def _round_off(dtype: torch.dtype, temperature: float) -> float:
    """What rounded operands leave of a score, which is 1 / temperature."""
    half = 0.2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    return (50 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps + half) * (
        1 + 1 / temperature
    )


def _contests(peer: str) -> Iterator[Contest]:
    return globals()[f"_{peer}"]()


def _lightly() -> Iterator[Contest]:
    for t in (0.5, 0.1, 0.01):
        yield Contest(
            f"NTXentLoss(temperature={t})", "NTXentLoss", lambda c, x, t=t: c(t)(*x),
            lambda x, t=t: truth.nt_xent(x[0], x[1], t), temperature=t,
        )  # fmt: skip
        yield Contest(
            f"DCLLoss(temperature={t})", "DCLLoss", lambda c, x, t=t: c(t)(*x),
            lambda x, t=t: truth.dcl(x[0], x[1], t), temperature=t,
        )  # fmt: skip
    yield Contest(
        "DCLWLoss()", "DCLWLoss", lambda c, x: c()(*x), lambda x: truth.dcl(x[0], x[1], 0.1, 0.5)
    )

    def banked(c, x):
        loss = c(0.2, memory_bank_size=(64, x[0].shape[1]))
        loss.memory_bank.bank = _bank(x).to(loss.memory_bank.bank)
        return loss.to(x[0].dtype)(*x)

    yield Contest(
        "NTXentLoss(memory_bank_size=(64, D))", "NTXentLoss", banked,
        lambda x: truth.moco(x[0], x[1], _bank(x), 0.2), temperature=0.2,
    )  # fmt: skip


def _bank(x: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(64, x[0].shape[1], generator=generator)).bfloat16().double()


def _info_nce() -> Iterator[Contest]:
    for t in (0.1, 0.01):
        yield Contest(
            f"InfoNCE({t})", "InfoNCE", lambda c, x, t=t: c(t)(*x),
            lambda x, t=t: truth.info_nce(x[0], x[1], None, t), temperature=t,
        )  # fmt: skip
    yield Contest(
        "InfoNCE(), unpaired", "InfoNCE", lambda c, x: c()(*x),
        lambda x: truth.info_nce(*x), inputs=3,
    )  # fmt: skip
    yield Contest(
        "InfoNCE(), paired", "InfoNCE",
        lambda c, x: c(negative_mode="paired")(x[0], x[1], torch.stack(x[2:], 1)),
        lambda x: truth.info_nce(x[0], x[1], torch.stack(x[2:], 1)), inputs=6,
    )  # fmt: skip


def _open_clip() -> Iterator[Contest]:
    for scale in (14.3, 100.0):
        yield Contest(
            f"ClipLoss(), logit_scale={scale}", "ClipLoss", lambda c, x, s=scale: c()(*x, s),
            lambda x, s=scale: truth.clip(x[0], x[1], s), unit=True, temperature=1 / scale,
        )  # fmt: skip
        yield Contest(
            f"SigLipLoss(), logit_scale={scale}", "SigLipLoss",
            lambda c, x, s=scale: c()(*x, s, -10.0),
            lambda x, s=scale: truth.siglip(x[0], x[1], s, -10.0), unit=True, temperature=1 / scale,
        )  # fmt: skip
    yield Contest(
        "SigLipLoss()._loss, negative_only", "SigLipLoss",
        lambda c, x: c()._loss(*x, 10.0, -10.0, negative_only=True),
        lambda x: truth.siglip(x[0], x[1], 10.0, -10.0, True), unit=True,
    )  # fmt: skip


def _labels(x: Tensor) -> Tensor:
    return torch.arange(len(x)) // 2 % 7


def _pytorch_metric_learning() -> Iterator[Contest]:
    for name in ("NTXentLoss", "SupConLoss", "ContrastiveLoss", "TripletMarginLoss"):
        options: list[dict[str, Any]] = [{}]
        if name in ("NTXentLoss", "SupConLoss"):
            options = [{"temperature": 0.1}, {"temperature": 0.01}]
        for o in options:
            t = o.get("temperature", 1.0)
            label = f"{name}({', '.join(f'{k}={v}' for k, v in o.items())})"
            yield Contest(
                label, name, lambda c, x, o=o: c(**o)(x[0], _labels(x[0])),
                lambda x, n=name, o=o: truth.by_label(n, x[0], _labels(x[0]), **o),
                inputs=1, temperature=t,
            )  # fmt: skip
            yield Contest(
                f"{label}, ref_emb", name,
                lambda c, x, o=o: c(**o)(
                    x[0], _labels(x[0]), ref_emb=x[1], ref_labels=_labels(x[1])
                ),
                lambda x, n=name, o=o: truth.by_label(
                    n, x[0], _labels(x[0]), x[1], _labels(x[1]), **o
                ),
                temperature=t,
            )  # fmt: skip


def _sentence_transformers() -> Iterator[Contest]:
    symmetric = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    every = {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("", {}, 2), ("hard negatives", {}, 4), ("symmetric", symmetric, 2), ("GTE", every, 3),
        ("scale=100", {"scale": 100.0}, 2),
        ("hardness", {"hardness_mode": "all_negatives", "hardness_strength": 5.0}, 3),
    ]  # fmt: skip
    for what, options, inputs in cases:
        yield Contest(
            f"MultipleNegativesRanking {what}", "MultipleNegativesRankingLoss",
            lambda c, x, o=options: c(nn.Identity(), **o).compute_loss_from_embeddings(x, None),
            lambda x, o=options: truth.ranking(*x, **o), inputs=inputs,
            temperature=1 / options.get("scale", 20.0),
        )  # fmt: skip


def _supcontrast() -> Iterator[Contest]:
    for t in (0.1, 0.07):
        for mode in ("all", "one"):
            yield Contest(
                f"SupConLoss({t}, {mode!r})", "SupConLoss",
                lambda c, x, t=t, m=mode: c(t, m)(torch.stack(x, 1), _labels(x[0])),
                lambda x, t=t, m=mode: truth.sup_con_views(
                    torch.stack(x, 1), _labels(x[0]), temperature=t, contrast_mode=m
                ),
                unit=True, temperature=t,
            )  # fmt: skip


def _solo() -> Iterator[Contest]:
    def labels(x: list[Tensor]) -> Tensor:
        return torch.arange(len(x[0])).repeat(2)

    yield Contest(
        "simclr_loss_func", "simclr_loss_func", lambda c, x: c(torch.cat(x), labels(x), 0.1),
        lambda x: truth.sup_con_inside(torch.cat(x), labels(x), 0.1),
    )  # fmt: skip
    yield Contest(
        "mocov3_loss_func", "mocov3_loss_func", lambda c, x: c(x[0], x[1], 0.2),
        lambda x: 0.4 * truth.info_nce(x[0], x[1], None, 0.2), temperature=0.2,
    )  # fmt: skip
    yield Contest(
        "nnclr_loss_func", "nnclr_loss_func", lambda c, x: c(x[0], x[1]),
        lambda x: truth.info_nce(x[0], x[1]),
    )  # fmt: skip
    yield Contest(
        "mocov2plus_loss_func", "mocov2plus_loss_func",
        lambda c, x: c(x[0], x[1], _bank(x).to(x[0].dtype).T, 0.2),
        lambda x: truth.moco(x[0], x[1], _bank(x), 0.2, normalize=False), unit=True,
        temperature=0.2,
    )  # fmt: skip

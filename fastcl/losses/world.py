"""Energies of transitions and of relations: C-SWM and TransE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import check_features, check_same_shape
from ..ops.pairs import describe
from .common import finish
from .distances import row_distance
from .inputs import check_choice, check_number, check_positive, check_range, check_vector, unit_rows
from .modules import FixedLoss

FORMS = ("paper", "repository")
DISSIMILARITIES = ("l1", "euclidean", "squared")


def cswm(
    state: Tensor,
    transition: Tensor,
    next_state: Tensor,
    permutation: Tensor | None = None,
    *,
    form: str = "paper",
    margin: float = 1.0,
    sigma: float = 0.5,
    weight: Tensor | None = None,
    reduction: str = "mean",
    return_metrics: bool = False,
):
    """Contrastive loss of structured world models (C-SWM, Kipf et al. 2020).

    With the energy d(x, y) = |x - y|^2 / (2 sigma^2), the mean over objects, and z~ another state
    of the batch: d(z + T(z, a), z') + [margin - d(z~, z')]_+ (``"paper"``), or with d(z, z~) in the
    hinge (``"repository"``, what the authors' code computes).

    Args:
        state, transition, next_state: [B, K, D]: z, the predicted change T(z, a) and z', of K
            objects each; any float dtype.
        permutation: [B] integers, z~ being ``state[permutation]``; by default a random one without
            fixed points (where it has one, a state is pushed from its own successor).
        form: see above.
        margin: a number.
        sigma: positive.
        weight: [B] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        reduction: ``"mean"`` over B, ``"sum"``, or ``"none"`` for [B] losses.
        return_metrics: also return a dict with ``positive_energy`` and ``negative_energy``, 0-dim
            means.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics). A batch of one has no negative.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    _check_cswm(form, margin, sigma)
    inputs = {"state": state, "transition": transition, "next_state": next_state}
    rows = {}
    for name, x in inputs.items():
        check_features(x, name, "[B, K, D]")
        if x.shape != state.shape or x.device != state.device:
            raise ValueError(
                f"{name} {describe(x)}; expected shape {tuple(state.shape)} on {state.device}, "
                "like state"
            )
        rows[name] = unit_rows(x.flatten(1), name, normalize=False).view(x.shape)
    z, following = rows["state"], rows["next_state"]
    b = z.shape[0]
    if permutation is None:
        permutation = _without_fixed_points(b, z.device)
        alone = b == 1
    else:
        permutation = check_vector(permutation, "permutation", b, z)
        check_range(permutation, "permutation", b, "samples of the batch")
        alone = False

    def energy(x: Tensor, y: Tensor) -> Tensor:
        return row_distance(x, y, "squared").mean(1) / (2.0 * sigma * sigma)

    other = z[permutation.to(torch.int64)]
    attract = energy(z + rows["transition"], following)
    repel = energy(other, following) if form == "paper" else energy(z, other)
    losses = attract if alone else attract + F.relu(margin - repel)
    metrics = None
    if return_metrics:
        metrics = {
            "positive_energy": attract.detach().mean(),
            "negative_energy": repel.detach().mean(),
        }
    return finish(losses, reduction, weight, metrics)


def _without_fixed_points(n: int, device: torch.device) -> Tensor:
    """A random cycle through all of ``range(n)``."""
    order = torch.randperm(n, device=device)
    return torch.empty_like(order).index_copy_(0, order, order.roll(1))


def _check_cswm(form, margin, sigma) -> None:
    check_choice(form, "form", FORMS)
    check_number(margin, "margin")
    check_positive(sigma, "sigma")


class CSWMLoss(FixedLoss):
    """:func:`~fastcl.functional.cswm` as a module."""

    def __init__(
        self,
        *,
        form: str = "paper",
        margin: float = 1.0,
        sigma: float = 0.5,
        reduction: str = "mean",
        return_metrics: bool = False,
    ):
        _check_cswm(form, margin, sigma)
        super().__init__(
            form=form, margin=margin, sigma=sigma, reduction=reduction,
            return_metrics=return_metrics,
        )  # fmt: skip

    def forward(self, state, transition, next_state, permutation=None, *, weight=None):
        return cswm(state, transition, next_state, permutation, weight=weight, **self.options())


def transe(
    head: Tensor,
    relation: Tensor,
    tail: Tensor,
    negative_head: Tensor,
    negative_tail: Tensor,
    margin: float = 1.0,
    *,
    negative_relation: Tensor | None = None,
    distance: str = "euclidean",
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """TransE (Bordes et al. 2013, eq. 1): [margin + d(h + r, t) - d(h' + r, t')]_+.

    Args:
        head, relation, tail: [N, D], true triplets row by row; any float dtype.
        negative_head, negative_tail: [N, D], of the corrupted triplets, one of the two usually
            equal to the true one.
        margin: a number.
        negative_relation: [N, D], what is added to ``negative_head``; ``None`` for ``relation``,
            zeros for an energy d(h', t') without one, as C-SWM's.
        distance: ``"l1"``, ``"euclidean"`` or ``"squared"``.
        weight: [N] floats; each triplet's share, the mean becoming sum(w l) / sum(w).
        reduction: ``"mean"`` over N, ``"sum"`` (the paper's), or ``"none"`` for [N] losses.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    check_number(margin, "margin")
    check_choice(distance, "distance", DISSIMILARITIES)
    shift = relation if negative_relation is None else negative_relation
    inputs = {
        "head": head, "relation": relation, "tail": tail, "negative_head": negative_head,
        "negative_relation": shift, "negative_tail": negative_tail,
    }  # fmt: skip
    for name, x in inputs.items():
        check_same_shape(head, x, "head", name)
    rows = {name: unit_rows(x, name, normalize=False) for name, x in inputs.items()}
    true = _dissimilarity(rows["head"] + rows["relation"], rows["tail"], distance)
    false = _dissimilarity(
        rows["negative_head"] + rows["negative_relation"], rows["negative_tail"], distance
    )
    return finish(F.relu(margin + true - false), reduction, weight, None)


def _dissimilarity(a: Tensor, b: Tensor, distance: str) -> Tensor:
    return (a - b).abs().sum(1) if distance == "l1" else row_distance(a, b, distance)


class TransELoss(FixedLoss):
    """:func:`~fastcl.functional.transe` as a module."""

    def __init__(
        self, margin: float = 1.0, *, distance: str = "euclidean", reduction: str = "mean"
    ):
        check_number(margin, "margin")
        check_choice(distance, "distance", DISSIMILARITIES)
        super().__init__(margin=margin, distance=distance, reduction=reduction)

    def forward(
        self, head, relation, tail, negative_head, negative_tail, *, negative_relation=None,
        weight=None,
    ):  # fmt: skip
        return transe(
            head, relation, tail, negative_head, negative_tail,
            negative_relation=negative_relation, weight=weight, **self.options(),
        )  # fmt: skip

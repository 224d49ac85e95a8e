"""The losses of pytorch-metric-learning (2.9) on fastcl's operators.

    from fastcl.compat.pytorch_metric_learning import NTXentLoss
    # was: from pytorch_metric_learning.losses import NTXentLoss

Where pytorch-metric-learning is installed these are subclasses of its own classes, so its wrappers,
miners, trainers and checks take them; without it they work with its default distances and
reducers. All pairs or triplets of a batch, or of a batch and ``ref_emb``, are reduced without
listing one: no N x M matrix, where the peer forms B x B (``SupConLoss``) to B^3 (``NTXentLoss``,
``TripletMarginLoss``) numbers. What is left to the peer's own code, with the peer's memory:

- ``indices_tuple``, so every miner;
- distances other than ``CosineSimilarity`` and ``DotProductSimilarity``, and for the losses of
  distances ``LpDistance``;
- reducers other than ``MeanReducer``, ``SumReducer`` and ``AvgNonZeroReducer`` (``NTXentLoss``: the
  first two);
- ``swap``, ``smooth_loss`` and a number of ``triplets_per_anchor``; embedding regularizers;
  ``collect_stats``; labels that are no integers.

What differs, and why:

- ``NTXentLoss`` stays exact where the peer adds the smallest float to a softmax: its loss saturates
  at 87.3 and its gradient there is 0.
- Losses are computed in fp32 or wider and returned in the embeddings' dtype, as there.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses.inputs import check_binary, check_vector, scale_of, stored_rows, unit_rows
from ..ops.checks import (
    autocast_enabled,
    check_dense,
    check_features,
    check_same_width,
    precision_of,
)
from ..ops.pairs import describe
from ..ops.registry import FLOATS, accumulator
from .pairwise import (
    Candidates,
    Sums,
    contrastive_sums,
    nt_xent_sums,
    sup_con_sums,
    triplet_sums,
)

try:
    from pytorch_metric_learning import distances as _distances
    from pytorch_metric_learning import losses as _peer
    from pytorch_metric_learning import reducers as _reducers
except ImportError:
    _peer = None

__all__ = [
    "ContrastiveLoss",
    "CrossBatchMemory",
    "NTXentLoss",
    "SelfSupervisedLoss",
    "SupConLoss",
    "TripletMarginLoss",
]

_SUB_LOSSES = ("pos_loss", "neg_loss")
_NOTHING: Any = contextlib.nullcontext()


class _Alone(nn.Module):
    """What the classes stand on without pytorch-metric-learning: its defaults and nothing else."""

    distance = reducer = embedding_regularizer = None
    collect_stats = False

    def __init__(self, **options: Any):
        super().__init__()
        for name, value in options.items():
            if getattr(_Alone, name, value) is not value:
                raise self._refusal(f"{name}={value!r}")
            setattr(self, name, value)

    @staticmethod
    def _refusal(what: str) -> ImportError:
        return ImportError(
            f"{what} needs pytorch-metric-learning's own code: pip install pytorch-metric-learning"
        )

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        raise self._refusal(f"this call of {type(self).__name__}, which no operator serves,")


_base: Any = _peer or SimpleNamespace(**dict.fromkeys(__all__, _Alone))


class _ByLabel:
    """Reduces all pairs that labels make; everything else goes to the class beside it."""

    distance: Any
    reducer: Any
    embedding_regularizer: Any
    collect_stats: bool

    def forward(self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None):
        """The loss, in the embeddings' dtype.

        Args:
            embeddings: [N, D], any float dtype.
            labels: [N] integers; without them ``indices_tuple`` is needed.
            indices_tuple: pairs or triplets to use instead of all; left to the peer's code.
            ref_emb, ref_labels: [M, D] and [M], what anchors are compared with; by default each
                other.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape or device; NaN or infinity
                (looked at where that is free, on a CPU).
            ImportError: the peer's code is needed and is not installed.
        """
        _check_kinds(embeddings, labels)
        if ref_emb is not None:
            _check_kinds(ref_emb, ref_labels, "ref_emb", "ref_labels")
        pairs = None
        if indices_tuple is None and (ref_emb is None) == (ref_labels is None):
            pairs = self._candidates(embeddings, labels, ref_emb, ref_labels)
        if pairs is None:
            wide = [_widened(x) for x in (embeddings, ref_emb)]
            loss = super().forward(wide[0], labels, indices_tuple, wide[1], ref_labels)  # type: ignore[misc]
            return loss.to(embeddings.dtype) if isinstance(loss, Tensor) else loss
        return self._of(pairs, _precision(embeddings, ref_emb)).to(embeddings.dtype)

    def _candidates(self, embeddings, labels, ref_emb, ref_labels, skip=()) -> Candidates | None:
        """Rows as the loss takes them with their labels, or ``None`` where the peer's code has to
        serve; pairs at the offsets ``skip`` from ``ref_emb`` are of a row with itself."""
        served = (
            self._serves()
            and not _is_empty(embeddings)
            and not _is_empty(ref_emb)
            and _is_labels(labels)
            and (ref_labels is None or _is_labels(ref_labels))
            and self.embedding_regularizer is None
            and not self.collect_stats
        )
        if not served:
            return None
        queries = self._rows(embeddings, "embeddings")
        if ref_emb is None:
            return Candidates(queries, _ids(labels, "labels", queries), None, None)
        keys = self._rows(ref_emb, "ref_emb")
        check_same_width(queries, keys, "embeddings", "ref_emb")
        ids, key_ids = _ids(labels, "labels", queries), _ids(ref_labels, "ref_labels", keys)
        if ref_labels is labels:  # as the peer tells that anchors are compared with themselves
            skip = (0,)
        return Candidates(queries, ids, keys, key_ids, skip)

    def _serves(self) -> bool:
        """Whether the distance and the reducer are of those served here."""
        raise NotImplementedError

    def _rows(self, x: Tensor, name: str) -> Tensor:
        """Rows in the accumulator's dtype."""
        raise NotImplementedError

    def _of(self, pairs: Candidates, precision: torch.dtype) -> Tensor:
        raise NotImplementedError


def _check_kinds(rows, labels, of_rows: str = "embeddings", of_labels: str = "labels") -> None:
    """What neither this nor the peer's code takes, refused by name."""
    if not isinstance(rows, Tensor) or rows.dtype not in FLOATS:
        raise TypeError(f"{of_rows} {describe(rows)}; expected a [N, D] tensor of floats")
    check_dense(rows, of_rows)
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise TypeError(f"{of_labels} {describe(labels)}; expected a tensor, a label for each row")
    check_dense(labels, of_labels)
    if labels.dim() != 1 or labels.is_meta != rows.is_meta:
        raise ValueError(f"{of_labels} {describe(labels)}; expected a label for each row")


def _is_labels(labels) -> bool:
    return isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() == 1


def _ids(labels: Tensor, name: str, rows: Tensor) -> Tensor:
    return check_vector(labels.to(rows.device), name, len(rows), rows).to(torch.int64)


def _is_empty(x) -> bool:
    """No rows, of which the peer makes a loss of 0."""
    return isinstance(x, Tensor) and x.dim() == 2 and x.shape[0] == 0


def _widened(x):
    """16-bit rows in fp32, in which the peer's code is then exact enough."""
    short = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if short else x


def _precision(embeddings: Tensor, ref_emb: Tensor | None) -> torch.dtype:
    return precision_of(embeddings, ref_emb, None)


def _reduction(reducer, default: str) -> str | None:
    """``"mean"``, ``"sum"`` or ``"above zero"``, or ``None`` for a reducer of another kind."""
    if reducer is None:
        return default
    kinds = {
        _reducers.MeanReducer: "mean",
        _reducers.SumReducer: "sum",
        _reducers.AvgNonZeroReducer: "above zero",
    }
    return kinds.get(type(reducer))


class _SoftmaxByLabel(_ByLabel):
    """Scores are products of rows, over a temperature."""

    temperature: float
    reductions: tuple[str, ...] = ()  # the served ones, the default first

    def _serves(self) -> bool:
        return (
            _reduction(self.reducer, self.reductions[0]) in self.reductions
            and self._normalizes() is not None
        )

    def _normalizes(self) -> bool | None:
        distance = self.distance
        if distance is None:
            return True
        plain = type(distance) in (_distances.CosineSimilarity, _distances.DotProductSimilarity)
        if not plain or distance.power != 1 or distance.p != 2:
            return None
        return distance.normalize_embeddings

    def _rows(self, x: Tensor, name: str) -> Tensor:
        return unit_rows(x, name, bool(self._normalizes()))

    def _sums(self, pairs: Candidates, scale, precision) -> Sums:
        raise NotImplementedError

    def _of(self, pairs: Candidates, precision: torch.dtype) -> Tensor:
        sums = self._sums(pairs, scale_of(self.temperature), precision)
        return sums.reduced(_reduction(self.reducer, self.reductions[0]))


class NTXentLoss(_SoftmaxByLabel, _base.NTXentLoss):
    """Mean over positive pairs of -ln(e^s+ / (e^s+ + sum over the anchor's negatives)).

    Other positives of an anchor are not in the denominator.

    Args:
        temperature: positive number.
        kwargs: ``distance``, ``reducer``, ``embedding_regularizer``, ``embedding_reg_weight``,
            ``collect_stats``: see the module for what is served.
    """

    reductions = ("mean", "sum")

    def __init__(self, temperature: float = 0.07, **kwargs: Any):
        super().__init__(temperature=temperature, **kwargs)

    def _sums(self, pairs, scale, precision):
        return nt_xent_sums(pairs, scale, precision)


class SupConLoss(_SoftmaxByLabel, _base.SupConLoss):
    """SupCon (Khosla et al. 2020, L_out), averaged over the anchors whose loss is above 0.

    Args: as for :class:`NTXentLoss`.
    """

    reductions = ("above zero", "mean", "sum")

    def __init__(self, temperature: float = 0.1, **kwargs: Any):
        super().__init__(temperature=temperature, **kwargs)

    def _sums(self, pairs, scale, precision):
        return sup_con_sums(pairs, scale, precision)


class _DistanceByLabel(_ByLabel):
    """Losses of distances between rows."""

    def _serves(self) -> bool:
        kinds = [] if self.distance is None else [
            _distances.LpDistance, _distances.CosineSimilarity, _distances.DotProductSimilarity
        ]  # fmt: skip
        return (self.distance is None or type(self.distance) in kinds) and all(
            _reduction(reducer, "above zero") for reducer in self._parts()
        )

    def _parts(self) -> list:
        return [self.reducer]

    def _rows(self, x: Tensor, name: str) -> Tensor:
        return stored_rows(x, name).to(accumulator(x.dtype))

    @property
    def _inverted(self) -> bool:
        return self.distance is not None and self.distance.is_inverted

    def _distances(self, a: Tensor, b: Tensor) -> Tensor:
        device = a.device.type
        with torch.autocast(device, enabled=False) if autocast_enabled(device) else _NOTHING:
            if self.distance is not None:
                return self.distance(a, b)
            return torch.cdist(F.normalize(a), F.normalize(b))


class ContrastiveLoss(_DistanceByLabel, _base.ContrastiveLoss):
    """Hinge losses of positive pairs beyond a margin and of negative pairs within one, summed.

    Each is averaged over the pairs whose loss is above 0. Of similarities the margins are turned
    round.

    Args:
        pos_margin, neg_margin: of distances; by default lengths between unit rows.
        kwargs: as for :class:`NTXentLoss`.
    """

    def __init__(self, pos_margin: float = 0, neg_margin: float = 1, **kwargs: Any):
        super().__init__(pos_margin=pos_margin, neg_margin=neg_margin, **kwargs)

    def _parts(self):
        if self.reducer is None:
            return [None, None]
        if type(self.reducer) is not _reducers.MultipleReducers:
            return [self.reducer]
        # a module dict is not a mapping for torch.compile, its items are
        parts, default = dict(self.reducer.reducers.items()), self.reducer.default_reducer
        return [parts.get(name, default) for name in _SUB_LOSSES]

    def _serves(self):
        return len(self._parts()) == len(_SUB_LOSSES) and super()._serves()

    def _of(self, pairs, precision):
        sign = -1.0 if self._inverted else 1.0
        sums = contrastive_sums(
            pairs, self._distances,
            lambda d: sign * (d - self.pos_margin), lambda d: sign * (self.neg_margin - d),
        )  # fmt: skip
        total = torch.stack([
            part.reduced(_reduction(reducer, "above zero"))
            for part, reducer in zip(sums, self._parts(), strict=True)
        ]).sum()  # fmt: skip
        # the peer takes a single pair of either kind for none
        return torch.where((sums[0].count > 1) | (sums[1].count > 1), total, 0.0)


class TripletMarginLoss(_DistanceByLabel, _base.TripletMarginLoss):
    """relu(d_ap - d_an + margin), averaged over the triplets whose loss is above 0.

    Args:
        margin: by default of lengths between unit rows.
        swap, smooth_loss, triplets_per_anchor: see the module.
        kwargs: as for :class:`NTXentLoss`.
    """

    def __init__(
        self,
        margin: float = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor: int | str = "all",
        **kwargs: Any,
    ):
        super().__init__(
            margin=margin, swap=swap, smooth_loss=smooth_loss,
            triplets_per_anchor=triplets_per_anchor, **kwargs,
        )  # fmt: skip

    def _serves(self):
        plain = not self.swap and not self.smooth_loss and self.triplets_per_anchor == "all"
        return plain and super()._serves()

    def _of(self, pairs, precision):
        sign = -1.0 if self._inverted else 1.0
        sums = triplet_sums(pairs, lambda a, b: sign * self._distances(a, b), self.margin)
        return sums.reduced(_reduction(self.reducer, "above zero"))


class CrossBatchMemory(_base.CrossBatchMemory):
    """A batch against the last ``memory_size`` embeddings, its own among them (XBM).

    A loss of this module reduces all pairs without listing one; a miner, ``indices_tuple`` or
    another loss is left to the peer's code. As there, ``queue_idx`` and ``has_been_filled`` are not
    in ``state_dict``: :class:`fastcl.NegativeQueue` resumes exactly.

    Args:
        loss: of embeddings and labels.
        embedding_size: D.
        memory_size: how many embeddings to hold; a batch may not be larger.
        miner: of the peer's.
    """

    embedding_memory: Tensor
    label_memory: Tensor

    def __init__(self, loss, embedding_size: int, memory_size: int = 1024, miner=None, **kwargs):
        if _peer is None:
            raise _Alone._refusal("CrossBatchMemory")
        super().__init__(loss, embedding_size, memory_size, miner, **kwargs)

    def forward(self, embeddings, labels, indices_tuple=None, enqueue_mask=None):
        """The loss of ``embeddings`` [N, D] with ``labels`` [N], which are enqueued first.

        Args:
            indices_tuple: further pairs or triplets, of the batch.
            enqueue_mask: [N] booleans; marked rows are enqueued, the others are the anchors.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape or device.
        """
        served = (
            isinstance(self.loss, _ByLabel)
            and self.miner is None
            and indices_tuple is None
            and not self.collect_stats
            and self._fits(embeddings, labels, enqueue_mask)
            and self.loss._candidates(embeddings[:1], labels[:1], None, None) is not None
        )
        if not served:
            return super().forward(embeddings, labels, indices_tuple, enqueue_mask)
        labels = labels.to(embeddings.device)
        self.embedding_memory = self.embedding_memory.to(embeddings)
        self.label_memory = self.label_memory.to(labels)
        begin = self.queue_idx
        skip: tuple[int, ...] = ()
        if enqueue_mask is None:
            self.add_to_memory(embeddings, labels, len(embeddings))
            skip = (begin, begin - self.memory_size)  # where each row went, wrapped around or not
        else:
            mask = enqueue_mask != 0
            self.add_to_memory(embeddings[mask], labels[mask], int(mask.sum()))
            embeddings, labels = embeddings[~mask], labels[~mask]
        held = self.memory_size if self.has_been_filled else self.queue_idx
        # a copy: the memory may take the next batch before this one's backward
        memory = self.embedding_memory[:held].clone()
        pairs = self.loss._candidates(
            embeddings, labels, memory, self.label_memory[:held].clone(), skip
        )
        return self.loss._of(pairs, _precision(embeddings, memory)).to(embeddings.dtype)

    def _fits(self, embeddings, labels, enqueue_mask) -> bool:
        """Whether there are anchors and room; else the peer's code has its own answer.

        Raises:
            TypeError, ValueError: what would leave the memory half written.
        """
        check_features(embeddings, "embeddings")
        if labels is None:
            raise TypeError("labels is None; expected a tensor, a label for each row")
        _check_kinds(embeddings, labels)
        if not _is_labels(labels):
            return False
        check_vector(labels.to(embeddings.device), "labels", len(embeddings), embeddings)
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings {describe(embeddings)}; expected width {self.embedding_size}, the "
                "embedding_size of the memory"
            )
        if enqueue_mask is None:
            return len(embeddings) <= self.memory_size
        mask = check_binary(enqueue_mask, "enqueue_mask", embeddings.shape[:1], embeddings)
        return not bool(mask.all())


class SelfSupervisedLoss(_base.SelfSupervisedLoss):
    """A loss of labels for two views: row i of one belongs to row i of the other.

    Args:
        loss: of embeddings and labels.
        symmetric: all 2N rows are anchors among each other; else ``embeddings`` among ``ref_emb``.
    """

    def __init__(self, loss, symmetric: bool = True, **kwargs: Any):
        if _peer is not None:
            super().__init__(loss, symmetric, **kwargs)
            return
        super().__init__(**kwargs)
        if not isinstance(loss, _ByLabel):
            raise Exception(f"SelfSupervisedLoss not supported for {type(loss).__name__}")
        self.loss: Any = loss
        self.symmetric = symmetric

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """The loss of two views [N, D].

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape or device.
        """
        _check_kinds(embeddings, None)
        _check_kinds(ref_emb, None, "ref_emb")
        if embeddings.shape != ref_emb.shape or embeddings.device != ref_emb.device:
            raise ValueError(
                f"ref_emb {describe(ref_emb)}; expected shape {tuple(embeddings.shape)} on "
                f"{embeddings.device}, like embeddings"
            )
        labels = torch.arange(embeddings.shape[0], device=embeddings.device)
        if self.symmetric:
            return self.loss(torch.cat([embeddings, ref_emb]), torch.cat([labels, labels]))
        return self.loss(embeddings, labels, ref_emb=ref_emb, ref_labels=labels.clone())

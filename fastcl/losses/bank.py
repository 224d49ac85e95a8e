"""Losses against a memory bank: instance discrimination and contrastive multiview coding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..distributed import meet
from ..memory import MemoryBank
from ..ops import Pairs, similarity_logsumexp
from ..ops.checks import as_scalar, check_features, precision_of
from ..ops.pairs import describe
from .common import finish, softmax_loss, softmax_metrics
from .inputs import check_number, check_vector, scale_of, unit_rows
from .modules import TemperatureLoss

FORMS = ("softmax", "sampled_softmax", "nce")
_GATHER_BYTES = 2**24  # of bank rows held at a time by the sampled forms


def memory_bank(
    features: Tensor,
    indices: Tensor,
    bank: MemoryBank,
    temperature: float | Tensor = 0.07,
    *,
    form: str = "softmax",
    negatives: int | Tensor = 4096,
    eps: float = 1e-7,
    weight: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    distributed: str | None = None,
    process_group=None,
):
    """Each feature is classified among all samples of the data set (Wu et al. 2018).

    Args:
        features: [B, D], any float dtype.
        indices: [B] integers, which sample each is: row ``indices[i]`` of the bank is its
            positive.
        bank: read, not changed, but for the constant of ``"nce"`` that its first batch fixes.
        temperature: positive number or one-element tensor (differentiable).
        form: ``"softmax"``, exact over all n samples (eq. 2), in O(B + n) memory;
            ``"sampled_softmax"``, over the positive and the drawn negatives (CMC);
            ``"nce"``, noise-contrastive estimation with fixed Z (eqs. 4 to 8).
        negatives: of the sampled forms: how many to draw for each feature, uniformly, with
            replacement and the positive not excluded, as in the paper; or sample numbers [B, K].
        eps: added to the denominators of ``"nce"``, as in the authors' code; 0 for the equations.
        weight: [B] floats; each sample's share, the mean becoming sum(w l) / sum(w).
        normalize: divide features by their length first.
        reduction: ``"mean"`` over B, ``"sum"``, or ``"none"`` for [B] losses.
        return_metrics: with ``"softmax"``, as for :func:`nt_xent`.
        distributed, process_group: as for :func:`nt_xent`; the mean is then the global one.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), or (loss, metrics). The sampled forms have no
        second derivatives.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
    """
    _check_form(form, return_metrics)
    check_number(eps, "eps", 0.0)
    if not isinstance(bank, MemoryBank):
        raise TypeError(f"bank {describe(bank)}; expected a fastcl.MemoryBank")
    scale = scale_of(temperature)
    check_features(features, "features", "[B, D]")
    n, d = bank.features.shape
    if features.shape[1] != d or features.device != bank.features.device:
        raise ValueError(
            f"features {describe(features)}; expected width {d} on {bank.features.device}, like "
            "the bank"
        )
    rows = unit_rows(features, "features", normalize)
    indices = bank.check_indices(indices, rows.shape[0])
    ranks = meet(
        distributed, process_group, rows, reduction, loss="memory_bank", form=form, scale=scale,
        weight=weight, return_metrics=return_metrics,
    )  # fmt: skip
    if form != "softmax":
        samples = torch.cat([indices[:, None], _drawn(negatives, indices, bank)], 1)
        scale = as_scalar(scale, "scale", rows, rows.dtype)
        losses = _Sampled.apply(rows, scale, bank, samples, form, eps)
        return finish(losses, reduction, weight, None, ranks)

    cosines = (rows * bank.features[indices].to(rows.dtype)).sum(1)
    positive = cosines * scale
    others = similarity_logsumexp(
        rows, bank.features, scale,
        pairs=Pairs("different", indices, torch.arange(n, device=rows.device)),
        maxima=return_metrics, precision=precision_of(features, bank.features, None),
    )  # fmt: skip
    metrics = None
    if return_metrics:
        total = bank.features.sum(0, dtype=rows.dtype)
        sums = (rows.detach() * total).sum(1) - cosines.detach()
        count = torch.full_like(sums, n - 1)
        metrics = softmax_metrics(cosines, positive, others, sums, count, ranks)
    return finish(softmax_loss(positive, others.rows), reduction, weight, metrics, ranks)


def _check_form(form: str, return_metrics: bool) -> None:
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; expected one of {FORMS}")
    if return_metrics and form != "softmax":
        raise ValueError(f"return_metrics needs form 'softmax', the exact sweep; form is {form!r}")


def _drawn(negatives: int | Tensor, indices: Tensor, bank: MemoryBank) -> Tensor:
    b, n = indices.shape[0], bank.features.shape[0]
    if isinstance(negatives, Tensor):
        if negatives.dim() != 2 or negatives.shape[0] != b or negatives.shape[1] == 0:
            raise ValueError(f"negatives {describe(negatives)}; expected sample numbers [{b}, K]")
        flat = check_vector(negatives.flatten(), "negatives", negatives.numel(), indices)
        return bank.check_indices(flat, flat.shape[0]).view(negatives.shape)
    if not isinstance(negatives, int) or isinstance(negatives, bool) or negatives < 1:
        raise ValueError(f"negatives {describe(negatives)}; expected a positive integer")
    return torch.randint(n, (b, negatives), device=indices.device)


class _Sampled(torch.autograd.Function):
    """Losses of features against drawn bank rows; the forward yields the gradient.

    Drawn rows [B, K, D] are never held at once, and the bank may change before the backward.
    """

    @staticmethod
    def forward(ctx, rows, scale, bank, samples, form, eps):
        with torch.autocast(rows.device.type, enabled=False):
            return _Sampled._forward(ctx, rows, scale, bank, samples, form, eps)

    @staticmethod
    def _forward(ctx, rows, scale, bank, samples, form, eps):
        def drawn():
            return _blocks(bank.features, samples, rows.dtype)

        cosines = torch.cat([torch.bmm(keys, rows[at, :, None])[:, :, 0] for at, keys in drawn()])
        scores = cosines * scale
        positive, others = scores[:, 0], scores[:, 1:]
        if form == "nce":
            # P / (P + c + eps) and c / (P + c + eps) with P = exp(s) / Z, c = K / n
            k = others.shape[1]
            noise = k / bank.features.shape[0]
            shift = (bank.normalizer(scores) + math.log(noise + eps)).to(scores.dtype)
            losses = F.softplus(shift - positive) + F.softplus(others - shift).sum(1)
            losses = losses + k * math.log1p(eps / noise)
            slopes = torch.sigmoid(scores - shift)  # d loss / d score
            slopes[:, 0] = -torch.sigmoid(shift - positive)
        else:
            losses = softmax_loss(positive, torch.logsumexp(others, 1))
            slopes = torch.softmax(scores, 1)
            slopes[:, 0] = -torch.sigmoid(torch.logsumexp(others, 1) - positive)
        weighted = torch.cat([torch.bmm(slopes[at, None], keys)[:, 0] for at, keys in drawn()])
        ctx.save_for_backward(weighted * scale, (slopes * cosines).sum(1))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        by_rows, by_scale = ctx.saved_tensors
        return grad[:, None] * by_rows, (grad * by_scale).sum(), None, None, None, None


def _blocks(
    features: Tensor, samples: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Where and which rows of the bank: those of a few features at a time [b, 1 + K, D]."""
    b, k = samples.shape
    step = max(1, _GATHER_BYTES // (k * features.shape[1] * dtype.itemsize))
    for begin in range(0, b, step):
        at = slice(begin, begin + step)
        yield at, features[samples[at]].to(dtype)


class MemoryBankLoss(TemperatureLoss):
    """:func:`~fastcl.functional.memory_bank` as a module with its bank.

    ``MemoryBankLoss(len(data), 128)(features, indices)`` scores against the bank as it is and
    then, in training mode, updates it.
    """

    described = ("form", "negatives")

    def __init__(
        self,
        num_samples: int,
        dim: int,
        temperature: float = 0.07,
        *,
        momentum: float = 0.5,
        form: str = "softmax",
        negatives: int = 4096,
        dtype: torch.dtype = torch.float32,
        **options,
    ):
        super().__init__(temperature, **options)
        _check_form(form, self.return_metrics)
        self.form = form
        self.negatives = negatives
        self.bank = MemoryBank(num_samples, dim, momentum=momentum, dtype=dtype)

    def forward(self, features, indices, *, negatives=None, weight=None):
        result = memory_bank(
            features, indices, self.bank, self.temperature, form=self.form,
            negatives=self.negatives if negatives is None else negatives,
            weight=weight, **self.options(),
        )  # fmt: skip
        self.bank.update(indices, features.detach())
        return result


class CMCLoss(TemperatureLoss):
    """Contrastive multiview coding (Tian et al. 2020, eqs. 4 and 8): every view against each other.

    ``CMCLoss(len(data), 128)(l, ab, indices=indices)`` sums :func:`~fastcl.functional.memory_bank`
    over ordered pairs of views (the full graph), a view's features scored against the other's
    bank, and then, in training mode, updates the banks.
    """

    described = ("form", "negatives")
    has_metrics = False

    def __init__(
        self,
        num_samples: int,
        dim: int,
        temperature: float = 0.07,
        *,
        views: int = 2,
        momentum: float = 0.5,
        form: str = "softmax",
        negatives: int = 16384,
        dtype: torch.dtype = torch.float32,
        **options,
    ):
        super().__init__(temperature, **options)
        _check_form(form, False)
        if views < 2:
            raise ValueError(f"views is {views}; expected at least 2")
        self.form = form
        self.negatives = negatives
        self.banks: Any = nn.ModuleList(
            MemoryBank(num_samples, dim, momentum=momentum, dtype=dtype) for _ in range(views)
        )

    def forward(self, *features, indices, negatives=None, weight=None):
        if len(features) != len(self.banks):
            raise ValueError(f"features came {len(features)}; expected {len(self.banks)} views")
        if negatives is None and self.form != "softmax":
            negatives = _drawn(self.negatives, indices, self.banks[0])  # one draw for all pairs
        losses = [
            memory_bank(
                view, indices, bank, self.temperature, form=self.form,
                negatives=self.negatives if negatives is None else negatives,
                weight=weight, **self.options(),
            )
            for a, view in enumerate(features)
            for b, bank in enumerate(self.banks)
            if a != b
        ]  # fmt: skip
        for view, bank in zip(features, self.banks, strict=True):
            bank.update(indices, view.detach())
        return torch.stack(losses).sum(0)

"""The losses of lightly (1.5 and 1.6) on fastcl's operators.

    from fastcl.compat.lightly import NTXentLoss      # was: from lightly.loss import NTXentLoss

Same constructors, values and gradients; no B x B or B x K matrix is formed. What differs, and why:

- ``memory_bank_size`` may be a bare integer, as up to lightly 1.5 (a warning says that the width
  is then guessed from the first batch); lightly 1.6 refuses it.
- With ``gather_distributed`` the batches of ranks may differ in size; lightly hangs or aborts.
- The loss of 16-bit features is fp32. A DCL batch of one sample has no negatives: its term is 0,
  where lightly returns -inf.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as f
from ..distributed import rows_of
from ..losses.common import Views, softmax_loss
from ..losses.inputs import check_number, unit_pair
from ..ops import similarity_logsumexp
from ..ops.checks import check_same_shape, precision_of
from ..ops.pairs import describe
from .common import CompatLoss, distributed_is_there, everyone, own_mean

__all__ = [
    "DCLLoss",
    "DCLWLoss",
    "MemoryBankModule",
    "NTXentLoss",
    "negative_mises_fisher_weights",
]


def _check_temperature(temperature: float) -> None:
    if not isinstance(temperature, Tensor):
        check_number(temperature, "temperature")
    if abs(temperature) < 1e-8:
        raise ValueError(
            f"Illegal temperature: abs({temperature}) < 1e-8; expected a number further from 0"
        )


def _two_views(ranks_wanted: bool, out0: Tensor, out1: Tensor, scale: float, loss: str):
    """The views as 2B unit rows, log-sum-exps over negatives [2B], and whose ranks they are."""
    views = Views.of(out0, out1, None, True)
    ranks = everyone(ranks_wanted, views.rows, loss=loss, scale=scale, precision=views.precision)
    sums = ranks.logsumexp(views.rows, None, scale, pairs=views.pairs, precision=views.precision)
    return views, sums.rows, ranks


class MemoryBankModule(nn.Module):
    """lightly's memory bank: the last ``size[0]`` features, in buffers that are not saved.

    As in lightly, the part of a batch that reaches past the end is dropped and the next batch
    begins at slot 0; :class:`fastcl.NegativeQueue` wraps around and is saved.

    Args:
        size: (number of features, width), or 0 for no bank. A bare number takes the width of the
            first batch.
        gather_distributed: enqueue the features of all ranks.
        feature_dim_first: return the bank as [D, K] rather than [K, D].

    Raises:
        TypeError: a size that is no integer or several. ValueError: a negative size, or none.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        size: int | Sequence[int] = 65536,
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
    ):
        super().__init__()
        sizes: Any = (size,) if isinstance(size, numbers.Integral) else size
        if not isinstance(sizes, Sequence) or not all(
            isinstance(n, numbers.Integral) for n in sizes
        ):
            raise TypeError(f"size {describe(size)}; expected 0 or (number of features, width)")
        if not sizes:
            raise ValueError(f"size {describe(size)}; expected 0 or (number of features, width)")
        self.size: tuple[int, ...] = tuple(int(n) for n in sizes)
        if any(n < 0 for n in self.size):
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.register_buffer("bank", torch.empty(self.size), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)
        if len(self.size) > 1:
            self._begin(self.size)
        elif self.size[0] > 0:
            warnings.warn(
                f"Memory bank size 'size={size}' does not specify feature dimension. It is "
                "recommended to set the feature dimension with 'size=(n, dim)' when creating the "
                "memory bank. Distributed training might fail if the feature dimension is not "
                "set.",
                UserWarning,
                stacklevel=2,
            )

    def _begin(self, size: tuple[int, ...]) -> None:
        self.bank = nn.functional.normalize(torch.randn(size).to(self.bank), dim=-1)

    def stored(self, like: Tensor) -> Tensor | None:
        """The features [K, D] where they lie, for rows such as ``like``; ``None`` of size 0."""
        if self.size[0] == 0:
            return None
        if self.bank.dim() == 1:
            self._begin((*self.size, *like.shape[1:]))
        return self.bank

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``output`` and a copy of the bank ([D, K], or [K, D]; ``None`` of size 0) as it was.

        Args:
            output: [B, D]; enqueued afterwards if ``update``.
            labels: ignored.
        """
        stored = self.stored(output)
        if stored is None:
            return output, None
        bank = stored.detach().clone()
        if update:
            self.enqueue(output)
        return output, bank.transpose(0, -1) if self.feature_dim_first else bank

    @torch.no_grad()
    def enqueue(self, batch: Tensor) -> None:
        """Store a batch [B, D] over the oldest; what reaches past the end is dropped."""
        rows = rows_of(None, batch, "a memory bank") if self.gather_distributed else None
        if rows is not None:
            batch = rows.gather(batch)
        size, count = self.size[0], batch.shape[0]
        batch = batch[:size].to(self.bank)
        slots = self.bank_ptr + torch.arange(batch.shape[0], device=batch.device)
        fits = (slots < size).view(-1, *[1] * (batch.dim() - 1))
        slots = slots % size  # those that do not fit rewrite what is there
        self.bank.index_copy_(0, slots, torch.where(fits, batch, self.bank[slots]))
        end = self.bank_ptr + count
        self.bank_ptr.copy_(torch.where(end >= size, 0, end))


class NTXentLoss(CompatLoss):
    """lightly's NT-Xent: SimCLR's loss in the batch, or MoCo's against a memory bank.

    Args:
        temperature: any number but 0; negative ones are allowed, as in lightly.
        memory_bank_size: (number of keys, width) or a bare number; 0 for negatives of the batch.
        gather_distributed: negatives (or what enters the bank) come from all ranks. Every rank
            returns the mean over its own rows.

    Raises:
        ValueError: a temperature of 0; a negative size; no torch.distributed to gather with.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.memory_bank_size = memory_bank_size
        self.gather_distributed = gather_distributed
        _check_temperature(temperature)
        distributed_is_there(gather_distributed, "gather_distributed")

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [B, D], row by row, in fp32 (fp64 for fp64).

        With a bank ``out1`` enters it after the loss is taken, if ``out0`` requires a gradient.

        Raises:
            TypeError, ValueError: not float matrices of one shape on one device; NaN or infinity
                (looked at where that is free, on a CPU).
        """
        check_same_shape(out0, out1, "out0", "out1")
        bank = self.memory_bank.stored(out0)
        if bank is not None:
            return self._against(bank, out0, out1)
        if self.temperature > 0 and not self.gather_distributed:
            return f.nt_xent(out0, out1, self.temperature)
        scale = 1.0 / self.temperature
        views, negatives, ranks = _two_views(
            self.gather_distributed, out0, out1, scale, "compat nt_xent"
        )
        return own_mean(softmax_loss(views.cosines * scale, negatives), ranks)

    def _against(self, bank: Tensor, out0: Tensor, out1: Tensor) -> Tensor:
        both, cosines = unit_pair(out0, out1, ("out0", "out1"))
        queries, keys = both.split(out0.shape[0])
        bank = bank.to(queries.device)
        negatives = similarity_logsumexp(
            queries, bank, 1.0 / self.temperature, precision=precision_of(out0, out1, None)
        )
        loss = softmax_loss(cosines / self.temperature, negatives.rows).mean()
        if queries.requires_grad:
            self.memory_bank.enqueue(keys)
        return loss


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """Weights [B] of DCLW: 2 - B softmax(<out0, out1> / sigma), without a gradient."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - out0.shape[0] * torch.softmax(similarity, 0)


class DCLLoss(CompatLoss):
    """lightly's decoupled contrastive loss (as corrected in its #1827), mean of both directions.

    Args:
        temperature: any number but 0.
        weight_fn: of the normalised views, (out0, out1) -> [B] or one number; scales the positives'
            term.
        gather_distributed: negatives come from all ranks. Every rank returns the mean over its own
            rows; weights are of the rank's own batch.

    Raises:
        ValueError: a temperature of 0; no torch.distributed to gather with.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ):
        super().__init__()
        _check_temperature(temperature)
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        distributed_is_there(gather_distributed, "gather_distributed")

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of two views [B, D], row by row, in fp32 (fp64 for fp64).

        Raises:
            TypeError, ValueError: not float matrices of one shape on one device; weights of
                another shape; NaN or infinity (looked at where that is free, on a CPU).
        """
        check_same_shape(out0, out1, "out0", "out1")
        scale = 1.0 / self.temperature
        views, negatives, ranks = _two_views(
            self.gather_distributed, out0, out1, scale, "compat dcl"
        )
        positives = views.cosines * scale
        if self.weight_fn is not None:
            a, b = views.rows.split(out0.shape[0])
            positives = torch.cat([self._weights(a, b), self._weights(b, a)]) * positives
        # a batch of one has nothing to be pushed from
        negatives = torch.where(torch.isneginf(negatives), 0.0, negatives)
        return own_mean(negatives - positives, ranks)

    def _weights(self, a: Tensor, b: Tensor) -> Tensor:
        assert self.weight_fn is not None
        weight = self.weight_fn(a, b)
        if isinstance(weight, numbers.Real):
            weight = torch.as_tensor(weight)
        if not isinstance(weight, Tensor) or weight.shape not in ((), (1,), a.shape[:1]):
            raise ValueError(
                f"weight_fn returned what {describe(weight)}; expected one weight, or one for each "
                f"of {a.shape[0]} samples"
            )
        return weight.to(a).expand(a.shape[0])


class DCLWLoss(DCLLoss):
    """:class:`DCLLoss` weighted by :func:`negative_mises_fisher_weights`."""

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ):
        super().__init__(
            temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed
        )
        self.sigma = sigma

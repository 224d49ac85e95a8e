"""A stored feature for every sample of the data set (Wu et al. 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributed import group_of, rows_of
from ..ops import l2_normalize
from ..ops.pairs import describe
from .store import Store, check_dtype, check_finite, check_integers, check_rows, check_size


class MemoryBank(Store):
    """One unit row per sample, moved towards the sample's newest feature when it is seen.

        features[i] <- normalize(momentum * features[i] + (1 - momentum) * normalize(new))

    Where an index occurs several times in a batch its new features are averaged first, and the
    row moves once. With a process group every rank applies the updates of all ranks, in the order
    of ranks, and the banks stay equal; they must begin so (seed alike, or pass a ``generator``),
    which the first update checks. In evaluation mode the bank is frozen. Features are
    constants: they get no gradient. State (``features``, ``log_normalizer``) as for
    :class:`NegativeQueue`.

    Args:
        num_samples: n.
        dim: width D.
        momentum: in [0, 1]; how much of the old feature stays.
        dtype: of the storage: float32, bfloat16, float16 or float64.
        generator: of the first features, uniform in a cube (Wu et al.'s code), then scaled to
            unit length.
        group: process group; ``None`` for the default one.
        device: where to begin.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
    """

    stored = ("features", "log_normalizer")
    fixed = ("log_normalizer",)  # rounded to 16 bits the constant would be another

    def __init__(
        self,
        num_samples: int,
        dim: int,
        *,
        momentum: float = 0.5,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        group=None,
        device=None,
    ):
        super().__init__()
        shape = (check_size(num_samples, "num_samples"), check_size(dim, "dim"))
        if not isinstance(momentum, (int, float)) or not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum {describe(momentum)}; expected a number in [0, 1]")
        self.momentum = momentum
        self.group = group
        self._compared = False  # with the banks of other ranks
        cube = torch.rand(shape, generator=generator, device=device).mul_(2.0).sub_(1.0)
        self.features = l2_normalize(cube)[0].to(check_dtype(dtype))
        # ln Z of the sampled estimate, NaN until the first batch fixes it
        self.log_normalizer = torch.full((), math.nan, dtype=torch.float64, device=device)

    def extra_repr(self) -> str:
        n, d = self.features.shape
        dtype = str(self.features.dtype).removeprefix("torch.")
        return f"num_samples={n}, dim={d}, momentum={self.momentum}, dtype={dtype}"

    @torch.no_grad()
    def update(self, indices: Tensor, features: Tensor) -> None:
        """Move the rows of ``indices``; does nothing in evaluation mode.

        Args:
            indices: [B] integers in [0, n).
            features: [B, D], any float dtype; normalised here.

        Raises:
            TypeError, ValueError: the wrong dtype, shape, device or range; NaN or infinity (the
                last two looked at where that is free, on a CPU); banks of ranks that began unlike.
            RuntimeError: a rank that ended or does not answer.
        """
        if not self.training:
            return
        check_rows(features, "features", self.features, "the bank")
        indices = self.check_indices(indices, features.shape[0])
        rows = l2_normalize(features)[0]
        check_finite(rows, "features")
        everyone = rows_of(
            self.group, rows, "an update of a memory bank", shape=list(self.features.shape),
            momentum=self.momentum, **self._beginning(),
        )  # fmt: skip
        if everyone is not None:
            rows, indices = everyone.gather(rows), everyone.gather(indices)
        ordered = indices.sort().values
        first = torch.searchsorted(ordered, indices)
        repeats = torch.searchsorted(ordered, indices, right=True) - first
        means = torch.zeros_like(rows).index_add_(0, first, rows)[first] / repeats[:, None]
        old = self.features[indices].to(rows.dtype)
        new = l2_normalize(torch.lerp(means, old, self.momentum))[0]
        # repeats write one and the same row, so their order does not matter
        self.features.index_copy_(0, indices, new.to(self.features.dtype))

    def _beginning(self) -> dict[str, float]:
        """What tells a bank that begins (or resumes) unlike those of other ranks; told once, since
        from equal ones they stay equal but for the rounding of unlike machines."""
        if self._compared or group_of(self.group) is None:
            return {}
        self._compared = True
        return {"first feature": float(self.features[0, 0])}

    def check_indices(self, indices: Tensor, length: int) -> Tensor:
        """``indices`` as int64.

        Raises:
            TypeError, ValueError: not ``length`` integers in [0, n) on the bank's device (the
                range is looked at where that is free, on a CPU).
        """
        indices = check_integers(indices, "indices", length, self.features)
        n = self.features.shape[0]
        if indices.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = int(((indices < 0) | (indices >= n)).sum())
            if outside:
                raise ValueError(
                    f"indices holds {outside} outside [0, {n}); expected sample numbers"
                )
        return indices

    @torch.no_grad()
    def normalizer(self, scores: Tensor) -> Tensor:
        """ln Z, the constant of noise-contrastive estimation (Wu et al. 2018, section 3.2).

        The first batch of scores, of samples drawn uniformly, fixes it as n times their mean
        exponential; before, in evaluation mode, each batch gives its own.
        """
        total = torch.logsumexp(scores.flatten(), 0).double()
        number = torch.full_like(total, scores.numel())
        group = group_of(self.group)
        if group is not None:  # one constant for all ranks
            mine = torch.stack([total, number])
            both = group.all_gather(mine, "a memory bank's constant").wait()[0]
            total, number = torch.logsumexp(both[:, 0], 0), both[:, 1].sum()
        estimate = total - number.log() + math.log(self.features.shape[0])
        fixed = torch.where(self.log_normalizer.isnan(), estimate, self.log_normalizer)
        if self.training:
            self.log_normalizer.copy_(fixed)
        return fixed

    def tensors(self) -> dict[str, Tensor]:
        return {"features": self.features, "log_normalizer": self.log_normalizer}

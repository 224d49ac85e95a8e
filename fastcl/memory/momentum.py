"""The slowly moving copy of an encoder that makes keys (MoCo, BYOL)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ..ops.pairs import describe
from .store import check_size


@torch.no_grad()
def update_momentum(
    target: nn.Module, source: nn.Module, momentum: float, *, buffers: bool = False
) -> None:
    """target <- momentum target + (1 - momentum) source, over parameters (He et al. 2020, eq. 2).

    Args:
        target, source: modules of the same parameters in the same order; wrappers such as DDP
            make no difference. Frozen parameters are included.
        momentum: in [0, 1].
        buffers: also average floating buffers and copy the others; without, the target keeps
            those its own forward passes make (MoCo).

    Raises:
        ValueError: parameters that differ in number or shape; a momentum outside [0, 1], or one
            so near 1 that a 16-bit target would round every step away.
    """
    _check_momentum(momentum)
    pairs = _paired(target, source, "parameters")
    if buffers:
        pairs += _paired(target, source, "buffers")
    moved: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
    for mine, theirs in pairs:
        if not mine.is_floating_point():
            mine.copy_(theirs)
            continue
        if mine.itemsize < 4 and momentum < 1.0 and 1.0 - momentum < torch.finfo(mine.dtype).eps:
            raise ValueError(
                f"momentum is {momentum:g} and the target is {str(mine.dtype)[6:]}, which would "
                "round every step away; expected a float32 target, for instance "
                "MomentumEncoder(encoder).float() under autocast"
            )
        targets, sources = moved.setdefault((mine.device, mine.dtype), ([], []))
        targets.append(mine)
        sources.append(theirs.to(mine.device, mine.dtype))
    for targets, sources in moved.values():
        torch._foreach_lerp_(targets, sources, 1.0 - momentum)


def _check_momentum(momentum: float) -> None:
    if not isinstance(momentum, (int, float)) or not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum {describe(momentum)}; expected a number in [0, 1]")


def _paired(target: nn.Module, source: nn.Module, kind: str) -> list[tuple[Tensor, Tensor]]:
    mine, theirs = list(getattr(target, kind)()), list(getattr(source, kind)())
    if [x.shape for x in mine] != [x.shape for x in theirs]:
        raise ValueError(
            f"source has {len(theirs)} {kind} and target {len(mine)}, or their shapes differ; "
            "expected two modules of one architecture"
        )
    return list(zip(mine, theirs, strict=True))


def cosine_momentum(base: float, step: int, total_steps: int) -> float:
    """From ``base`` to 1 along half a cosine (Grill et al. 2020, BYOL, section 3.2)."""
    progress = min(step / total_steps, 1.0)
    return 1.0 - (1.0 - base) * (math.cos(math.pi * progress) + 1.0) / 2.0


class MomentumEncoder(nn.Module):
    """A copy of ``encoder`` that follows it by exponential moving average.

        keys_of = MomentumEncoder(encoder, momentum=0.999)
        keys_of.update(encoder)        # once a step, before the keys are made
        keys = keys_of(images)         # without a graph

    Args:
        encoder: copied; its parameters' copies need no gradient.
        momentum: coefficient, in [0, 1]; at the start if there is a schedule.
        total_steps: raise it to 1 over so many updates by :func:`cosine_momentum`.
        buffers: see :func:`update_momentum`.

    The number of updates is in ``state_dict``, so that a resumed schedule goes on where it was.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        momentum: float = 0.999,
        *,
        total_steps: int | None = None,
        buffers: bool = False,
    ):
        super().__init__()
        _check_momentum(momentum)
        self.base = momentum
        self.total_steps = None if total_steps is None else check_size(total_steps, "total_steps")
        self.buffers_too = buffers
        self.encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.steps = 0

    @property
    def momentum(self) -> float:
        """The coefficient of the next update."""
        if self.total_steps is None:
            return self.base
        return cosine_momentum(self.base, self.steps, self.total_steps)

    def update(self, encoder: nn.Module) -> None:
        """Move a step towards ``encoder``.

        Raises:
            ValueError: see :func:`update_momentum`.
        """
        update_momentum(self.encoder, encoder, self.momentum, buffers=self.buffers_too)
        self.steps += 1

    @torch.no_grad()
    def forward(self, *args, **kwargs):
        return self.encoder(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)

    def extra_repr(self) -> str:
        return f"momentum={self.base}, total_steps={self.total_steps}, buffers={self.buffers_too}"

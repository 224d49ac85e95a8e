"""What the classes of every peer share."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed import ALONE, Ranks, group_of, meet
from ..losses.modules import Configured


class CompatLoss(Configured, nn.Module):
    """A loss with a peer's signature."""

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.get_config_dict().items())


def everyone(wanted: bool, keys: Tensor, **facts: Any) -> Ranks:
    """All ranks where that is wanted and there are several, else this process alone.

    Args:
        keys: [M, D], this rank's.
        facts: what must be the same on all ranks.

    Raises:
        ValueError: the ranks disagree. RuntimeError: a rank that ended or does not answer.
    """
    if not wanted or group_of(None) is None:
        return ALONE
    return meet("gather", None, keys, "mean", **facts)


def own_mean(losses: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """The mean over this rank's rows, as peers report it.

    Of unequal batches this is a share instead, so that the mean over ranks is that over all rows.
    Gradients are of the sum over ranks, which DDP turns into the global batch's.
    """
    if ranks is ALONE:
        return losses.mean()
    shared = cast(Any, ranks)
    return losses.sum() * (shared.group.size / sum(shared.sizes))


def distributed_is_there(asked: bool, name: str) -> None:
    """
    Raises:
        ValueError: ranks are to be gathered from and torch has no distributed package.
    """
    if asked and not torch.distributed.is_available():
        raise ValueError(
            f"{name} is True, but this torch has no torch.distributed; expected False or another "
            "build of torch"
        )

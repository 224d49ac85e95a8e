"""Tensors that belong to a module's state without being its parameters or buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import KeepsGroup
from ..ops.checks import check_dense, check_features
from ..ops.pairs import describe
from ..ops.registry import FLOATS


class Store(KeepsGroup, nn.Module):
    """A module whose tensors follow ``.to()`` and ``state_dict`` but are no buffers.

    DDP broadcasts rank 0's buffers before every forward pass, which would cost a queue's bytes
    each step and overwrite the shards of other ranks; averages of a model average its buffers.
    """

    group: Any = None  # of processes; None for the default one
    group_name = "group"
    stored: tuple[str, ...] = ()  # attributes that hold the tensors
    fixed: tuple[str, ...] = ()  # those of them that keep their dtype

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name in self.stored:
            own = getattr(self, name)
            moved = fn(own)
            if name in self.fixed and moved.dtype != own.dtype:
                moved = own.to(moved.device)
            setattr(self, name, moved)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The state, by its name in ``state_dict``."""
        raise NotImplementedError

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over a state whose names, shapes and dtypes are those of :meth:`tensors`."""
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])

    def refusal(self, state: dict[str, Tensor]) -> str:
        """Why a complete ``state`` cannot be taken over, or an empty string."""
        for name, own in self.tensors().items():
            came = state[name]
            if not isinstance(came, Tensor) or came.shape != own.shape or came.dtype != own.dtype:
                return (
                    f"{name} {describe(came)}; expected shape {tuple(own.shape)}, dtype "
                    f"{str(own.dtype).removeprefix('torch.')}"
                )
        return ""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.tensors().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        names = list(self.tensors())
        came = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
        unexpected_keys += [prefix + name for name in sorted(came.difference(names))]
        absent = [prefix + name for name in names if name not in came]
        missing_keys += absent
        if absent:
            return
        state = {name: state_dict[prefix + name] for name in names}
        reason = self.refusal(state)
        if reason:
            error_msgs.append(f"{prefix}{reason}; {type(self).__name__} is left as it was.")
            return
        with torch.no_grad():
            self.restore(state)


def check_size(value: int, name: str) -> int:
    """A positive integer.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} {describe(value)}; expected a positive integer")
    return value


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """A float dtype that keys can be stored in.

    Raises:
        TypeError: it is not.
    """
    if dtype not in FLOATS:
        raise TypeError(
            f"dtype is {dtype!r}; expected float32, bfloat16, float16 or float64 of torch"
        )
    return dtype


def check_rows(x, name: str, like: Tensor, owner: str) -> None:
    """Features [B, D] that fit rows stored in ``like``.

    Raises:
        TypeError, ValueError: the wrong dtype, width or device.
    """
    check_features(x, name, "[B, D]")
    if x.shape[1] != like.shape[1]:
        raise ValueError(f"{name} {describe(x)}; expected width {like.shape[1]}, that of {owner}")
    if x.device != like.device:
        raise ValueError(f"{name} {describe(x)}; expected {like.device}, where {owner} is")


def check_integers(x, name: str, length: int, like: Tensor) -> Tensor:
    """One integer per row, as int64.

    Raises:
        TypeError: the wrong dtype. ValueError: the wrong length or device.
    """
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
        raise TypeError(f"{name} {describe(x)}; expected a tensor of {length} integers")
    check_dense(x, name)
    if x.shape != (length,) or x.device != like.device:
        raise ValueError(f"{name} {describe(x)}; expected {length} integers on {like.device}")
    return x.to(torch.int64).contiguous()


def check_finite(x: Tensor, name: str) -> None:
    """Refuse NaN and infinity where looking is free: eager mode on a CPU.

    Raises:
        ValueError: there is one.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = int((~torch.isfinite(x).all(1)).sum())
    if bad:
        raise ValueError(
            f"{name} holds NaN or infinity in {bad} of its {x.shape[0]} rows as stored in "
            f"{str(x.dtype).removeprefix('torch.')}; expected finite features"
        )

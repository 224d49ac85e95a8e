"""The step of a queue of keys in one operator: normalise, round, store, move the head.

It is optional: where no backend offers it, the queue does the same in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define, dispatch
from .normalize import EPS
from .registry import Call, find


def fuses_enqueue(rows: Tensor, keys: Tensor) -> bool:
    """Whether a backend offers :func:`enqueue` for these rows and this storage."""
    return find(_call(rows, keys)) is not None


def enqueue(
    rows: Tensor,
    ids: Tensor | None,
    no_id: int,
    keys: Tensor,
    key_ids: Tensor,
    pointer: Tensor,
    fill: Tensor,
    *,
    normalize: bool,
) -> None:
    """Store ``rows`` in a ring as if one by one: past its end they go on at the beginning.

    Args:
        rows: [N, D], any N.
        ids: int64 [N]; ``no_id`` for all where there are none.
        keys, key_ids: the ring [K, D] and [K], written.
        pointer, fill: int64 [], the next slot and how many are taken; moved.
        normalize: divide rows by their length, as :func:`~fastcl.ops.l2_normalize`.

    Raises:
        RuntimeError: no usable backend offers it; see :func:`fuses_enqueue`.
    """
    eps, precision = EPS if normalize else 0.0, _call(rows, keys).precision
    _op(rows, ids, eps, no_id, keys, key_ids, pointer, fill, precision)


def _call(rows: Tensor, keys: Tensor) -> Call:
    device = rows.device
    precision = torch.promote_types(rows.dtype, keys.dtype)
    return Call("enqueue", device.type, precision, device.index)


def _enqueue(rows, ids, eps, no_id, keys, key_ids, pointer, fill, precision):
    dispatch(
        "enqueue", "enqueue", rows, precision, rows, ids, eps, no_id, keys, key_ids, pointer, fill
    )


_op = define(
    "enqueue",
    "Tensor rows, Tensor? ids, float eps, int no_id, Tensor(a!) keys, Tensor(b!) key_ids, "
    "Tensor(c!) pointer, Tensor(d!) fill, ScalarType precision",
    "()",
    _enqueue,
    lambda *_: None,
)

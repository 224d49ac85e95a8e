"""One clear sentence for each operand that does not fit, before anything is computed."""

from __future__ import annotations

import numbers
from typing import cast

import torch
from torch import Tensor

from .pairs import Pairs, describe
from .registry import FLOATS, accumulator


def check_features(x, name: str, dims: str = "[N, D]") -> None:
    """A non-empty float tensor of the shape that ``dims`` names.

    Raises:
        TypeError: not a tensor of a supported float dtype.
        ValueError: the wrong number of dimensions, or an empty one.
    """
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(
            f"{name} {describe(x)}; expected a {dims} tensor of float32, bfloat16, float16 or "
            "float64"
        )
    check_dense(x, name)
    if x.dim() != dims.count(",") + 1 or 0 in x.shape:
        raise ValueError(f"{name} {describe(x)}; expected {dims}, no dimension empty")


def check_dense(x: Tensor, name: str) -> None:
    """A tensor whose numbers lie in strides: neither sparse nor nested.

    Raises:
        TypeError: it is something else.
    """
    if x.layout != torch.strided or x.is_nested:
        came = "is nested" if x.is_nested else f"has layout {x.layout}"
        raise TypeError(f"{name} {came}; expected a dense tensor")


def recordable(x: Tensor) -> Tensor:
    """``x``, or a copy of one made under ``torch.inference_mode``, which autograd cannot save."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def check_operands(queries: Tensor, keys: Tensor | None, pairs: Pairs) -> tuple[int, int]:
    """N and M of a similarity problem.

    Raises:
        TypeError, ValueError: operands of the wrong kind, width or device.
    """
    check_features(queries, "queries")
    if keys is not None:
        check_features(keys, "keys", "[M, D]")
        check_same_width(queries, keys, "queries", "keys")
    if not isinstance(pairs, Pairs):
        raise TypeError(f"pairs {describe(pairs)}; expected fastcl.Pairs")
    for name, ids in (("query_ids", pairs.query_ids), ("key_ids", pairs.key_ids)):
        if ids is not None and ids.device != queries.device:
            raise ValueError(f"{name} {describe(ids)}; expected {queries.device}, like queries")
    return queries.shape[0], (queries if keys is None else keys).shape[0]


def check_same_shape(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    """Two aligned batches.

    Raises:
        TypeError, ValueError: they are not float matrices of one shape on one device.
    """
    check_features(a, name_a)
    check_features(b, name_b)
    if a.shape != b.shape:
        raise ValueError(
            f"{name_b} {describe(b)}; expected shape {tuple(a.shape)}, the shape of {name_a}"
        )
    check_same_width(a, b, name_a, name_b)


def check_eps(eps: float) -> None:
    """A positive number.

    Raises:
        ValueError: it is not.
    """
    if not eps > 0.0:
        raise ValueError(f"eps is {eps!r}; expected a positive number")


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; false for those that have none (meta)."""
    # the question breaks compiled graphs up to torch 2.11, so it is not asked of these two
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return False
    return torch.is_autocast_enabled(device)


def check_same_width(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    """Last dimension and device equal.

    Raises:
        ValueError: they are not.
    """
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{name_b} {describe(b)}; expected width {a.shape[-1]}, the width of {name_a}"
        )
    if a.device != b.device:
        raise ValueError(f"{name_b} {describe(b)}; expected {a.device}, like {name_a}")


def as_vector(bias, name: str, length: int, like: Tensor, precision: torch.dtype) -> Tensor | None:
    """A float vector of ``length`` in the accumulator's dtype, or ``None``.

    Raises:
        ValueError: it is something else.
    """
    if bias is None:
        return None
    fits = isinstance(bias, Tensor) and bias.shape == (length,) and bias.is_floating_point()
    if not fits or bias.layout != torch.strided or bias.device != like.device:
        raise ValueError(f"{name} {describe(bias)}; expected {length} floats on {like.device}")
    return bias.to(accumulator(precision))


def precision_of(
    queries: Tensor, keys: Tensor | None, precision: torch.dtype | None
) -> torch.dtype:
    """The dtype in which products may be formed: as asked, autocast's, or the operands'.

    Raises:
        TypeError: not a supported float dtype.
    """
    if precision is None:
        precision = queries.dtype
        if keys is not None:
            precision = torch.promote_types(precision, keys.dtype)
        device = queries.device.type
        if precision != torch.float64 and autocast_enabled(device):
            precision = torch.get_autocast_dtype(device)
    if precision not in FLOATS:
        raise TypeError(f"precision is {precision}; expected one of {FLOATS}")
    return precision


def is_number(value: Tensor) -> bool:
    """Whether a tensor is one real number of a dtype to compute with."""
    odd = value.is_floating_point() or value.is_complex() or value.is_quantized
    dense = value.layout == torch.strided and not value.is_nested
    return dense and value.numel() == 1 and (value.dtype in FLOATS or not odd)


def as_scalar(value, name: str, like: Tensor, precision: torch.dtype) -> Tensor:
    """A number or one-element tensor as a 0-dim tensor in the accumulator's dtype.

    Raises:
        TypeError: neither a number nor a tensor. ValueError: a tensor with several elements.
    """
    dtype = accumulator(precision)
    if not isinstance(value, (Tensor, float, int, numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name} {describe(value)}; expected a number or a one-element tensor")
    if not isinstance(value, Tensor):
        return torch.full((), cast(float, value), dtype=dtype, device=like.device)
    if not is_number(value) or value.is_meta != like.is_meta:  # no number can come from there
        raise ValueError(f"{name} {describe(value)}; expected a number or a one-element tensor")
    return recordable(value).reshape(()).to(device=like.device, dtype=dtype)

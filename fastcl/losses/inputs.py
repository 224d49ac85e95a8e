"""What losses take: features as unit rows, labels, scores, numbers, each refused in a sentence."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from ..ops import l2_normalize, l2_normalize_pair
from ..ops.checks import (
    check_dense,
    check_features,
    check_same_shape,
    is_number,
    recordable,
)
from ..ops.pairs import describe
from ..ops.registry import FLOATS, accumulator

REDUCTIONS = ("mean", "sum", "none")
# float and int first: an abstract class is asked far more slowly
_NUMBERS = (float, int, numbers.Real, torch.SymFloat, torch.SymInt)


def unit_rows(x: Tensor, name: str, normalize: bool = True) -> Tensor:
    """Rows as the losses use them: fp32 (fp64 for fp64), of unit length if ``normalize``.

    Raises:
        ValueError: NaN or infinity in ``x``; see :func:`_check_finite`.
    """
    check_features(x, name)
    if normalize:
        rows, factors = l2_normalize(x)
        _check_finite(factors, (x, name))
        return rows
    return stored_rows(x, name).to(accumulator(x.dtype))


def stored_rows(x: Tensor, name: str) -> Tensor:
    """Rows that only an operator reads, which takes them as they are: a queue is not copied.

    Raises:
        ValueError: NaN or infinity in ``x``; see :func:`_check_finite`.
    """
    check_features(x, name)
    _check_finite(None, (x, name))
    return recordable(x)


def unit_pair(
    a: Tensor, b: Tensor, names: tuple[str, str], normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Rows of two aligned batches [2N, D] as :func:`unit_rows` gives them, and cosines [N].

    Raises:
        TypeError, ValueError: not float matrices of one shape on one device, or not finite.
    """
    check_same_shape(a, b, *names)
    if normalize:
        rows, cosines, factors = l2_normalize_pair(a, b)
        _check_finite(factors, (a, names[0]), (b, names[1]))
        return rows, cosines
    _check_finite(None, (a, names[0]), (b, names[1]))
    acc = accumulator(torch.promote_types(a.dtype, b.dtype))
    a, b = recordable(a).to(acc), recordable(b).to(acc)
    return torch.cat([a, b]), (a * b).sum(1)


def _check_finite(factors: Tensor | None, *inputs: tuple[Tensor, str]) -> None:
    """Refuse NaN and infinite features where looking is cheap: eager mode on a CPU.

    Elsewhere they pass through to the loss, as in any PyTorch function. The factor of a row that
    holds one is NaN or 0; without factors a sum shows it, which is one pass and no copy (and may
    overflow, so the count decides).
    """
    if not can_look(inputs[0][0]):
        return
    if factors is not None:
        suspicious = not bool((factors > 0).all())
    else:
        suspicious = any(not math.isfinite(x.detach().sum()) for x, _ in inputs)
    if suspicious:
        _refuse_unfinite(*inputs)


def _refuse_unfinite(*inputs: tuple[Tensor, str]) -> None:
    for x, name in inputs:
        bad = int((~torch.isfinite(x).all(1)).sum())
        if bad:
            raise ValueError(
                f"{name} holds NaN or infinity in {bad} of its {x.shape[0]} rows; expected finite "
                "features"
            )


def can_look(x: Tensor) -> bool:
    """Whether values of ``x`` can be looked at without waiting: eager mode on a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()


def is_transformed() -> bool:
    """Whether a torch.func transform is active, under which values cannot be looked at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def check_vector(value, name: str, length: int, like: Tensor, floats: bool = False) -> Tensor:
    """One number per sample: integers (labels, ids) or, with ``floats``, weights.

    Raises:
        TypeError: the wrong dtype. ValueError: the wrong length or device.
    """
    kind = "floats" if floats else "integers"
    if not isinstance(value, Tensor) or value.is_complex() or value.is_floating_point() != floats:
        raise TypeError(f"{name} {describe(value)}; expected a tensor of {length} {kind}")
    check_dense(value, name)
    if value.shape != (length,) or value.device != like.device:
        raise ValueError(f"{name} {describe(value)}; expected {length} {kind} on {like.device}")
    if floats and can_look(value):
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise ValueError(f"{name} holds NaN or infinity {bad} times; expected finite numbers")
    return recordable(value)


def check_binary(value, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Yes or no for each entry of ``shape``, given as bools or as integers 0 and 1: bools.

    Raises:
        TypeError: the wrong dtype. ValueError: the wrong shape or device, or (looked at where that
            is free, in eager mode on a CPU) another integer: the -1 of labels that are 1 and -1
            would pass for a yes.
    """
    if not isinstance(value, Tensor) or value.is_complex() or value.is_floating_point():
        raise TypeError(f"{name} {describe(value)}; expected a tensor of integers or bools")
    check_dense(value, name)
    if value.shape != shape or value.device != like.device:
        raise ValueError(
            f"{name} {describe(value)}; expected shape {tuple(shape)} on {like.device}"
        )
    if value.dtype != torch.bool and can_look(value):
        bad = int(((value != 0) & (value != 1)).sum())
        if bad:
            raise ValueError(f"{name} holds {bad} integers that are not 0 or 1; expected 0 and 1")
    return value != 0


def check_range(index: Tensor, name: str, size: int, what: str) -> None:
    """Integers in [0, size), looked at where that is free, in eager mode on a CPU.

    Raises:
        ValueError: some are outside.
    """
    if can_look(index):
        index = index.to(torch.int64)  # unsigned ones cannot be compared
        outside = int(((index < 0) | (index >= size)).sum())
        if outside:
            raise ValueError(f"{name} holds {outside} outside [0, {size}); expected {what}")


def given_scores(
    positive: Tensor,
    negative: Tensor,
    names: tuple[str, str] = ("positive_scores", "negative_scores"),
) -> tuple[Tensor, Tensor]:
    """Scores of positives [N] and of their negatives [N, K] (from [N] too), in fp32 or wider.

    Raises:
        TypeError: not float tensors. ValueError: shapes or devices that do not fit, NaN or infinity
            (looked at in eager mode on a CPU).
    """
    for name, scores in zip(names, (positive, negative), strict=True):
        if not isinstance(scores, Tensor) or scores.dtype not in FLOATS:
            raise TypeError(f"{name} {describe(scores)}; expected a float tensor")
        check_dense(scores, name)
    if positive.dim() != 1 or 0 in positive.shape:
        raise ValueError(f"{names[0]} {describe(positive)}; expected [N], not empty")
    n = positive.shape[0]
    fits = negative.dim() in (1, 2) and negative.shape[0] == n and 0 not in negative.shape
    if not fits or negative.device != positive.device:
        raise ValueError(
            f"{names[1]} {describe(negative)}; expected [{n}] or [{n}, K] on {positive.device}, "
            f"like {names[0]}"
        )
    for name, scores in zip(names, (positive, negative), strict=True):
        bad = int((~torch.isfinite(scores)).sum()) if can_look(scores) else 0
        if bad:
            raise ValueError(
                f"{name} holds NaN or infinity in {bad} of its {scores.numel()} scores; expected "
                "finite scores"
            )
    acc = accumulator(torch.promote_types(positive.dtype, negative.dtype))
    return recordable(positive).to(acc), recordable(negative).to(acc).reshape(n, -1)


def check_fraction(value: float, name: str) -> None:
    """A number in [0, 1).

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, _NUMBERS) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} {describe(value)}; expected a number in [0, 1)")


def check_number(value: float, name: str, minimum: float = -math.inf) -> None:
    """A finite number of at least ``minimum``.

    Raises:
        ValueError: it is not.
    """
    # compared rather than math.isfinite: it may be symbolic in a compiled graph
    if not isinstance(value, _NUMBERS) or not (minimum <= value < math.inf and -math.inf < value):
        least = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise ValueError(f"{name} {describe(value)}; expected a finite number{least}")


def check_positive(value: float, name: str) -> None:
    """A positive finite number.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, _NUMBERS) or isinstance(value, bool) or not 0.0 < value < math.inf:
        raise ValueError(f"{name} {describe(value)}; expected a positive finite number")


def check_reduction(reduction: str) -> None:
    """One of :data:`REDUCTIONS`.

    Raises:
        ValueError: it is not.
    """
    check_choice(reduction, "reduction", REDUCTIONS)


def check_choice(value, name: str, choices: tuple[str, ...]) -> None:
    """One of ``choices``.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        came = f"is {value!r}" if isinstance(value, str) else describe(value)
        raise ValueError(f"{name} {came}; expected one of {choices}")


def scale_of(
    temperature: float | Tensor, logit_scale: float | Tensor | None = None
) -> float | Tensor:
    """Inverse temperature: ``logit_scale`` (already exponentiated) where given.

    Raises:
        ValueError: not a positive finite number or one-element tensor. A tensor's value is looked
            at where that is free, in eager mode on a CPU.
    """
    if logit_scale is not None:
        return _positive(logit_scale, "logit_scale")
    temperature = _positive(temperature, "temperature")
    return temperature.reciprocal() if isinstance(temperature, Tensor) else 1.0 / temperature


def _positive(value: float | Tensor, name: str) -> float | Tensor:
    if not isinstance(value, Tensor):
        check_positive(value, name)
        return value
    real = is_number(value)
    if not real or (can_look(value) and not 0.0 < float(value.detach()) < math.inf):
        came = f"is {value.detach()}" if real else describe(value)
        raise ValueError(f"{name} {came}; expected one positive number")
    return recordable(value).reshape(())

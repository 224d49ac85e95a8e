"""What every loss shares: checked inputs, unit rows, the temperature, the reduction, metrics."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import ALONE, MODES, KeepsGroup, Ranks
from ..ops import LogSumExp, Pairs, fuses_pairs, l2_normalize, l2_normalize_pair
from ..ops.checks import (
    check_dense,
    check_features,
    check_same_shape,
    is_number,
    precision_of,
    recordable,
)
from ..ops.pairs import describe
from ..ops.registry import FLOATS, accumulator

REDUCTIONS = ("mean", "sum", "none")
# float and int first: an abstract class is asked far more slowly
_NUMBERS = (float, int, numbers.Real, torch.SymFloat, torch.SymInt)


# ------------------------------------------------------------------------------------- inputs


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


class Configured:
    """Remembers what its constructor took, so that a loss can be written into a configuration."""

    _config: dict[str, Any]

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:  # unpickling fills the instance afterwards; __init__ refuses the others
            return self
        bound.apply_defaults()
        taken = dict(list(bound.arguments.items())[1:])
        kinds = inspect.signature(cls.__init__).parameters
        rest = [name for name in taken if kinds[name].kind is inspect.Parameter.VAR_KEYWORD]
        for name in rest:
            taken |= taken.pop(name)
        taken.pop("process_group", None)  # cannot be copied or pickled: read where it is kept
        object.__setattr__(self, "_config", taken)
        return self

    def get_config_dict(self) -> dict[str, Any]:
        """What the constructor took: ``type(loss)(**loss.get_config_dict())`` is its equal, but for
        what training has changed since, which is in ``state_dict``."""
        group = getattr(self, "process_group", None)
        return {**self._config, **({} if group is None else {"process_group": group})}


class FixedLoss(Configured, nn.Module):
    """A loss without temperature: the keyword arguments of its function, as attributes."""

    def __init__(self, **options):
        super().__init__()
        if "reduction" in options:
            check_reduction(options["reduction"])
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def options(self) -> dict:
        """The keyword arguments that its function takes."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        values = self.options().items()
        return ", ".join(f"{name}={v!r}" for name, v in values if not isinstance(v, nn.Module))


# -------------------------------------------------------------------------------- temperature


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


def check_positive(value: float, name: str) -> None:
    """A positive finite number.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, _NUMBERS) or isinstance(value, bool) or not 0.0 < value < math.inf:
        raise ValueError(f"{name} {describe(value)}; expected a positive finite number")


def is_transformed() -> bool:
    """Whether a torch.func transform is active, under which values cannot be looked at."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class TemperatureLoss(Configured, KeepsGroup, nn.Module):
    """A loss with a temperature, fixed or learnable, and a reduction.

    ``distributed`` and ``process_group``: see :mod:`fastcl.distributed`.

    A learnable temperature is the parameter ``logit_scale`` = ln(1 / temperature), as in CLIP;
    it is clamped before each use so that 1 / temperature stays at most ``max_scale``.
    """

    described: tuple[str, ...] = ()  # further attributes that repr shows
    shares_ranks = True  # whether its function takes ``distributed`` and ``process_group``
    has_metrics = True  # whether it takes ``return_metrics``

    def __init__(
        self,
        temperature: float,
        *,
        learnable: bool = False,
        max_scale: float = 100.0,
        normalize: bool = True,
        reduction: str = "mean",
        return_metrics: bool = False,
        distributed: str | None = None,
        process_group=None,
    ):
        super().__init__()
        check_positive(temperature, "temperature")
        check_positive(max_scale, "max_scale")
        check_reduction(reduction)
        if learnable and temperature * max_scale < 1.0:
            raise ValueError(
                f"max_scale is {max_scale}; expected at least 1 / temperature = {1 / temperature:g}"
            )
        self.normalize = normalize
        self.reduction = reduction
        self.return_metrics = return_metrics
        if distributed not in (None, *MODES):
            raise ValueError(f"distributed is {distributed!r}; expected None or one of {MODES}")
        name = type(self).__name__
        if return_metrics and not self.has_metrics:
            raise ValueError(f"return_metrics is True; expected False, since {name} has none")
        if distributed is not None and not self.shares_ranks:
            raise ValueError(
                f"distributed is {distributed!r}; expected None, since {name} takes no negatives "
                "from other ranks"
            )
        self.distributed = distributed
        self.process_group = process_group
        self.max_scale = max_scale
        self.learnable = learnable
        if learnable:
            self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        else:
            self._temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a 0-dim tensor with a gradient if learnable."""
        if not self.learnable:
            return self._temperature
        with torch.no_grad():  # in place, so that a scale pushed too far can still come back
            self.logit_scale.clamp_(max=math.log(self.max_scale))
        return torch.exp(-self.logit_scale)

    def options(self) -> dict:
        """The keyword arguments that every loss function takes."""
        options: dict = {"normalize": self.normalize, "reduction": self.reduction}
        if self.has_metrics:
            options["return_metrics"] = self.return_metrics
        if self.shares_ranks:
            options |= {"distributed": self.distributed, "process_group": self.process_group}
        return options

    def extra_repr(self) -> str:
        value = math.exp(-self.logit_scale.detach()) if self.learnable else self._temperature
        parts = [f"temperature={value:.4g}{' (learnable)' if self.learnable else ''}"]
        described = [*self.described, "distributed"] if self.distributed else self.described
        parts += [f"{name}={getattr(self, name)!r}" for name in described]
        return ", ".join([*parts, f"reduction={self.reduction!r}", f"normalize={self.normalize}"])


# ---------------------------------------------------------------------------------- reduction


def reduce(
    losses: Tensor, reduction: str, weight: Tensor | None = None, ranks: Ranks = ALONE
) -> Tensor:
    """Per-sample losses [N] to the asked form, over all ranks; with weights the mean is
    sum(w l) / sum(w)."""
    check_reduction(reduction)
    if weight is not None:
        weight = check_vector(weight, "weight", losses.shape[0], losses, floats=True)
        weight = weight.to(losses.dtype)
        losses = losses * weight
    if reduction == "none":
        return losses
    if reduction == "sum":
        return ranks.totals(losses.sum())[0]
    if weight is None and ranks is ALONE:
        return losses.mean()
    share = losses.new_ones(()) * losses.shape[0] if weight is None else weight.sum()
    total, share = ranks.totals(losses.sum(), share)
    return total / torch.where(share == 0, 1.0, share)


def reduce_counted(
    sums: Tensor, counts: Tensor, reduction: str, weight: Tensor | None = None
) -> Tensor:
    """Per-anchor sums [N] over ``counts`` [N] tuples each to the asked form.

    ``"mean"`` is over all tuples, so that nothing counted gives 0; ``"none"`` is each anchor's own
    mean. An anchor's weight is that of its tuples.
    """
    check_reduction(reduction)
    if weight is not None:
        weight = check_vector(weight, "weight", sums.shape[0], sums, floats=True).to(sums.dtype)
        sums = sums * weight
    if reduction == "sum":
        return sums.sum()
    if reduction == "none":
        return sums / counts.clamp_min(1)
    total = (counts if weight is None else counts * weight).sum()
    return sums.sum() / torch.where(total == 0, 1.0, total)


def finish(losses, reduction, weight, metrics: dict[str, Tensor] | None, ranks: Ranks = ALONE):
    """The reduced loss, with ``metrics`` beside it when there are any."""
    loss = reduce(losses, reduction, weight, ranks)
    return loss if metrics is None else (loss, metrics)


def softmax_loss(positive: Tensor, negatives: Tensor) -> Tensor:
    """-log softmax of the positive against a log-sum-exp of negatives: softplus(lse - positive).

    The positive stays out of the log-sum-exp, so nothing cancels where the loss is tiny. PyTorch's
    softplus turns linear at 20, an error of 2e-9; at 50 it is below float64's resolution.
    """
    return torch.nn.functional.softplus(negatives - positive, threshold=50.0)


def whole_loss(
    operator: Callable[..., Tensor], a: Tensor, b: Tensor, names: tuple[str, str], reduction: str,
    *arguments, **options,
) -> Tensor | None:  # fmt: skip
    """The plain loss of two aligned batches in one operator, one of :mod:`fastcl.ops.fused`.

    ``None`` where no backend would rather take it whole: the caller composes the primitives then.

    Raises:
        TypeError, ValueError: as :func:`unit_pair` does.
    """
    check_reduction(reduction)
    check_same_shape(a, b, *names)
    if reduction == "none" or is_transformed() or not fuses_pairs(operator.__name__, a, b):
        return None
    if not options.get("normalize", True):
        _check_finite(None, (a, names[0]), (b, names[1]))
    loss = operator(a, b, *arguments, mean=reduction == "mean", **options)
    # what is not finite in a row is not finite in its cosine, and shows in any sum of losses
    if can_look(a) and not math.isfinite(loss.detach()):
        _refuse_unfinite((a, names[0]), (b, names[1]))
    return loss


# --------------------------------------------------------------------- smoothing and metrics


def smooth(losses, positive, scale, sums: Tensor, count: Tensor, label_smoothing: float) -> Tensor:
    """Label smoothing: move that share of the target to the uniform mean over all candidates."""
    sums = torch.where(count > 0, sums, 0.0)  # differences of sums, which leave round-off
    mean = (positive + scale * sums) / (count + 1.0)
    return losses + label_smoothing * (positive - mean)


@torch.no_grad()
def softmax_metrics(
    cosines: Tensor,
    positive: Tensor,
    negatives: LogSumExp,
    sums: Tensor,
    count: Tensor,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """What users log, 0-dim each: see :func:`fastcl.functional.nt_xent`."""
    effective = torch.exp(negatives.rows - negatives.row_max)
    n, right, cosine, negative, pairs, effective = ranks.totals(
        torch.ones_like(cosines).sum(),
        (positive > negatives.row_max).to(cosines.dtype).sum(),
        cosines.sum(),
        torch.where(count > 0, sums, 0.0).sum(),
        count.sum(),
        torch.where(count > 0, effective, 0.0).sum(),
    )
    return {
        "accuracy": right / n,
        "positive_similarity": cosine / n,
        "negative_similarity": negative / pairs.clamp_min(1.0),
        "effective_negatives": effective / n,
    }


# -------------------------------------------------------------------------------- two views


@dataclass
class Views:
    """Two views of a batch as one symmetric problem of 2B rows."""

    rows: Tensor  # [2B, D]
    cosines: Tensor  # [2B], each row with its other view
    pairs: Pairs  # keeps the negatives: not the row itself, its other view, or an equal id
    precision: torch.dtype

    @classmethod
    def of(cls, z1: Tensor, z2: Tensor, ids: Tensor | None, normalize: bool) -> Views:
        rows, cosines = unit_pair(z1, z2, ("z1", "z2"), normalize)
        batch = z1.shape[0]
        skip = (0, batch, -batch)
        pairs = Pairs(skip=skip)
        if ids is not None:
            ids = check_vector(ids, "ids", batch, z1)
            pairs = Pairs("different", torch.cat([ids, ids]), skip=skip)
        return cls(rows, torch.cat([cosines, cosines]), pairs, precision_of(z1, z2, None))

    def repeat(self, weight: Tensor | None) -> Tensor | None:
        """Per-sample weights [B] for both views."""
        if weight is None:
            return None
        batch = self.rows.shape[0] // 2
        weight = check_vector(weight, "weight", batch, self.rows, floats=True)
        return torch.cat([weight, weight])

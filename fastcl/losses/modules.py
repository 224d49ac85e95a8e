"""Losses as modules: their configuration, their temperature."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import MODES, KeepsGroup
from .inputs import check_positive, check_reduction


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

"""Two encoders that meet in one space."""

from __future__ import annotations

import math

import torch
from torch import nn


class TwoTower(nn.Module):
    """Two encoders, a linear projection of each, and the learnable scale and bias of their scores.

    Args:
        first, second: encoders with a ``feature_dim``; the same object twice shares its weights.
        dim: P, where both meet.
        temperature: the first value of 1 / ``scale``.
        bias: the first value of ``logit_bias``, which SigLIP adds to scaled scores.
        max_scale: what ``scale`` is held below.

    Source: Radford et al. 2021 (CLIP), figure 3; Zhai et al. 2023 (SigLIP), algorithm 1.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        dim: int = 128,
        *,
        temperature: float = 0.07,
        bias: float = 0.0,
        max_scale: float = 100.0,
    ):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: expected an integer >= 1, got {dim}")
        if not 1.0 / max_scale <= temperature:
            raise ValueError(
                f"temperature: expected at least 1 / max_scale = {1 / max_scale:g}, "
                f"got {temperature}"
            )
        self.first, self.second = first, second
        self.first_projection = nn.Linear(_width(first), dim, bias=False)
        self.second_projection = nn.Linear(_width(second), dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))
        self.max_scale = max_scale

    @property
    def scale(self) -> torch.Tensor:
        """exp(``logit_scale``), 0-dim, differentiable."""
        with torch.no_grad():  # in place, so that a scale pushed too far can still come back
            self.logit_scale.clamp_(max=math.log(self.max_scale))
        return self.logit_scale.exp()

    def encode_first(self, inputs: torch.Tensor) -> torch.Tensor:
        """Projections [B, P] of the first encoder's inputs; not normalised."""
        return self.first_projection(self.first(inputs))

    def encode_second(self, inputs: torch.Tensor) -> torch.Tensor:
        """Projections [B, P] of the second encoder's inputs; not normalised."""
        return self.second_projection(self.second(inputs))

    def forward(
        self, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Projections ([B, P], [B, P]) of aligned inputs."""
        return self.encode_first(first), self.encode_second(second)


def _width(encoder: nn.Module) -> int:
    width = getattr(encoder, "feature_dim", None)
    if not isinstance(width, int):
        raise TypeError(
            f"first and second: expected encoders with a feature_dim, got {type(encoder).__name__}"
        )
    return width

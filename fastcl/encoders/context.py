"""Sequences: features step by step, and the context of the past.

Source: van den Oord, Li and Vinyals 2018, "Representation Learning with Contrastive Predictive
Coding", section 2.2.
"""

from __future__ import annotations

import torch
from torch import nn


class StepEncoder(nn.Module):
    """One encoder for every step: inputs [B, T, ...] to features [B, T, D].

    Args:
        encoder: [N, ...] to features [N, F], with ``feature_dim`` = F.
        features: D, of a linear layer on top.
    """

    def __init__(self, encoder: nn.Module, features: int = 64):
        super().__init__()
        self.encoder = encoder
        self.project = nn.Linear(int(encoder.feature_dim), features)  # type: ignore[arg-type]
        self.feature_dim = features

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Encode every step on its own."""
        return self.project(self.encoder(inputs.flatten(0, 1))).unflatten(0, inputs.shape[:2])


class GRUContext(nn.Module):
    """What the past tells: features [B, T, D] to contexts [B, T, C], each of its step and before.

    Args:
        in_features: D.
        context_features: C; 256 in the paper's audio experiments.
    """

    def __init__(self, in_features: int, context_features: int = 256):
        super().__init__()
        self.in_features = in_features
        self.feature_dim = context_features
        self.gru = nn.GRU(in_features, context_features, batch_first=True)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Contexts [B, T, C].

        Raises:
            ValueError: features that are not [B, T, D].
        """
        if features.ndim != 3 or features.shape[2] != self.in_features:
            raise ValueError(
                f"features: expected shape [B, T, {self.in_features}], got {list(features.shape)}"
            )
        return self.gru(features)[0]

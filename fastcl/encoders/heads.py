"""Projection heads."""

from __future__ import annotations

import torch
from torch import nn


class MLPHead(nn.Sequential):
    """SimCLR's projection head: linear, batch norm, ReLU, linear; features [B, D] to [B, P].

    The loss sees its output z; downstream tasks use its input h, which keeps more of what the
    augmentations were told to forget. The first linear layer has no bias because batch norm
    would subtract it.

    Args:
        in_features: D, the encoder's ``feature_dim``.
        hidden_features: width of the hidden layer.
        out_features: P, the dimension in which views are compared.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
    Representations", section 2.1 (g = W2 ReLU(W1 h)) and section 4.2.
    """

    def __init__(self, in_features: int, hidden_features: int = 128, out_features: int = 64):
        super().__init__(
            nn.Linear(in_features, hidden_features, bias=False),
            nn.BatchNorm1d(hidden_features),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_features, out_features),
        )
        self.in_features = in_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project features [B, D] to [B, P].

        Raises:
            ValueError: ``features`` is not [B, D] with D = ``in_features``.
        """
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise ValueError(
                f"features: expected shape [B, {self.in_features}], got {list(features.shape)}; "
                "build the head with in_features=encoder.feature_dim"
            )
        return super().forward(features)

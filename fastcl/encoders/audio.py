"""A convolutional encoder of raw sound."""

from __future__ import annotations

import torch
from torch import nn

_KERNELS_STRIDES_PADDINGS = ((10, 5, 3), (8, 4, 2), (4, 2, 1), (4, 2, 1), (4, 2, 1))


class AudioEncoder(nn.Module):
    """Five strided convolutions: waveforms [B, 1, L] to features [B, T, D], T = L / 160.

    Strides 5, 4, 2, 2, 2 and kernels 10, 8, 4, 4, 4: at 16 kHz one feature for every 10 ms. Batch
    norm stands between convolution and ReLU, which the paper does not have, so that a few hundred
    steps suffice.

    Args:
        channels: D, of every layer; 512 in the paper.

    Source: van den Oord, Li and Vinyals 2018, "Representation Learning with Contrastive Predictive
    Coding", section 3.1.
    """

    HOP = 160

    def __init__(self, channels: int = 512):
        super().__init__()
        self.feature_dim = channels
        layers: list[nn.Module] = []
        for index, (kernel, stride, padding) in enumerate(_KERNELS_STRIDES_PADDINGS):
            layers += [
                nn.Conv1d(channels if index else 1, channels, kernel, stride, padding, bias=False),
                nn.BatchNorm1d(channels),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Encode floating-point waveforms.

        Raises:
            ValueError: waveforms that are not [B, 1, L] with L a multiple of 160.
        """
        if waveforms.ndim != 3 or waveforms.shape[1] != 1 or waveforms.shape[2] % self.HOP:
            raise ValueError(
                f"waveforms: expected shape [B, 1, L] with L a multiple of {self.HOP}, "
                f"got {list(waveforms.shape)}"
            )
        return self.layers(waveforms).transpose(1, 2)

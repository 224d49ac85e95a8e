"""A convolutional encoder small enough to pretrain on a laptop's processor."""

from __future__ import annotations

import torch
from torch import nn


def _conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class SmallCNN(nn.Module):
    """Three 3 x 3 convolutions with batch norm and two max-pools; images [B, C, H, W] to [B, D].

    Channels grow width, 2 width, 4 width. The last map is averaged to 2 x 2 whatever the image
    size (for 8 x 8 images it already is), so D = ``feature_dim`` = 16 width.

    Args:
        in_channels: C, channels of the images (1 for grey, 3 for colour).
        width: channels after the first convolution.
    """

    def __init__(self, in_channels: int = 1, width: int = 16):
        super().__init__()
        if in_channels < 1 or width < 1:
            raise ValueError(
                f"in_channels and width: expected integers >= 1, got {in_channels} and {width}"
            )
        self.in_channels = in_channels
        self.feature_dim = 16 * width
        self.layers = nn.Sequential(
            *_conv_bn_relu(in_channels, width),
            *_conv_bn_relu(width, 2 * width),
            nn.MaxPool2d(2),
            *_conv_bn_relu(2 * width, 4 * width),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode floating-point images [B, C, H, W], H and W at least 8, to features [B, D].

        Raises:
            ValueError: wrong number of dimensions or channels, or images below 8 x 8.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < 8:
            raise ValueError(
                f"images: expected shape [B, {self.in_channels}, H >= 8, W >= 8] because the "
                f"encoder was built with in_channels={self.in_channels}, got {list(images.shape)}"
            )
        return self.layers(images)

"""Convolutional encoders small enough to train on a laptop's processor."""

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
            TypeError: not floating point.
            ValueError: wrong number of dimensions or channels, or images below 8 x 8.
        """
        check_images(images, self.in_channels, least=8)
        return self.layers(images)


class MNISTCNN(nn.Module):
    """Two 5 x 5 convolutions and two linear layers: images [B, 1, 28, 28] to [B, 128].

    32 and 64 channels, each followed by ReLU and a 2 x 2 max-pool, unpadded; the 64 x 4 x 4 = 1024
    numbers left go through 1024 -> 128: 183,296 parameters (832 + 51,264 + 131,200). Images of
    another size are resized to 28 x 28.
    """

    feature_dim = 128

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 128),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode floating-point images [B, 1, H, W] to features [B, 128].

        Raises:
            TypeError: not floating point.
            ValueError: wrong number of dimensions or channels.
        """
        check_images(images, 1, least=1)
        if images.shape[2:] != (28, 28):
            images = nn.functional.interpolate(images, (28, 28), mode="bilinear")
        return self.layers(images)


def check_images(images: torch.Tensor, in_channels: int, least: int) -> None:
    """Images an encoder was built for.

    Raises:
        TypeError: not floating point.
        ValueError: wrong number of dimensions or channels, or images below ``least`` x ``least``.
    """
    if not images.is_floating_point():
        raise TypeError(f"images: expected floating point, got {images.dtype}; divide bytes by 255")
    if images.ndim != 4 or images.shape[1] != in_channels or min(images.shape[2:]) < least:
        raise ValueError(
            f"images: expected shape [B, {in_channels}, H >= {least}, W >= {least}] because the "
            f"encoder was built with in_channels={in_channels}, got {list(images.shape)}"
        )

"""Domains made from one data set, so that what crosses them can be measured without a download."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def inverted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Dark on bright: 1 - x."""
    return 1 - images


def noisy(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half the contrast, and noise of standard deviation 0.2 on every pixel."""
    noise = torch.randn(images.shape, generator=generator)
    return (0.25 + 0.5 * images + 0.2 * noise).clamp(0, 1)


def tilted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turned by 35 degrees, counter-clockwise, about the middle."""
    angle = math.radians(35.0)
    turn = [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    matrix = torch.tensor(turn, dtype=images.dtype).expand(len(images), 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def textured(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """|x - background|, a smooth random one in [0, 0.7] for each image, as MNIST-M blends digits
    with photographs (Ganin and Lempitsky 2015, section 4)."""
    batch, channels, *size = images.shape
    coarse = torch.rand(batch, channels, 3, 3, generator=generator)
    background = F.interpolate(coarse, tuple(size), mode="bilinear", align_corners=True)
    return (images - 0.7 * background).abs()


SHIFTS: dict[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "inverted": inverted,
    "noisy": noisy,
    "textured": textured,
    "tilted": tilted,
}
"""By name, images [N, C, H, W] in [0, 1] as another domain shows them."""


def shift(images: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    """Images as the domain ``name`` shows them, a function of them and ``seed``.

    Raises:
        ValueError: an unknown domain.
    """
    if name not in SHIFTS:
        raise ValueError(f"shift: expected one of {', '.join(SHIFTS)}, got {name!r}")
    return SHIFTS[name](images, torch.Generator().manual_seed(seed))

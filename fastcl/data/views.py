"""Two random views of every image in a batch, by kornia: on the batch's device, per sample."""

from __future__ import annotations

from collections.abc import Callable

import kornia.augmentation as K
import torch
from torch import nn


def digits_recipe(image_size: tuple[int, int]) -> nn.Module:
    """Augmentations for small grey handwriting: what changes the hand but not the digit.

    Affine map (rotation, scale, shear, shift), a smooth warp, contrast, noise, an erased patch.
    No flip, for a flipped digit is another sign. Intensities are not clipped.
    """
    return nn.Sequential(
        K.RandomAffine(
            degrees=20.0,
            translate=(0.1, 0.1),
            scale=(0.8, 1.2),
            shear=torch.tensor([[-10.0, 10.0], [-10.0, 10.0]]),  # along x, along y
            p=1.0,
        ),
        K.RandomElasticTransform(kernel_size=(7, 7), sigma=(1.5, 1.5), alpha=(0.15, 0.15), p=1.0),
        K.RandomContrast(contrast=(0.7, 1.3), clip_output=False, p=1.0),
        K.RandomGaussianNoise(mean=0.0, std=0.1, p=0.5),
        K.RandomErasing(scale=(0.05, 0.2), ratio=(0.5, 2.0), p=0.5),
    )


def simclr_recipe(image_size: tuple[int, int]) -> nn.Module:
    """SimCLR's augmentations for colour images in [0, 1], with the paper's constants at strength 1.

    Random resized crop (area 8 to 100 %, ratio 3/4 to 4/3), horizontal flip, colour jitter
    (0.8, 0.8, 0.8, 0.2) with probability 0.8, grey with 0.2, Gaussian blur with 0.5 (sigma 0.1
    to 2, kernel a tenth of the image's height, odd and at least 3).

    Source: Chen et al. 2020, appendix A.
    """
    kernel = max(3, image_size[0] // 10 // 2 * 2 + 1)
    return nn.Sequential(
        K.RandomResizedCrop(size=image_size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur(kernel_size=(kernel, kernel), sigma=(0.1, 2.0), p=0.5),
    )


RECIPES: dict[str, Callable[[tuple[int, int]], nn.Module]] = {
    "digits": digits_recipe,
    "simclr": simclr_recipe,
}
"""Augmentation recipes by name; each takes the image size (H, W)."""

_COLOUR_ONLY = {"simclr"}


class TwoViews(nn.Module):
    """Draw two independent augmentations of every image; [B, C, H, W] to two of [B, C, H, W].

    The parameters come from PyTorch's global generator, so ``torch.manual_seed`` reproduces them.
    Both views go through one call of twice the batch, which costs less than two calls.

    Args:
        recipe: a name in ``RECIPES``.
        image_size: (H, W) of the images.

    Raises:
        ValueError: unknown recipe.
    """

    def __init__(self, recipe: str, image_size: tuple[int, int]):
        super().__init__()
        if recipe not in RECIPES:
            raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        self.recipe = recipe
        self.augment = RECIPES[recipe](image_size)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment floating-point images in [0, 1].

        Raises:
            ValueError: not [B, C, H, W] or not floating point, or grey images for a recipe that
                jitters colour.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                "images: expected floating-point [B, C, H, W], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if self.recipe in _COLOUR_ONLY and images.shape[1] != 3:
            raise ValueError(
                f"images: recipe {self.recipe!r} expects 3 colour channels, got {images.shape[1]}"
            )
        first, second = self.augment(torch.cat([images, images])).chunk(2)
        return first, second

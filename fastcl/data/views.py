"""Random views of every image in a batch, by kornia: on the batch's device, per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import kornia.augmentation as K
import torch
from torch import nn

from fastcl.data.splits import unit_range


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
    return nn.Sequential(
        crop(image_size, 0.08),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        blur(image_size),
    )


def moco_v1_recipe(image_size: tuple[int, int]) -> nn.Module:
    """MoCo v1's: crop (area 20 to 100 %), grey with 0.2, jitter (0.4, 0.4, 0.4, 0.4), flip.

    Source: He et al. 2020, section 3.3 and the authors' code.
    """
    return nn.Sequential(
        crop(image_size, 0.2),
        K.RandomGrayscale(p=0.2),
        K.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, p=1.0),
        K.RandomHorizontalFlip(p=0.5),
    )


def moco_v2_recipe(image_size: tuple[int, int]) -> nn.Module:
    """MoCo v2's: crop (area 20 to 100 %), jitter (0.4, 0.4, 0.4, 0.1) with 0.8, grey with 0.2, blur
    with 0.5, flip.

    Source: Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning", section 3,
    and the authors' code.
    """
    return nn.Sequential(
        crop(image_size, 0.2),
        K.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        blur(image_size),
        K.RandomHorizontalFlip(p=0.5),
    )


def plain_recipe(image_size: tuple[int, int]) -> nn.Module:
    """Crop (area 50 to 100 %), flip, rotation by up to 15 degrees and added noise (sd 0.05), for
    images of any number of channels."""
    return nn.Sequential(
        crop(image_size, 0.5),
        K.RandomHorizontalFlip(p=0.5),
        K.RandomRotation(degrees=15.0, p=0.5),
        K.RandomGaussianNoise(mean=0.0, std=0.05, p=0.5),
    )


def crop(image_size: tuple[int, int], least_area: float) -> nn.Module:
    """A random part of at least ``least_area`` of the image, ratio 3/4 to 4/3, at full size."""
    return K.RandomResizedCrop(size=image_size, scale=(least_area, 1.0), ratio=(3 / 4, 4 / 3))


def blur(image_size: tuple[int, int]) -> nn.Module:
    """Gaussian blur with probability 0.5, sigma 0.1 to 2, kernel a tenth of the height."""
    kernel = max(3, image_size[0] // 10 // 2 * 2 + 1)
    return K.RandomGaussianBlur(kernel_size=(kernel, kernel), sigma=(0.1, 2.0), p=0.5)


RECIPES: dict[str, Callable[[tuple[int, int]], nn.Module]] = {
    "digits": digits_recipe,
    "moco_v1": moco_v1_recipe,
    "moco_v2": moco_v2_recipe,
    "plain": plain_recipe,
    "simclr": simclr_recipe,
}
"""Augmentation recipes by name; each takes the image size (H, W)."""

COLOUR_RECIPES = frozenset({"moco_v1", "moco_v2", "simclr"})
"""Those that jitter colour."""


class Augment(nn.Module):
    """One random view of every image; [B, C, H, W] to [B, C, H, W].

    The parameters come from PyTorch's global generator, so ``torch.manual_seed`` reproduces them.
    Autocast changes nothing: coordinates of pixels in bfloat16 would be off by whole pixels.

    Args:
        recipe: a name in ``RECIPES``.
        image_size: (H, W) of the images.
        without: kornia's names of the recipe's augmentations that are left out.

    Raises:
        ValueError: unknown recipe, or an augmentation that it does not have.
    """

    def __init__(self, recipe: str, image_size: tuple[int, int], without: Sequence[str] = ()):
        super().__init__()
        if recipe not in RECIPES:
            raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        self.recipe = recipe
        known = {type(layer).__name__: layer for layer in RECIPES[recipe](image_size).children()}
        if unknown := [name for name in without if name not in known]:
            raise ValueError(
                f"without: expected augmentations of recipe {recipe!r} ({', '.join(known)}), "
                f"got {', '.join(unknown)}"
            )
        self.augment = nn.Sequential(*(known[name] for name in known if name not in without))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Augment images, floating point in [0, 1] or uint8.

        Raises:
            ValueError: not [B, C, H, W] of one of these types, or grey images for a recipe that
                jitters colour.
        """
        images = unit_range(images)
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(
                "images: expected floating-point or uint8 [B, C, H, W], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if self.recipe in COLOUR_RECIPES and images.shape[1] != 3:
            raise ValueError(
                f"images: recipe {self.recipe!r} expects 3 colour channels, got {images.shape[1]}"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.augment(images)


class TwoViews(Augment):
    """Two independent views of every image; [B, C, H, W] to two of [B, C, H, W].

    Both go through one call of twice the batch, which costs less than two calls. Arguments and
    errors as for :class:`Augment`.
    """

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        first, second = super().forward(torch.cat([images, images])).chunk(2)
        return first, second

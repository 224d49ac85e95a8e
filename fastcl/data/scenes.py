"""Pictures with captions, generated: two coloured shapes in two of four quarters of an image.

Every scene (which shapes, colours and places) is in one split only, so what is measured on test
scenes is how well parts recombine, not what was memorised.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch

SHAPES = ("square", "circle", "cross", "triangle")
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
IMAGE_SIZE = 16
CAPTION_LENGTH = 13
"""Tokens of the longest caption, its start and its end included."""
TEST_SCENES, VALIDATION_SCENES = 256, 128

_OBJECT_SIZE = 6
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Scenes:
    """``images`` [N, 3, 16, 16] float32 near [0, 1]; ``objects`` [N, 2, 3] int64, of either object
    the numbers of its shape, colour and place, the earlier place (in reading order) first."""

    images: torch.Tensor
    objects: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def captions(self, detail: float = 1.0, seed: int = 0) -> list[str]:
        """One caption of each image, such as "a red square top left and a cross bottom right".

        Args:
            detail: probability with which each colour and each place is mentioned; shapes always
                are. 1 describes the scene completely.
            seed: of these choices.
        """
        mentioned = np.random.default_rng(seed).random((len(self), 2, 2)) < detail
        colours = list(COLOURS)
        return [
            " and ".join(
                " ".join(
                    [
                        "a",
                        *([colours[colour]] if says[0] else []),
                        SHAPES[shape],
                        *([PLACES[place]] if says[1] else []),
                    ]
                )
                for (shape, colour, place), says in zip(scene, chosen, strict=True)
            )
            for scene, chosen in zip(self.objects.tolist(), mentioned, strict=True)
        ]


@dataclass(frozen=True)
class SceneSplits:
    """Disjoint scenes: 1152 for training, each drawn ``drawings`` times, 128 and 256 once."""

    train: Scenes
    validation: Scenes
    test: Scenes


@functools.cache
def load_scenes(drawings: int = 1) -> SceneSplits:
    """The same scenes and pixels each time; ``drawings`` images of every training scene."""
    everything = torch.tensor(
        [
            [[first[0], first[1], places[0]], [second[0], second[1], places[1]]]
            for places in itertools.combinations(range(len(PLACES)), 2)
            for first in itertools.product(range(len(SHAPES)), range(len(COLOURS)))
            for second in itertools.product(range(len(SHAPES)), range(len(COLOURS)))
        ]
    )
    generator = np.random.default_rng(_SPLIT_SEED)
    order = torch.from_numpy(generator.permutation(len(everything)))
    test, validation, train = order.split(
        [TEST_SCENES, VALIDATION_SCENES, len(order) - TEST_SCENES - VALIDATION_SCENES]
    )

    def part(chosen: torch.Tensor) -> Scenes:
        objects = everything[chosen]
        return Scenes(torch.from_numpy(_draw(objects.numpy(), generator)), objects)

    held_out = part(test), part(validation)
    return SceneSplits(part(train.repeat(drawings)), held_out[1], held_out[0])


def _draw(objects: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Images of scenes; place within the quarter, brightness and noise are drawn anew."""
    half = IMAGE_SIZE // 2
    stencils = _stencils()
    colours = np.array(list(COLOURS.values()), dtype=np.float32)
    images = 0.05 * generator.standard_normal((len(objects), 3, IMAGE_SIZE, IMAGE_SIZE))
    slack = half - _OBJECT_SIZE + 1
    for image, scene in zip(images, objects, strict=True):
        for shape, colour, place in scene:
            row, column = generator.integers(slack, size=2) + half * np.array(divmod(place, 2))
            light = generator.uniform(0.7, 1.0)
            patch = light * colours[colour][:, None, None] * stencils[shape]
            image[:, row : row + _OBJECT_SIZE, column : column + _OBJECT_SIZE] += patch
    return images.astype(np.float32)


def _stencils() -> np.ndarray:
    """Shapes [4, 6, 6] of zeros and ones, in the order of ``SHAPES``."""
    centre = (_OBJECT_SIZE - 1) / 2
    rows, columns = np.mgrid[:_OBJECT_SIZE, :_OBJECT_SIZE] - centre
    square = np.ones_like(rows, dtype=bool)
    circle = rows**2 + columns**2 <= centre**2 + 1
    cross = (abs(rows) < 1) | (abs(columns) < 1)
    triangle = abs(columns) <= (rows + centre) / 2 + 0.5
    return np.stack([square, circle, cross, triangle]).astype(np.float32)

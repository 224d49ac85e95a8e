"""Pictures of the grid worlds: flat shapes seen from above, cubes seen in perspective.

Both put together sprites drawn once, so a batch of pictures costs a look-up and not a rendering:
a flat object fills its own cell, and what a cube looks like depends on its cell alone. Where cubes
hide one another the nearer is put on top (the painter's algorithm, exact for equal cubes that
stand on different cells).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

IMAGE_SIZE = 50
_SAMPLES = 4  # per pixel and axis, for smooth edges
_SIDE = 0.84  # of a cube; a cell's is 1
_FACE_LIGHT = (0.72, 0.5, 1.0)  # of faces across the rows, across the columns, and on top

COLOURS = np.array(
    [
        (0.90, 0.22, 0.21),
        (0.20, 0.63, 0.30),
        (0.16, 0.44, 0.86),
        (0.96, 0.77, 0.17),
        (0.62, 0.30, 0.75),
        (0.15, 0.74, 0.76),
        (0.95, 0.52, 0.16),
        (0.93, 0.56, 0.75),
    ]
)
"""One colour for each object, red, green and blue in [0, 1]; at most so many objects."""


class ShapesRenderer(nn.Module):
    """Flat shapes on black, each in its own form and colour, seen from above.

    Positions [..., K, 2] to images [..., 3, S, S] float32 in [0, 1]; S = ``IMAGE_SIZE``.

    Args:
        objects: K.
        grid: cells along each side; divides S.

    Raises:
        ValueError: more objects than colours, or a grid that does not divide S.
    """

    tiles: torch.Tensor

    def __init__(self, objects: int = 5, grid: int = 5):
        super().__init__()
        _check_world(objects, grid)
        if IMAGE_SIZE % grid:
            raise ValueError(f"grid: expected a divisor of {IMAGE_SIZE}, got {grid}")
        self.grid = grid
        tiles = np.stack([_shape(index, IMAGE_SIZE // grid) for index in range(objects)])
        self.register_buffer("tiles", torch.from_numpy(tiles.astype(np.float32)), persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Draw; positions of any integer dtype, on this module's device."""
        cells = _cells(positions, self.grid)
        count = len(cells)
        size = self.tiles.shape[-1]
        board = self.tiles.new_zeros(count, self.grid**2, 3, size, size)
        board[torch.arange(count, device=cells.device)[:, None], cells] = self.tiles
        board = board.view(count, self.grid, self.grid, 3, size, size).permute(0, 3, 1, 4, 2, 5)
        return board.reshape(*positions.shape[:-2], 3, IMAGE_SIZE, IMAGE_SIZE)


class CubesRenderer(nn.Module):
    """Cubes of different colours on a white ground, in perspective, from above one corner.

    Positions [..., K, 2] to images [..., 3, S, S] float32 in [0, 1]; S = ``IMAGE_SIZE``.

    Args:
        objects: K.
        grid: cells along each side.

    Raises:
        ValueError: more objects than colours.
    """

    light: torch.Tensor
    cover: torch.Tensor
    nearness: torch.Tensor
    colours: torch.Tensor

    def __init__(self, objects: int = 5, grid: int = 5):
        super().__init__()
        _check_world(objects, grid)
        self.grid = grid
        light, cover, nearness = _cube_sprites(grid)
        for name, table in (
            ("light", light[:, None]),
            ("cover", cover[:, None]),
            ("nearness", nearness),
            ("colours", COLOURS[:objects, :, None, None]),
        ):
            buffer = torch.from_numpy(table.astype(np.float32))
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Draw; positions of any integer dtype, on this module's device."""
        cells = _cells(positions, self.grid)
        count = len(cells)
        order = self.nearness[cells].argsort(dim=1)  # the farthest first
        image = self.light.new_ones(count, 3, IMAGE_SIZE, IMAGE_SIZE)
        for turn in order.unbind(1):
            cell = cells.gather(1, turn[:, None]).squeeze(1)
            # a sprite's light is already weighed with its cover
            image = image * (1 - self.cover[cell]) + self.light[cell] * self.colours[turn]
        return image.reshape(*positions.shape[:-2], 3, IMAGE_SIZE, IMAGE_SIZE)


WORLDS: dict[str, Callable[[], nn.Module]] = {"shapes": ShapesRenderer, "cubes": CubesRenderer}
"""Renderers of the two worlds by name."""


def _check_world(objects: int, grid: int) -> None:
    if not 1 <= objects <= len(COLOURS) or grid < 1:
        raise ValueError(
            f"objects and grid: expected from 1 to {len(COLOURS)} and at least 1, "
            f"got {objects} and {grid}"
        )


def _cells(positions: torch.Tensor, grid: int) -> torch.Tensor:
    """Positions [..., K, 2] as cell numbers [B, K]."""
    rows, columns = positions.long().unbind(-1)
    return (rows * grid + columns).reshape(-1, positions.shape[-2])


def _shape(index: int, size: int) -> np.ndarray:
    """A shape [3, size, size]: disc, triangle, square, diamond, cross, then the same again."""
    fine = (np.arange(size * _SAMPLES) + 0.5) / (size * _SAMPLES) * 2 - 1
    y, x = np.meshgrid(fine, fine, indexing="ij")
    inside = [
        x**2 + y**2 < 0.81,
        (np.abs(x) < (y + 0.9) / 2) & (y < 0.9),
        np.maximum(np.abs(x), np.abs(y)) < 0.8,
        np.abs(x) + np.abs(y) < 0.95,
        (np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 0.9),
    ][index % 5]
    return _averaged(inside) * COLOURS[index][:, None, None]


def _averaged(fine: np.ndarray) -> np.ndarray:
    """Means over the samples of each pixel: [..., S m, S m] to [..., S, S]."""
    *rest, height, width = fine.shape
    blocks = fine.reshape(*rest, height // _SAMPLES, _SAMPLES, width // _SAMPLES, _SAMPLES)
    return blocks.mean(axis=(-3, -1))


def _cube_sprites(grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One cube on every cell by ray casting: light [C, S, S], cover [C, S, S], nearness [C].

    Every ray meets every box by the slab test; the face that it enters through gives the light.
    Cells have side 1, cubes stand in their middles.
    """
    eye = np.array([1.55, -0.75, 1.45]) * grid  # above the near left corner
    centre = np.array([grid / 2 - 0.1, grid / 2 + 0.1, 0.0])
    forward = (centre - eye) / np.linalg.norm(centre - eye)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    fine = (np.arange(IMAGE_SIZE * _SAMPLES) + 0.5) / (IMAGE_SIZE * _SAMPLES) * 2 - 1
    v, u = np.meshgrid(fine, fine, indexing="ij")
    spread = 0.38  # tangent of half the angle of view
    rays = forward + spread * (u[..., None] * right + v[..., None] * down)

    rows, columns = np.divmod(np.arange(grid**2), grid)
    low = np.stack([rows, columns, np.zeros(grid**2)], axis=1)
    low[:, :2] += (1 - _SIDE) / 2
    to_low, to_high = low[:, None, None] - eye, low[:, None, None] + _SIDE - eye
    enters = np.minimum(to_low / rays, to_high / rays)
    leaves = np.maximum(to_low / rays, to_high / rays)
    hit = enters.max(axis=-1) < leaves.min(axis=-1)
    light = hit * np.array(_FACE_LIGHT)[enters.argmax(axis=-1)]
    nearness = -np.linalg.norm(low + _SIDE / 2 - eye, axis=1)
    return _averaged(light), _averaged(hit), nearness

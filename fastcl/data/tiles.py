"""Jigsaw puzzles: images cut into tiles, and permutations that are easy to tell apart."""

from __future__ import annotations

import itertools

import numpy as np
import torch

_CANDIDATES = 20000  # permutations that each greedy choice looks at, of those of nine tiles


def select_permutations(tiles: int, count: int, seed: int = 0) -> torch.Tensor:
    """``count`` permutations of ``tiles`` positions, far apart in Hamming distance.

    Greedy: the next is the candidate whose distance to the nearest one chosen so far is largest
    (the first is drawn). Up to seven tiles every permutation is a candidate, above that 20000
    drawn ones.

    Returns:
        [count, tiles] int64, row r the source of every place.

    Raises:
        ValueError: ``count`` is not from 1 to tiles!.

    Source: Noroozi and Favaro 2016, "Unsupervised Learning of Visual Representations by Solving
    Jigsaw Puzzles", algorithm 1.
    """
    generator = np.random.default_rng(seed)
    most = int(np.prod(np.arange(1, tiles + 1)))
    if not 1 <= count <= min(most, _CANDIDATES):
        raise ValueError(
            f"permutations: expected from 1 to {min(most, _CANDIDATES)} of {tiles} tiles, "
            f"got {count}"
        )
    if most <= _CANDIDATES:
        candidates = np.array(list(itertools.permutations(range(tiles))))
    else:
        drawn = [generator.permutation(tiles) for _ in range(_CANDIDATES)]
        candidates = np.unique(np.array(drawn), axis=0)
    nearest = np.full(len(candidates), tiles + 1)
    chosen = [int(generator.integers(len(candidates)))]
    while len(chosen) < count:
        nearest = np.minimum(nearest, (candidates != candidates[chosen[-1]]).sum(1))
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return torch.from_numpy(candidates[chosen])


def cut_tiles(images: torch.Tensor, grid: int, tile: int, *, jitter: bool = True) -> torch.Tensor:
    """Cut images [B, C, H, W] into grid x grid cells and a tile out of each.

    Tiles are normalised one by one to mean 0 and variance 1, or brightness and contrast would
    betray which cells are neighbours.

    Args:
        grid: cells per side; H and W are cut to a multiple.
        tile: side of the tiles, at most that of a cell.
        jitter: a tile's place in its cell is drawn from PyTorch's global generator, for each cell
            and image, so that edges do not continue from tile to tile; else the middle.

    Returns:
        [B, grid * grid, C, tile, tile], row by row.

    Raises:
        ValueError: tiles larger than cells.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // grid, width // grid
    if not 1 <= tile <= min(rows, columns):
        raise ValueError(
            f"tile: expected from 1 to {min(rows, columns)} (a cell of images of {height} x "
            f"{width}), got {tile}"
        )
    cells = images[:, :, : grid * rows, : grid * columns]
    cells = cells.unflatten(2, (grid, rows)).unflatten(4, (grid, columns))
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, rows, columns)
    if jitter:
        top = torch.randint(rows - tile + 1, (len(cells),), device=images.device)
        left = torch.randint(columns - tile + 1, (len(cells),), device=images.device)
    else:
        top = torch.full((len(cells),), (rows - tile) // 2, device=images.device)
        left = torch.full_like(top, (columns - tile) // 2)
    span = torch.arange(tile, device=images.device)
    which = torch.arange(len(cells), device=images.device)[:, None, None]
    tiles = cells.permute(0, 2, 3, 1)[
        which, (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
    ].permute(0, 3, 1, 2)
    mean = tiles.mean((1, 2, 3), keepdim=True)
    # an empty tile has no contrast; it stays zero
    deviation = tiles.std((1, 2, 3), keepdim=True).clamp_min(1e-3)
    return ((tiles - mean) / deviation).unflatten(0, (batch, grid * grid))

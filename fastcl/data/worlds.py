"""The grid worlds of C-SWM: objects that one action at a time pushes about, and their pictures.

Five objects stand on different cells of a 5 x 5 grid. An action names an object and a direction;
the object moves one cell unless a wall or another object is in its way. Only positions are
stored: a picture is a function of them (:mod:`fastcl.data.render`) and is drawn when it is needed,
on the device, a batch at a time.

Source: Kipf, van der Pol and Welling 2020, "Contrastive Learning of Structured World Models",
section 4.1 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

OBJECTS = 5
GRID = 5
DIRECTIONS = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
"""Row and column steps of the four directions: up, right, down, left."""


@dataclass(frozen=True)
class Episodes:
    """E episodes of T random actions each.

    ``positions`` [E, T + 1, K, 2] int64, row and column of every object before each action and at
    the end; ``actions`` [E, T] int64 in [0, 4 K): 4 times the object plus the direction.
    """

    positions: torch.Tensor
    actions: torch.Tensor

    def transitions(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Every step of every episode: positions [E T, K, 2], actions [E T], positions after."""
        return (
            self.positions[:, :-1].flatten(0, 1),
            self.actions.flatten(),
            self.positions[:, 1:].flatten(0, 1),
        )


def random_episodes(
    episodes: int, steps: int, seed: int, *, objects: int = OBJECTS, grid: int = GRID
) -> Episodes:
    """Episodes of uniformly random actions from uniformly random starts.

    Args:
        episodes: E.
        steps: T, actions in each.
        seed: of starts and actions.
        objects: K, on different cells.
        grid: cells along each side.

    Raises:
        ValueError: a count below 1, or more objects than cells.
    """
    if min(episodes, steps, objects, grid) < 1 or objects > grid**2:
        raise ValueError(
            "episodes, steps, objects, grid: expected integers >= 1 and at most grid^2 objects, "
            f"got {episodes}, {steps}, {objects}, {grid}"
        )
    generator = np.random.default_rng(seed)
    cells = generator.random((episodes, grid**2)).argsort(axis=1)[:, :objects]
    positions = np.empty((episodes, steps + 1, objects, 2), dtype=np.int64)
    positions[:, 0] = np.stack(np.divmod(cells, grid), axis=-1)
    actions = generator.integers(0, len(DIRECTIONS) * objects, (episodes, steps))
    for step in range(steps):
        positions[:, step + 1] = move(positions[:, step], actions[:, step], grid)
    return Episodes(torch.from_numpy(positions), torch.from_numpy(actions))


def move(positions: np.ndarray, actions: np.ndarray, grid: int = GRID) -> np.ndarray:
    """Positions [E, K, 2] after actions [E]; an object that meets a wall or another one stays."""
    rows = np.arange(len(positions))
    moved, direction = np.divmod(actions, len(DIRECTIONS))
    target = positions[rows, moved] + DIRECTIONS[direction]
    taken = (positions == target[:, None]).all(axis=-1).any(axis=1)
    blocked = taken | (target < 0).any(axis=1) | (target >= grid).any(axis=1)
    after = positions.copy()
    after[rows, moved] = np.where(blocked[:, None], positions[rows, moved], target)
    return after

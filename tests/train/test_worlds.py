"""The worlds of C-SWM, their pictures, the encoder of objects and the graph network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcl.data.render import COLOURS, CubesRenderer, ShapesRenderer
from fastcl.data.worlds import move, random_episodes
from fastcl.encoders import ObjectEncoder, TransitionGNN
from fastcl.evaluation.ranking import hits_at, mean_reciprocal_rank, ranks_by_distance

UP, RIGHT, DOWN, LEFT = range(4)


@pytest.mark.parametrize(
    ("thing", "direction", "expected"),
    [
        (0, UP, (0, 1)),  # a wall
        (0, DOWN, (0, 1)),  # another object
        (0, RIGHT, (0, 2)),
        (0, LEFT, (0, 0)),
        (1, DOWN, (2, 1)),
        (2, RIGHT, (4, 4)),  # walls on the far sides
        (2, DOWN, (4, 4)),
        (2, LEFT, (4, 3)),
    ],
)
def test_an_object_moves_one_cell_unless_something_is_there(thing, direction, expected):
    positions = np.array([[(0, 1), (1, 1), (4, 4)]])
    after = move(positions, np.array([4 * thing + direction]))
    assert tuple(after[0, thing]) == expected
    others = [i for i in range(3) if i != thing]
    assert np.array_equal(after[0, others], positions[0, others])


def test_episodes_are_legal_varied_and_repeatable():
    episodes = random_episodes(200, 20, seed=3)
    positions = episodes.positions
    assert positions.shape == (200, 21, 5, 2)
    assert episodes.actions.shape == (200, 20)
    assert episodes.actions.unique().tolist() == list(range(20))
    cells = 5 * positions[..., 0] + positions[..., 1]
    assert all(len(set(row)) == 5 for row in cells.flatten(0, 1).tolist())
    assert cells[:, 0].flatten().unique().tolist() == list(range(25))
    moved = (positions.diff(dim=1).abs().sum(-1) > 0).nonzero()
    assert torch.equal(moved[:, 2], episodes.actions[moved[:, 0], moved[:, 1]] // 4)
    assert 0.5 < len(moved) / 4000 < 0.9  # the others ran into something
    before, actions, after = episodes.transitions()
    assert torch.equal(before[25], episodes.positions[1, 5])
    assert torch.equal(after[25], episodes.positions[1, 6])
    assert actions[25] == episodes.actions[1, 5]
    assert torch.equal(random_episodes(200, 20, seed=3).positions, episodes.positions)
    assert not torch.equal(random_episodes(200, 20, seed=4).positions, episodes.positions)


def test_shapes_fill_their_own_cells_with_their_own_colours():
    positions = torch.tensor([[(0, 0), (0, 4), (2, 2), (3, 1), (4, 4)]])
    image = ShapesRenderer()(positions)[0]
    cells = image.unfold(1, 10, 10).unfold(2, 10, 10)  # [3, 5, 5, 10, 10]
    lit = (cells.amax((0, 3, 4)) > 0).nonzero().tolist()
    assert lit == sorted(positions[0].tolist())
    for index, (row, column) in enumerate(positions[0].tolist()):
        centre = cells[:, row, column, 4, 4].double()
        torch.testing.assert_close(centre, torch.from_numpy(COLOURS[index]), atol=1e-6, rtol=0)
    masks = [cells[:, r, c].amax(0) > 0 for r, c in positions[0].tolist()]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 5


def shown(image, index):
    """Where the colour of object ``index``, in any light, is seen: [H, W]."""
    colour = torch.from_numpy(COLOURS[index]).float()
    light = (image * colour[:, None, None]).sum(0) / colour.square().sum()
    return (image - light * colour[:, None, None]).abs().amax(0) < 0.02


def test_nearer_cubes_are_larger_lower_and_hide_farther_ones():
    draw = CubesRenderer()
    far, near = draw(torch.tensor([[(0, 4), (4, 4)], [(4, 0), (4, 4)]]))
    assert shown(near, 0).sum() > 1.5 * shown(far, 0).sum()
    rows = [shown(image, 0).nonzero()[:, 0].float().mean() for image in (far, near)]
    assert rows[1] > rows[0] + 20
    alone, behind, before = draw(
        torch.tensor([[(2, 2), (0, 4)], [(2, 2), (3, 1)], [(2, 2), (1, 3)]])
    )
    whole = shown(alone, 0).sum()
    assert shown(behind, 0).sum() < 0.9 * whole
    assert shown(before, 0).sum() == whole
    # every cell has a picture of its own, inside the image
    cells = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"), -1)
    each = CubesRenderer(objects=1)(cells.view(25, 1, 2))
    assert len({tuple(image.flatten().tolist()) for image in each}) == 25
    assert (each[:, :, [0, -1]] == 1).all()
    assert (each[..., [0, -1]] == 1).all()


def test_parameters_are_as_many_as_published():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    transition, encoder = TransitionGNN(), ObjectEncoder()
    assert count(transition) == 1_059_330
    assert count(transition) + count(encoder) == 1_347_209


@torch.no_grad()
def test_an_action_reaches_its_object_and_the_others_through_edges_alone():
    torch.manual_seed(0)
    transition = TransitionGNN(hidden_features=16)
    states = torch.randn(3, 4, 2)
    actions = torch.tensor([2 * 4 + 1, 0, 15])
    changes = transition(states, actions)
    # the same action on another object changes these two objects' changes and no other's
    other = transition(states, torch.tensor([3 * 4 + 1, 0, 15]))
    differs = (other - changes).abs().amax(2) > 0
    assert differs.tolist() == [[False, False, True, True], [False] * 4, [False] * 4]
    # objects are a set: in another order, with the action following its object, nothing changes
    order = torch.tensor([2, 0, 3, 1])
    moved = 4 * order.argsort()[actions // 4] + actions % 4
    torch.testing.assert_close(transition(states[:, order], moved), changes[:, order])
    # a message is summed over the pairs that begin at the object: the sum, written out
    first = states[1]
    pairs = [torch.cat([first[0], first[j]]) for j in (1, 2, 3)]
    action = torch.tensor([1.0, 0, 0, 0])
    message = sum(transition.edge(pair) for pair in pairs)
    expected = transition.node(torch.cat([first[0], action, message]))
    torch.testing.assert_close(changes[1, 0], expected)


@pytest.mark.parametrize("form", ["small", "medium"])
def test_object_encoder_makes_states_and_says_what_fits(form):
    encoder = ObjectEncoder(form, objects=3, state_dim=4, width=4, hidden_features=8)
    assert encoder(torch.rand(2, 3, 50, 50)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, 50, 50\], got \[2, 1"):
        encoder(torch.rand(2, 1, 50, 50))
    with pytest.raises(ValueError, match=r"expected \[B, K, 4\] and \[B\], got \[2, 3, 2\]"):
        TransitionGNN(4, hidden_features=8)(torch.rand(2, 3, 2), torch.zeros(2, dtype=torch.long))


def test_arguments_of_worlds_are_checked():
    with pytest.raises(ValueError, match="form: expected one of small, medium, got 'large'"):
        ObjectEncoder("large")
    with pytest.raises(ValueError, match=r"at most grid\^2 objects, got 1, 1, 5, 2"):
        random_episodes(1, 1, 0, grid=2)
    with pytest.raises(ValueError, match="objects and grid: expected from 1 to 8"):
        CubesRenderer(objects=9)
    with pytest.raises(ValueError, match="grid: expected a divisor of 50, got 7"):
        ShapesRenderer(grid=7)


def test_ranks_count_references_that_are_not_farther_among_all():
    torch.manual_seed(0)
    references = 100 + torch.randn(70, 3, dtype=torch.float64)
    predictions = references + 0.5 * torch.randn(70, 3, dtype=torch.float64)
    expected = [
        sum((p - r).norm() <= (p - references[i]).norm() for r in references)
        for i, p in enumerate(predictions)
    ]
    # chunks that do not divide the rows
    assert ranks_by_distance(predictions, references, chunk_size=32).tolist() == expected
    # saying the same of everything, or nothing, is as bad as can be
    same = torch.zeros(5, 2)
    assert ranks_by_distance(same, same).tolist() == [5] * 5
    assert ranks_by_distance(same * float("nan"), same).tolist() == [5] * 5
    # far from the origin, squares would cancel in float32
    far = 1000 + torch.randn(60, 2)
    assert ranks_by_distance(far + 1e-3 * torch.randn(60, 2), far).tolist() == [1] * 60
    ranks = torch.tensor([1, 2, 4, 1])
    assert hits_at(ranks, 1) == 0.5
    assert hits_at(ranks, 2) == 0.75
    assert mean_reciprocal_rank(ranks) == pytest.approx((1 + 0.5 + 0.25 + 1) / 4)
    with pytest.raises(ValueError, match=r"two matrices \[N, D\], got \[5, 2\] and \[4, 2\]"):
        ranks_by_distance(same, same[:4])

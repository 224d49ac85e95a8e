"""Distributed losses among the things that people train with."""

import pytest


def test_gradients_are_one_processs(launch):
    """no_sync under DDP, two losses in one backward, FSDP2, torch.compile; 6, 6 and 1 rows."""
    for errors in launch("training", 3):
        assert len(errors) == 8
        assert max(errors.values()) < 1e-10, errors


def test_a_group_of_some_ranks(launch):
    first, outsider, last = launch("subgroup", 3, "ring")
    assert outsider is None
    assert max(*first, *last) < 1e-12


def test_memory_of_a_ring_does_not_grow_with_the_ranks(launch):
    """From 6 ranks on each rank takes part in everything that a longer ring does."""
    found = launch("peaks", 8)[0]
    assert found["ring", 6] == pytest.approx(found["ring", 8], rel=0.02)
    assert found["ring", 8] < 9
    assert found["gather", 8] > found["gather", 6] + 3  # the measurement sees what it should

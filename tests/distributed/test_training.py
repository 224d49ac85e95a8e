"""Distributed losses among the things that people train with."""

import pytest


def test_gradients_and_memory(launch):
    training, subgroup, peaks = launch(("training", 3), ("subgroup", 3, "ring"), ("peaks", 8))

    # no_sync under DDP, two losses in one backward, keys without a gradient, FSDP2,
    # torch.compile; 6, 6 and 1 rows
    for errors in training:
        assert len(errors) == 10
        assert max(errors.values()) < 1e-10, errors

    # a group of some ranks
    first, outsider, last = subgroup
    assert outsider is None
    assert max(*first, *last) < 1e-12

    # a ring's memory does not grow: from 6 ranks on each takes part in all that more do
    found = peaks[0]
    assert found["ring", 6] == pytest.approx(found["ring", 8], rel=0.02)
    assert found["ring", 8] < 9
    assert found["gather", 8] > found["gather", 6] + 3  # the measurement sees what it should

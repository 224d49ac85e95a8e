"""A rank that fails or disagrees ends the others with one sentence that says so."""

import time

import pytest


def test_ranks_that_disagree(launch):
    for messages in launch("disagree", 3):
        assert messages == {
            what: f"the ranks disagree on this loss: rank 0 has {usual}; rank 1 has {usual}; "
            f"rank 2 has {other}; expected the same on each"
            for what, usual, other in (
                ("width", "width 6", "width 7"),
                ("dtype", "dtype float32, precision float32", "dtype float64, precision float64"),
                ("mode", "distributed ring", "distributed gather"),
                ("ids", "ids None", "ids a tensor"),
                ("temperature", "scale 10.0", "scale 5.0"),
            )
        }


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_a_rank_that_is_killed_is_named(launch, mode):
    started = time.monotonic()
    messages = launch("lose_one", 4, mode, 2, "kill")
    assert time.monotonic() - started < 30
    assert messages.pop(2) is None
    for message in messages:
        assert message.startswith("RuntimeError: ")
        assert message.endswith("of 4: rank 2 ended or did not answer")


def test_a_rank_that_hangs_is_named_after_the_timeout(launch):
    first, _, last = launch("lose_one", 3, "ring", 1, "hang")
    for message in (first, last):
        assert message.endswith("of 3: rank 1 ended or did not answer")

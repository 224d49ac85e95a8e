"""A rank that fails or disagrees ends the others with one sentence that says so."""

import time

LOSS, QUEUE = "come for a 'ring' loss", "come for keys that enter a queue"


def test_ranks_that_disagree(launch):
    (ranks,) = launch(("disagree", 3))
    respects = {
        "width": ("width 6", "width 7"),
        "dtype": ("dtype float32, precision float32", "dtype float64, precision float64"),
        "mode": (LOSS, "come for a 'gather' loss"),
        "ids": ("ids None", "ids a tensor"),
        "temperature": ("scale 10.0", "scale 5.0"),
        "gradient": ("gradient of keys True", "gradient of keys False"),
        "queue": ("size 9", "size 8"),
        "call": (QUEUE, LOSS),
        "bank": ("first feature ", "first feature "),
    }
    for messages in ranks:
        assert set(messages) == set(respects)
        for what, (usual, other) in respects.items():
            parts = messages[what].removeprefix("the ranks disagree: ").split("; ")
            assert parts.pop() == "expected the same on each"
            for rank, (part, fact) in enumerate(zip(parts, (usual, usual, other), strict=True)):
                assert part.startswith(f"rank {rank}: {fact}")


def test_a_rank_that_dies_is_named(launch):
    """Killed in a sweep or an enqueue: at once. Hanging: after the group's timeout of 6 s."""
    started = time.monotonic()
    jobs = [("lose_one", 4, where, 2, "kill") for where in ("gather", "ring", "queue")]
    for messages in launch(*jobs, ("lose_one", 4, "ring", 2, "hang")):
        assert messages.pop(2) is None
        for message in messages:
            assert message.startswith("RuntimeError: ")
            assert message.endswith("of 4: rank 2 ended or did not answer")
    assert time.monotonic() - started < 60  # whoever waited for the killed would take 100 s

"""Queues, banks and shuffles over several ranks, unequal batches included."""


def test_sharded_gathered_and_single_process_agree(launch):
    for results in launch(("agreement", 2), ("agreement", 3)):
        assert set(results) == {"all equal"}

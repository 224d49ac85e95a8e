"""Across ranks: unequal batches, the global batch's gradient, the mean of what ranks report."""

import pytest
import torch


def test_ranks(launch):
    (alone,), shared, banks = launch(("trained", 1), ("trained", 2), ("banked", 2))
    for name, (value, gradient) in alone.items():
        values = torch.stack([found[name][0] for found in shared])
        assert float(values.mean()) == pytest.approx(float(value), rel=1e-9), name
        if name == "clip":  # without local_loss every rank reports the global mean
            torch.testing.assert_close(values, value.expand(2))
        for found in shared:
            torch.testing.assert_close(found[name][1], gradient, rtol=1e-9, atol=1e-12)
    expected = torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None].expand(4, 2)
    assert all(torch.equal(bank, expected) for bank in banks)

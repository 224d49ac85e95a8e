"""Splits, batches and views."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcl.data import RECIPES, Augment, EpochShuffledBatches, TwoViews, load_digit_splits


def test_splits_are_disjoint_complete_and_stratified():
    for seed in (0, 1):
        splits = load_digit_splits(seed)
        parts = (splits.train, splits.validation, splits.test)
        assert [len(part) for part in parts] == [1257, 180, 360]
        indices = np.concatenate([part.indices for part in parts])
        assert np.array_equal(np.sort(indices), np.arange(1797))
        for part in parts:
            share = torch.bincount(part.labels, minlength=10) / len(part)
            assert (share - 0.1).abs().max() < 0.01
            assert part.images.shape == (len(part), 1, 8, 8)
            assert part.images.dtype == torch.float32
            assert part.images.min() == 0
            assert part.images.max() == 1


def test_only_training_and_validation_depend_on_the_seed():
    zero, again, one = load_digit_splits(0), load_digit_splits(0), load_digit_splits(1)
    assert np.array_equal(zero.train.indices, again.train.indices)
    assert not np.array_equal(zero.validation.indices, one.validation.indices)
    assert np.array_equal(zero.test.indices, one.test.indices)


def test_batches_are_a_permutation_that_depends_on_seed_and_epoch_only():
    images = torch.arange(23)

    def epoch(batches, number):
        batches.set_epoch(number)
        return torch.cat(list(batches))

    batches = EpochShuffledBatches(images, 5, seed=3)
    assert len(batches) == 4
    assert [len(batch) for batch in batches] == [5, 5, 5, 5]
    orders = [epoch(batches, number) for number in (0, 1, 0)]
    assert len(orders[0].unique()) == 20
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], epoch(EpochShuffledBatches(images, 5, seed=4), 0))


def test_batches_of_several_tensors_stay_together():
    parts = (torch.arange(23), torch.arange(23) * 2)
    for numbers, doubles in EpochShuffledBatches(parts, 5, seed=3):
        assert torch.equal(2 * numbers, doubles)
    with pytest.raises(ValueError, match=r"data: expected tensors of one length, got \[23, 22\]"):
        EpochShuffledBatches((parts[0], parts[1][1:]), 5, seed=3)


@pytest.mark.parametrize("batch_size", [1, 24])
def test_batch_size_out_of_range(batch_size):
    with pytest.raises(ValueError, match=r"batch_size: expected from 2 to 23 .*got"):
        EpochShuffledBatches(torch.arange(23), batch_size, seed=0)


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        ("digits", (6, 1, 8, 8)),
        ("digits", (3, 1, 28, 20)),
        ("simclr", (4, 3, 32, 32)),
        ("moco_v1", (4, 3, 32, 32)),
        ("moco_v2", (4, 3, 96, 96)),
        ("plain", (4, 1, 16, 16)),
        ("plain", (4, 3, 16, 16)),
    ],
)
def test_views_shape_values_and_reproducibility(recipe, shape):
    torch.manual_seed(0)
    images = torch.rand(shape)
    before = images.clone()
    views = TwoViews(recipe, shape[2:])
    torch.manual_seed(1)
    first, second = views(images)
    torch.manual_seed(1)
    first_again, second_again = views(images)
    assert torch.equal(images, before)
    for view, again in ((first, first_again), (second, second_again)):
        assert view.shape == shape
        assert view.dtype == images.dtype
        assert view.isfinite().all()
        assert torch.equal(view, again)
    # Every image gets its own parameters, and each view its own.
    assert all(not torch.equal(*pair) for pair in zip(first, second, strict=True))
    same = views(images[:1].expand(shape))[0]
    assert len({tuple(image.flatten().tolist()) for image in same}) == len(same)


def test_mixed_precision_does_not_move_pixels():
    """A rotation in bfloat16 reads other pixels; `plain` turns and crops, `digits` warps."""
    for recipe, shape in (("plain", (2, 3, 96, 96)), ("digits", (4, 1, 8, 8))):
        views, images = TwoViews(recipe, shape[2:]), torch.rand(shape)
        torch.manual_seed(1)
        exact = torch.cat(views(images))
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = torch.cat(views(images))
        torch.testing.assert_close(mixed, exact, rtol=0, atol=0)


def test_bytes_become_fractions_and_one_view_is_one_view():
    bytes_ = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    torch.manual_seed(0)
    first = Augment("plain", (8, 8))(bytes_)
    torch.manual_seed(0)
    assert torch.equal(first, Augment("plain", (8, 8))(bytes_.float() / 255))
    assert first.shape == (4, 1, 8, 8)
    assert first.max() < 2


def test_views_keep_what_the_digit_shows():
    """A view is nearer to its own image than to most others, or it would teach nothing."""
    images = load_digit_splits(0).validation.images
    torch.manual_seed(0)
    first, _ = TwoViews("digits", (8, 8))(images)
    rank = (torch.cdist(first.flatten(1), images.flatten(1)).argsort().argsort()).diagonal()
    assert rank.float().median() < 0.1 * len(images)
    assert first.min() > -1
    assert first.max() < 2


def test_recipe_names_are_checked():
    assert set(RECIPES) == {"digits", "moco_v1", "moco_v2", "plain", "simclr"}
    with pytest.raises(ValueError, match=r"recipe: expected one of digits, .*, got 'mnist'"):
        TwoViews("mnist", (8, 8))


@pytest.mark.parametrize(
    ("recipe", "images", "message"),
    [
        ("digits", torch.rand(8, 8), r"expected floating-point or uint8 \[B, C, H, W\]"),
        ("digits", torch.ones(2, 1, 8, 8, dtype=torch.int64), r"got torch.int64"),
        ("simclr", torch.rand(2, 1, 8, 8), "expects 3 colour channels, got 1"),
    ],
)
def test_images_are_checked(recipe, images, message):
    with pytest.raises(ValueError, match=message):
        TwoViews(recipe, (8, 8))(images)

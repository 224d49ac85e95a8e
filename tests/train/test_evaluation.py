"""kNN monitor, linear probe, features, figures."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from torch import nn

from fastcl.data import load_digit_splits
from fastcl.encoders import MLPHead, SmallCNN
from fastcl.evaluation import (
    calibrate_batch_norm,
    extract_features,
    figures,
    knn_accuracy,
    knn_predict,
    linear_probe,
)


def known_answer_rows():
    k = torch.arange(1, 13, dtype=torch.float64)
    j = torch.arange(1, 16, dtype=torch.float64)
    a = torch.sin(k).reshape(4, 3)
    b = a + 0.5 * torch.cos(k / 2).reshape(4, 3)
    q = torch.cos(j / 3).reshape(5, 3)
    return a, b, q


@pytest.mark.parametrize("chunk_size", [1, 4096])
def test_knn_known_answer(chunk_size):
    a, b, q = known_answer_rows()
    bank = torch.cat([F.normalize(b, dim=1), F.normalize(q, dim=1)])
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0, 1])
    predictions, scores = knn_predict(a, bank, labels, k=3, chunk_size=chunk_size)
    assert predictions.tolist() == [0, 0, 1, 1]
    expected = torch.tensor([21329.949451, 13015.890622, 5200.193314], dtype=torch.float64)
    torch.testing.assert_close(scores[0], expected, rtol=1e-9, atol=0)
    in_single = knn_predict(a.float(), bank.float(), labels, k=3)[1]
    torch.testing.assert_close(in_single[0].double(), expected, rtol=2e-5, atol=0)


def test_knn_clips_k_and_is_right_on_its_own_bank():
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20)
    assert knn_accuracy(rows, labels, rows, labels, k=10**6, temperature=0.01) == 1.0
    assert knn_predict(rows, rows, labels, k=1, num_classes=30)[1].shape == (20, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank": torch.rand(4, 2)}, r"expected \[N, D\] and \[M >= 1, D\]"),
        ({"bank_labels": torch.zeros(3, dtype=torch.long)}, r"bank_labels: expected shape \[4\]"),
        ({"k": 0}, "k: expected an integer >= 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a number > 0"),
    ],
)
def test_knn_arguments_are_checked(change, message):
    arguments = {
        "queries": torch.rand(2, 3),
        "bank": torch.rand(4, 3),
        "bank_labels": torch.zeros(4, dtype=torch.long),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        knn_predict(**arguments)


def probe_digits(labels_per_class, transform=lambda rows: rows, **options):
    splits = load_digit_splits(0)
    return linear_probe(
        transform(splits.train.images.flatten(1).numpy()),
        splits.train.labels.numpy(),
        transform(splits.validation.images.flatten(1).numpy()),
        splits.validation.labels.numpy(),
        labels_per_class=labels_per_class,
        **options,
    )


def test_probe_beats_chance_and_gains_from_labels():
    few, more, every = (probe_digits(n, draws=3) for n in (1, 10, None))
    assert 0.4 < few < more < every
    assert every > 0.93


def test_probe_is_reproducible_and_ignores_offset_and_scale():
    once = probe_digits(5, draws=2, seed=1)
    assert probe_digits(5, draws=2, seed=1) == once
    assert probe_digits(5, draws=2, seed=2) != once
    moved = probe_digits(5, lambda rows: 1000 * rows.astype(np.float64) + 7, draws=2, seed=1)
    assert moved == pytest.approx(once, abs=0.006)


def test_probe_knows_nothing_when_features_say_nothing():
    noise = np.random.default_rng(0)
    accuracy = probe_digits(10, lambda rows: noise.normal(size=(len(rows), 8)), draws=3)
    assert accuracy < 0.2
    assert probe_digits(1, np.zeros_like, draws=1) <= 0.12


def test_probe_arguments_are_checked():
    with pytest.raises(ValueError, match=r"labels_per_class: expected from 1 to \d+ .*, got 500"):
        probe_digits(500)
    with pytest.raises(ValueError, match="draws: expected an integer >= 1, got 0"):
        probe_digits(1, draws=0)
    rows = np.zeros((4, 2))
    with pytest.raises(ValueError, match="train_features and train_labels: expected"):
        linear_probe(rows, np.zeros(3), rows, np.zeros(4), labels_per_class=None)


def test_calibrated_batch_norm_standardises_the_inputs_it_saw():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=0.3))
    inputs = 5 + 2 * torch.rand(64, 1, 8, 8)
    weight = network[0].weight.clone()
    calibrate_batch_norm(network, inputs)
    features = extract_features(network, inputs)
    torch.testing.assert_close(features.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert network.training
    assert network[1].momentum == 0.3
    assert torch.equal(network[0].weight, weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_extract_features_brings_images_to_the_encoders_dtype(dtype):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(dtype)
    for images in (torch.rand(5, 1, 2, 2), torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8)):
        assert extract_features(encoder, images).dtype == dtype
    ids = torch.randint(0, 4, (5, 2))  # of tokens, which are no numbers to convert
    assert extract_features(nn.Embedding(4, 3).to(dtype), ids).shape == (5, 2, 3)


def test_extract_features_leaves_the_encoder_as_it_was():
    torch.manual_seed(0)
    encoder = SmallCNN(width=4)
    before = copy.deepcopy(encoder.state_dict())
    images = torch.rand(10, 1, 8, 8)
    whole, parts = extract_features(encoder, images), extract_features(encoder, images, 3)
    torch.testing.assert_close(whole, parts)
    assert whole.shape == (10, encoder.feature_dim)
    assert encoder.training
    assert not whole.requires_grad
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_encoder_and_head_fit_and_say_when_images_do_not():
    encoder = SmallCNN(in_channels=3, width=4)
    head = MLPHead(encoder.feature_dim, 16, 5)
    assert head(encoder(torch.rand(2, 3, 32, 20))).shape == (2, 5)
    with pytest.raises(ValueError, match=r"in_channels=3, got \[2, 1, 8, 8\]"):
        encoder(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"features: expected shape \[B, 64\], got \[2, 3\]"):
        head(torch.rand(2, 3))


def assert_picture(path, least_width):
    picture = imread(path)
    assert picture.shape[1] >= least_width
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20
    assert not list(path.parent.glob(".*.partial"))


def test_figures_are_drawn(tmp_path):
    rows = [
        {
            "epoch": epoch,
            "loss": 6 - epoch / 10,
            "contrastive_accuracy": epoch / 10,
            "knn_accuracy": 0.9 if epoch == 3 else math.nan,
        }
        for epoch in (1, 2, 3)
    ]
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(16, 16, generator=generator) * 2 - 1
    views = torch.rand(8, 1, 8, 8, generator=generator)
    entry = {"mean": 0.8, "sd": 0.01}
    summary = {name: {"1": entry, "5": entry, "all": entry} for name in ("x", "y")}

    levels = {"loss": math.log(511)}
    figures.training_curves({0: rows, 1: rows}, levels=levels, path=tmp_path / "curves.png")
    figures.similarity_matrices(
        {0: matrix, 2: matrix, 4: matrix}, "abcdefgh", path=tmp_path / "s.png"
    )
    figures.view_grid(views, views, path=tmp_path / "views.png")
    figures.view_grid(views.expand(8, 3, 8, 8), views.expand(8, 3, 8, 8), path=tmp_path / "c.png")
    summary["y"].pop("5")  # a reference may lack a metric
    figures.score_comparison(
        summary, {"x": "X", "y": "Y"}, title="right", path=tmp_path / "bars.png"
    )
    for name in ("curves.png", "s.png", "views.png", "c.png", "bars.png"):
        assert_picture(tmp_path / name, 800)

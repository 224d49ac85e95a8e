"""Labelled pairs, the siamese network and the distances that pairs and triplets move."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from rich.console import Console

from fastcl.data.classes import ClassBalancedBatches
from fastcl.data.pairs import PairBatches, draw_pairs
from fastcl.evaluation import verification_auc, verification_roc
from fastcl.trainers import METHODS, run
from fastcl.trainers.callbacks import EpochLog
from fastcl.trainers.fit import fit
from fastcl.trainers.siamese import pair_scores
from fastcl.trainers.triplet import mean_distances


def test_pairs_are_what_they_say_and_every_partner_is_met():
    labels = torch.tensor([2, 0, 0, 1, 2, 1, 2, 0, 2])
    met = {True: set(), False: set()}
    for seed in range(200):
        first, second, similar = draw_pairs(labels, np.random.default_rng(seed))
        assert sorted(first.tolist()) == list(range(9))
        assert int(similar.sum()) == 4
        assert not (first == second).any()
        assert torch.equal(labels[first] == labels[second], similar)
        for kind, pair in zip(similar.tolist(), zip(first.tolist(), second.tolist(), strict=True),
                              strict=True):  # fmt: skip
            met[kind].add(pair)
    # 4 + 3 + 2 samples of a class: so many ordered pairs within, the other 72 - 20 between
    assert len(met[True]) == 4 * 3 + 3 * 2 + 2 * 1
    assert len(met[False]) == 72 - 20
    with pytest.raises(ValueError, match=r"labels: expected two or more .* got 1 classes"):
        draw_pairs(torch.zeros(4).long(), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"got 2 classes, the rarest with 1"):
        draw_pairs(torch.tensor([0, 0, 1]), np.random.default_rng(0))


def test_class_balanced_batches():
    labels = torch.tensor([0] * 7 + [1] * 9 + [2] * 8 + [3] * 12)
    batches = ClassBalancedBatches(torch.arange(36), labels, 3, 4, seed=1)

    def epoch(number):
        batches.set_epoch(number)
        return list(batches)

    first = epoch(0)
    assert len(first) == len(batches) == 3
    for data, classes in first:
        assert torch.equal(labels[data], classes)
        assert len(data.unique()) == 12
        groups = classes.view(3, 4)
        assert (groups == groups[:, :1]).all()
        assert len(groups[:, 0].unique()) == 3
    again, other = epoch(0), epoch(1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    with pytest.raises(ValueError, match=r"classes: expected from 2 to 4, got 5"):
        ClassBalancedBatches(torch.arange(36), labels, 5, 4, 0)
    with pytest.raises(ValueError, match=r"per_class: expected from 2 to 7 .*, got 8"):
        ClassBalancedBatches(torch.arange(36), labels, 4, 8, 0)


def test_batches_of_pairs_depend_on_seed_and_epoch_only():
    data, labels = torch.arange(10), torch.arange(10) % 2

    def epoch(number, seed=1):
        batches = PairBatches(data, labels, 4, seed)
        batches.sampler.set_epoch(number)
        drawn = list(batches)
        assert len(drawn) == len(batches) == 2
        return torch.stack([torch.cat(parts) for parts in zip(*drawn, strict=True)])

    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3), epoch(4))
    assert not torch.equal(epoch(3), epoch(3, seed=2))
    with pytest.raises(ValueError, match=r"batch_size: expected from 1 to 10 .*, got 11"):
        PairBatches(data, labels, 11, 0)


def test_pair_scores():
    bank, bank_labels = torch.tensor([[0.0], [10.0]]), torch.tensor([0, 1])
    labels = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[0.1], [0.2], [9.0], [8.0]])
    assert pair_scores(apart, labels, bank, bank_labels) == {"1-NN": 1.0, "pair AUC": 1.0}
    mixed = torch.tensor([[0.0], [9.0], [1.0], [10.0]])
    scores = pair_scores(mixed, labels, bank, bank_labels)
    assert scores["1-NN"] == 0.5
    assert scores["pair AUC"] < 0.5


def test_siamese_network_is_one_encoder_and_tells_pairs_apart(tmp_path):
    options = METHODS["siamese"].options(epochs=1)
    report = run("siamese", options, seeds=[0], out=tmp_path, console=Console(quiet=True))
    module = report.experiment.module
    assert sum(p.numel() for p in module.parameters()) == 183_296  # one encoder for both
    (snapshots,) = report.experiment.callbacks
    within = snapshots.pairs[2]
    gaps = [(d[~within].mean() - d[within].mean()).item() for d in snapshots.distances.values()]
    assert list(snapshots.distances) == [0, 1]
    assert gaps[0] < gaps[1]
    assert (tmp_path / "distances.png").stat().st_size > 10_000
    scores = report.as_json()["scores"]
    assert scores["trained"]["pair AUC"]["mean"] > scores["untrained"]["pair AUC"]["mean"] + 0.03


def test_siamese_network_learns_from_the_files_of_mnist(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count) // 2 % 2  # 0 is dark below, 1 above
        pictures = np.zeros((count, 28, 28), np.uint8)
        pictures[labels == 0, :14] = pictures[labels == 1, 14:] = 255
        for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            content = header + array.astype(np.uint8).tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(content)
    options = METHODS["siamese"].options(
        data="mnist", data_root=str(tmp_path), epochs=2, batch_size=12
    )
    run("siamese", options, seeds=[0], out=tmp_path / "out", console=Console(quiet=True))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["data"] == "MNIST, with labels"
    assert results["scores"]["trained"]["1-NN"]["mean"] == 1.0


def test_the_area_under_the_verification_curve_is_the_auc():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    rows = torch.eye(3)[labels] + 0.7 * torch.randn(60, 3)
    false, true = verification_roc(rows, labels)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert 0.6 < verification_auc(rows, labels) < 0.95
    area = torch.trapezoid(torch.from_numpy(true), torch.from_numpy(false))
    assert float(area) == pytest.approx(verification_auc(rows, labels))


def test_mean_distances_are_those_of_all_pairs():
    rows, labels = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    unit = torch.nn.functional.normalize(rows)
    squares = (unit[:, None] - unit).square().sum(2)
    same, self_ = labels[:, None] == labels, torch.eye(9, dtype=torch.bool)
    found = mean_distances(rows, labels)
    torch.testing.assert_close(found["positive_distance"], squares[same & ~self_].mean())
    torch.testing.assert_close(found["negative_distance"], squares[~same].mean())


def test_triplets_draw_a_class_together_and_classes_apart(tmp_path):
    options = METHODS["triplet"].options(
        epochs=3, warmup_epochs=0, width=4, mining="batch_all", schedule="constant"
    )
    experiment = METHODS["triplet"].experiment(options, 0)
    log = EpochLog(tmp_path / "log.csv")
    fit(experiment, options, 0, folder=tmp_path, callbacks=[log])
    first, last = log.rows[0], log.rows[-1]
    assert last["positive_distance"] < first["positive_distance"]
    assert last["negative_distance"] > first["negative_distance"]

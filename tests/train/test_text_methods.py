"""Text, metric-learning and captioning methods: steps, runs from end to end, exact resume."""

from __future__ import annotations

import dataclasses
import email
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from fastcl.data import code_search
from fastcl.data.tokens import PADDING
from fastcl.trainers import METHODS, run, texts
from fastcl.trainers.callbacks import EpochLog
from fastcl.trainers.fit import fit
from fastcl.trainers.methods import captions as caption_methods
from fastcl.trainers.methods import metric
from fastcl.trainers.methods import texts as text_methods
from fastcl.trainers.options import UsageError

NEW = [method.name for method in (*text_methods.METHODS, *metric.METHODS, *caption_methods.METHODS)]


TINY = {
    "clip": {"batch_size": 16, "width": 16},
    "clip_scenes": {"batch_size": 128, "width": 16, "cnn_width": 2, "drawings": 1},
    "simcse": {"batch_size": 16, "width": 16, "depth": 1, "supervised": True},
    "siamese": {"batch_size": 320},
    "triplet": {"width": 2, "out_features": 8},
    "block": {"width": 2},
    "captioning": {
        "batch_size": 384, "width": 8, "cnn_width": 2, "drawings": 1, "mle_epochs": 2, "epochs": 3,
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_corpus():
    """Functions of the package email alone: its modules stand for packages."""
    splits = code_search.load_code_search(Path(email.__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "load_code_search", lambda: splits)
        patch.setattr(texts, "LEAST_OF_PACKAGE", 4)
        yield


def tiny(name, **options):
    common = {"epochs": 2, "warmup_epochs": 0, "report_on": "test", "checkpoint_every": 1}
    return METHODS[name].options(**{**common, **TINY[name], **options})


def test_word_dropout_keeps_first_token_and_other_inputs():
    from fastcl.trainers.clip import drop_words

    torch.manual_seed(0)
    tokens = torch.full((50, 40), 3)
    dropped = drop_words(tokens, 0.3)
    assert (dropped[:, 0] == 3).all()
    assert 0.25 < (dropped[:, 1:] == PADDING).float().mean() < 0.35
    images = torch.rand(2, 3)
    assert drop_words(images, 0.3) is images
    assert drop_words(tokens, 0.0) is tokens


def test_hard_negatives_come_from_the_same_module():
    from fastcl.trainers.simcse import hard_negatives

    pairs = tuple(
        code_search.CodePair(module, str(index), "") for index, module in enumerate("aabacb")
    )
    assert hard_negatives(pairs).tolist() == [1, 3, 5, 0, 5, 2]


def test_block_step_takes_the_next_class_as_negatives(monkeypatch):
    from fastcl.trainers import block

    monkeypatch.setattr(block, "log_batch", lambda *args: None)
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = block.Block(nn.Identity(), block=2)
    loss = module.training_step((features, None), 0)
    groups = features.view(3, 3, 4)
    means = groups[:, 1:].mean(1)
    margins = (groups[:, 0] * (means - means[[2, 0, 1]])).sum(1)
    torch.testing.assert_close(loss, torch.log2(1 + (-margins).exp()).mean())


def test_caption_negatives_are_other_images_captions():
    module = METHODS["captioning"].experiment(tiny("captioning"), 0).module
    captions = torch.arange(16)[:, None].expand(16, 3)
    torch.manual_seed(0)
    others = module._others(captions)
    assert others.shape == (16, module.negatives, 3)
    for own, row in enumerate(others[:, :, 0].tolist()):
        assert own not in row
        assert len(set(row)) == len(row)


@pytest.mark.parametrize("name", NEW)
def test_every_method_runs_and_reports(tmp_path, name):
    run(name, tiny(name), seeds=[0], out=tmp_path, console=Console(quiet=True))
    results = json.loads((tmp_path / "results.json").read_text())
    scores = results["scores"]
    assert results["headline"]["metric"] in scores["trained"]
    assert scores["trained"] != scores["untrained"]
    for who in scores.values():
        assert all(0 <= entry["mean"] <= 1 for entry in who.values())
    assert math.isfinite(results["seeds"]["0"]["last_epoch"]["loss"])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", NEW)
def test_resumed_run_is_bit_identical(tmp_path, monkeypatch, name):
    options = tiny(name)
    last_epoch = options.epochs - 1

    def train(folder, resume=False):
        folder.mkdir(exist_ok=True)
        experiment = METHODS[name].experiment(options, 7)
        fit(
            experiment, options, 7, folder=folder, callbacks=[EpochLog(folder / "log.csv")],
            checkpoint=folder / "last.ckpt" if resume else None,
        )  # fmt: skip
        checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
        return checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"]

    whole = train(tmp_path / "whole")
    kind = type(METHODS[name].experiment(options, 7).module)
    training_step = kind.training_step

    def stop(module, batch, index):
        if (module.current_epoch, index) == (last_epoch, 1):
            raise Interrupted
        return training_step(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "training_step", stop)
        with pytest.raises(Interrupted):
            train(tmp_path / "parts")
    torch.manual_seed(99)  # whatever else the process drew must not matter
    parts = train(tmp_path / "parts", resume=True)
    for (key, expected), found in zip(whole[0].items(), parts[0].values(), strict=True):
        assert torch.equal(expected, found), key
    for key, expected in whole[1].items():
        for part, value in expected.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(parts[1][key][part])), key
    logs = [(tmp_path / place / "log.csv").read_text() for place in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_reference_is_the_captioner_after_maximum_likelihood(tmp_path):
    options = tiny("captioning", mle_epochs=1, epochs=2)
    snapshots = []
    experiment = METHODS["captioning"].experiment(options, 0)
    module = experiment.module
    start = module.on_train_epoch_start

    def watch():
        snapshots.append({k: v.clone() for k, v in module.captioner.state_dict().items()})
        start()

    module.on_train_epoch_start = watch
    fit(experiment, options, 0, folder=tmp_path, callbacks=[])
    reference, trained = module.reference.state_dict(), module.captioner.state_dict()
    assert all(torch.equal(reference[key], value) for key, value in snapshots[1].items())
    assert not torch.equal(reference["words.weight"], trained["words.weight"])
    assert not torch.equal(reference["words.weight"], snapshots[0]["words.weight"])
    assert not any(parameter.requires_grad for parameter in module.reference.parameters())


@pytest.mark.parametrize("name", NEW)
def test_fast_and_default_options_are_in_range(name):
    METHODS[name].options().check()
    METHODS[name].options(**METHODS[name].fast).check()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("clip", {"loss": "softmax"}, "loss: expected clip or siglip, got 'softmax'"),
        ("clip", {"docstring_length": 1}, "docstring_length: expected an integer >= 2, got 1"),
        ("simcse", {"pooling": "max"}, "pooling: expected mean or cls, got 'max'"),
        ("triplet", {"batch_size": 100}, "batch_size: expected a multiple, .* of the 12 samples"),
        ("triplet", {"mining": "hard"}, "mining: expected batch_hard, .* got 'hard'"),
        ("block", {"block": 0}, "block: expected an integer >= 1, got 0"),
        ("captioning", {"negatives": 64}, "negatives: expected fewer than batch_size = 64, got 64"),
    ],
)  # fmt: skip
def test_options_out_of_range(name, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        dataclasses.replace(METHODS[name].options(), **options).check()


def test_more_classes_than_there_are():
    with pytest.raises(ValueError, match=r"classes: expected from 2 to 10, got 20"):
        METHODS["block"].experiment(METHODS["block"].options(batch_size=120), 0)

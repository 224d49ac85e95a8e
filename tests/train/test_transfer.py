"""Transfer and ablations on a handful of epochs: what is compared, resumed, refused and written."""

import csv
import json

import pytest

pytest.importorskip("lightning")
pytest.importorskip("kornia")

import torch
from rich.console import Console

from fastcl.cli import main
from fastcl.data.views import Augment
from fastcl.evaluation.features import extract_features
from fastcl.trainers import images
from fastcl.trainers.ablation import run_study, variant_options
from fastcl.trainers.methods.images import SimCLROptions
from fastcl.trainers.methods.studies import STUDIES, Study, Variant
from fastcl.trainers.methods.transfer import MODES, Amount, ClassifierOptions
from fastcl.trainers.options import UsageError
from fastcl.trainers.supcon import with_noise
from fastcl.trainers.transfer import draw, run_transfer, train_classifier

TINY = SimCLROptions(epochs=1, width=4, label_draws=1)
SHORT = ClassifierOptions(epochs=2, learning_rate=1e-2)


def transfer(out, **places):
    return run_transfer(
        "simclr", TINY, SHORT, labels=["2", "10%"], seeds=[3], out=out,
        console=Console(quiet=True), **places,
    )  # fmt: skip


def numbers(out):
    found = json.loads((out / "results.json").read_text())["seeds"]["3"]
    return {a: {m: t["rows"] for m, t in modes.items()} for a, modes in found.items()}


def test_everything_is_written_and_a_resumed_run_trains_only_what_is_missing(tmp_path):
    report = transfer(tmp_path)
    first = numbers(tmp_path)
    assert set(first) == {"2", "10%"}
    for modes in first.values():
        assert list(modes) == list(MODES)
        assert all([row["epoch"] for row in rows] == [1, 2] for rows in modes.values())
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(rows) == 2 * len(MODES)
    assert float(rows[0]["test_accuracy"]) == first["2"]["scratch"][-1]["test_accuracy"]
    row = report.summary()["2"]
    gap = row["fine_tuned"]["test_accuracy"]["mean"] - row["scratch"]["test_accuracy"]["mean"]
    assert row["fine_tuned"]["gap"]["mean"] == pytest.approx(gap)
    for name in ("curves-2", "curves-10pct", "comparison", "embedding"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000

    kept = tmp_path / "classifiers/seed-3-2-frozen.json"
    before = kept.stat().st_mtime_ns
    (tmp_path / "classifiers/seed-3-2-fine_tuned.json").unlink()
    transfer(tmp_path, resume=True)
    assert numbers(tmp_path) == first
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(Exception, match="already holds a run; expected --resume"):
        transfer(tmp_path)
    with pytest.raises(UsageError, match=r"classifier.learning_rate: expected 0.01.*got 0.5"):
        run_transfer(
            "simclr", TINY, ClassifierOptions(epochs=2, learning_rate=0.5), labels=["2"],
            seeds=[3], out=tmp_path, resume=True, console=Console(quiet=True),
        )  # fmt: skip
    kept.write_text("{")
    with pytest.raises(Exception, match="is damaged; remove it"):
        transfer(tmp_path, resume=True)


def test_a_frozen_encoder_stays_and_the_others_move():
    splits = images.load(TINY, 0)
    encoder, _ = images.build_parts(TINY, splits, 0)
    labelled = draw(splits.train, Amount("3"), 0)
    before = extract_features(encoder, splits.test.images)
    seen = {}
    for mode in MODES:
        trained, features = train_classifier(encoder, mode, labelled, splits, TINY, SHORT, 0)
        seen[mode] = features
        assert 0 <= trained.last["test_accuracy"] <= 1
    assert torch.equal(extract_features(encoder, splits.test.images), before)
    assert torch.equal(seen["frozen"], before)
    # batch norm's running statistics went on moving, nothing else
    assert not torch.equal(seen["frozen_bn_train"], before)
    assert torch.equal(seen["scratch"], seen["fine_tuned"])  # the same parameters to start from
    assert not torch.equal(seen["fine_tuned"], before)


def test_labels_are_drawn_by_class():
    train = images.load(TINY, 0).train
    assert torch.equal(draw(train, Amount("7"), 1).labels.bincount(), torch.full((10,), 7))
    tenth = draw(train, Amount("10%"), 1).labels.bincount()
    assert torch.equal(tenth, (train.labels.bincount() * 0.1).round().long())
    assert len(draw(train, Amount("100%"), 1)) == len(train)
    one = draw(train, Amount("0.001%"), 1)
    assert torch.equal(one.labels.bincount(), torch.ones(10, dtype=torch.long))
    first, second = (set(draw(train, Amount("7"), seed).indices) for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simclr", "--labels", "few"], "labels: expected percentages such as 10% or labels per"),
        (["simclr", "--labels", "0%"], "labels: expected percentages"),
        (["simclr", "--labels", "5000"], "labels: expected at most 121 per class"),
        (["simclr", "--labels", "1%", "1%"], "labels: expected distinct amounts"),
        (["simclr", "--classifier.epochs", "0"], "classifier.epochs: expected an integer >= 1"),
        (["simclr", "--without", "Flip"], "without: expected augmentations of recipe 'digits'"),
        (["clip"], "method: expected one of simclr, moco"),
    ],
)  # fmt: skip
def test_refusals(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["transfer", *arguments, *(["--out", str(out)] if arguments[1:] else [])]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not out.exists()


def test_study(tmp_path):
    assert main(["ablate", "weather"]) == 2
    study = Study(
        "two", "Two temperatures", "", "temperature",
        tuple(Variant("line", str(t), "simclr", {"temperature": t}) for t in (0.1, 1.0)),
    )  # fmt: skip
    given = {"epochs": 1, "batch_size": 512}
    found = run_study(study, given, seeds=[0], out=tmp_path, fast=True, console=Console(quiet=True))
    assert list(found["lines"]["line"]) == ["0.1", "1.0"]
    runs = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("0*/results.json"))]
    assert [run["options"]["temperature"] for run in runs] == [0.1, 1.0]
    assert all(run["options"]["batch_size"] == 512 for run in runs)
    assert found["lines"]["line"]["1.0"]["mean"] == runs[1]["headline"]["trained"]
    assert found["untrained"] == runs[0]["headline"]["untrained"]
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("fast", [False, True])
def test_every_study_names_options_that_its_methods_have(fast):
    for study in STUDIES.values():
        for variant in study.variants:
            options = variant_options(variant, {"threads": 3}, fast)
            options.check()
            assert options.threads == 3


def test_a_study_takes_the_options_that_its_methods_have(tmp_path, capsys):
    assert "data" in STUDIES["queue"].options()
    assert set(STUDIES["block"].options()) == {"data", "data_root", "report_on", "threads"}
    assert main(["ablate", "captioning", "--data", "mnist", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "fastcl ablate: unrecognized arguments: --data mnist\n"
    assert main(["ablate", "queue", "--epochs", "many", "--out", str(tmp_path)]) == 2
    assert "epochs: expected an integer, got 'many'" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"given: expected epochs, .* got 'data'"):
        run_study("captioning", {"data": "mnist"}, seeds=[0], out=tmp_path)


def test_noise_and_omissions():
    labels = torch.arange(1000) % 10
    noisy = with_noise(labels, 0.3, 10, 0)
    assert int((noisy != labels).sum()) == 300
    assert noisy.min() >= 0
    assert noisy.max() <= 9
    assert torch.equal(with_noise(labels, 0.0, 10, 0), labels)
    names = (
        "RandomAffine", "RandomElasticTransform", "RandomContrast", "RandomGaussianNoise",
        "RandomErasing",
    )  # fmt: skip
    pictures = torch.rand(2, 1, 8, 8)
    assert torch.equal(Augment("digits", (8, 8), names)(pictures), pictures)
    erased = Augment("digits", (8, 8), names[:-1])(pictures.expand(2, 1, 8, 8).repeat(8, 1, 1, 1))
    changed = erased != pictures.repeat(8, 1, 1, 1)
    assert torch.equal(erased[changed], torch.zeros(int(changed.sum())))

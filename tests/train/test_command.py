"""``fastcl train`` through real processes, and its answers to bad input."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from fastcl.trainers import command, main

TINY = ["--width", "4", "--batch_size", "400", "--label_draws", "1", "--warmup_epochs", "1"]


def train(*arguments, cwd, **popen):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.Popen(
        [sys.executable, "-m", "fastcl.cli", "train", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # as from a terminal: whoever runs the tests in the background has it ignored
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **popen,
    )


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run of two seeds, made by a real process."""
    folder = tmp_path_factory.mktemp("finished")
    process = train(
        "simclr", *TINY, "--epochs", "2", "--seeds", "0", "1", "--out", "run", cwd=folder
    )
    output, errors = process.communicate(timeout=120)
    return folder / "run", process.returncode, output, errors


def test_end_to_end(finished):
    out, code, output, errors = finished
    assert code == 0, errors
    assert errors == ""
    assert "Warning" not in output
    results = json.loads((out / "results.json").read_text())
    assert results["scored_on"] == "test"
    assert results["options"]["epochs"] == 2
    assert set(results["seeds"]) == {"0", "1"}
    for name in ("trained", "untrained", "raw pixels"):
        for metric in ("kNN", "probe@1", "probe@5", "probe@10", "probe@all"):
            entry = results["scores"][name][metric]
            values = [s["scores"][name][metric] for s in results["seeds"].values()]
            assert entry["mean"] == pytest.approx(sum(values) / 2)
            assert entry["sd"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
            assert 0.1 < entry["mean"] <= 1
            assert f"{100 * entry['mean']:.1f} ± {100 * entry['sd']:.1f}" in output
    headline = results["headline"]
    gain = results["scores"]["trained"]["probe@1"]["mean"] - headline["untrained"]
    assert headline["margin"] == pytest.approx(gain)
    assert f"probe@1: {100 * gain:+.1f} points" in output
    for seed in (0, 1):
        assert set(results["seeds"][str(seed)]["details"]["similarity_gap"]) == {"0", "1", "2"}
        assert (out / f"seed-{seed}" / "checkpoints" / "last.ckpt").exists()
        with (out / f"seed-{seed}" / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert all(0 < float(row["loss"]) < 10 for row in rows)
        assert rows[0]["knn_accuracy"] == ""
        assert float(rows[1]["knn_accuracy"]) > 0.3
    names = {"curves", "similarity", "comparison", "views"}
    assert {f"{name}.png" for name in names} == set(results["pictures"])
    for name in names:
        assert (out / f"{name}.png").stat().st_size > 5000
        assert f"{name}.png" in output


def test_killed_run_resumes_and_interrupted_run_says_how(tmp_path):
    arguments = ("simclr", *TINY, "--epochs", "2000", "--checkpoint_every", "1", "--out", "run")
    seed = tmp_path / "run" / "seed-0"
    last = seed / "checkpoints" / "last.ckpt"
    killed = train(*arguments, cwd=tmp_path)
    wait_for(last, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = torch.load(last, weights_only=True)["epoch"]  # complete, whenever the signal came
    written = last.stat().st_mtime_ns
    assert not (tmp_path / "run" / "results.json").exists()

    resumed = train(*arguments, "--resume", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while last.stat().st_mtime_ns == written and time.monotonic() < deadline:
        time.sleep(0.01)
    resumed.send_signal(signal.SIGINT)
    _, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 1
    assert errors.startswith("fastcl train: interrupted; --resume continues from the last")
    assert len(errors.splitlines()) == 1
    assert torch.load(last, weights_only=True)["epoch"] > done
    with (seed / "log.csv").open() as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file)]
    assert epochs == list(range(1, len(epochs) + 1))
    assert len(epochs) > done + 1


def test_two_devices_share_their_negatives(tmp_path):
    arguments = ("--epochs", "1", "--devices", "2", "--strategy", "ddp", "--accelerator", "cpu")
    process = train("simclr", *TINY, *arguments, "--out", "run", cwd=tmp_path)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert output.count("Written to") == 1  # one report, by one rank
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    # a view has 798 negatives on both devices, of its own alone it would have 398
    assert results["seeds"]["0"]["last_epoch"]["loss"] > math.log(399) + 0.1


def answer(capsys, *argv):
    code = main([str(argument) for argument in argv])
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return code, output.err.strip(), output.out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["mocco"], "method: expected one of simclr, "),
        (["simclr", "--recipe", "mnist"], "recipe: expected digits, moco_v1, moco_v2"),
        (["simclr", "--recipe", "simclr"], "jitters colour and digits is grey; expected 'digits'"),
        (["simclr", "--data", "cifar10"], "cifar-10-batches-py/data_batch_1, which is absent"),
        (["simclr", "--data", "imagenet"], "data: expected digits, mnist, cifar10, cifar100"),
        (["simclr", "--epochs", "0"], "epochs: expected an integer >= 1, got 0"),
        (["simclr", "--epochs", "many"], "epochs: expected an integer, got 'many'"),
        (["simclr", "--batch_size", "1258"], "batch_size: expected from 2 to 1257"),
        (["simclr", "--temperature", "-1"], "temperature: expected a number > 0, got -1.0"),
        (["simclr", "--report_on", "all"], "report_on: expected test or validation, got 'all'"),
        (["simclr", "--seeds", "1", "1"], "seeds: expected distinct integers"),
        (["simclr", "--resume", "--overwrite"], "resume and overwrite: expected at most one"),
        (["simclr", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["simclr", "--config", "absent.yaml"], "absent.yaml', which does not exist"),
        (["simclr", "--seeds", "0", "one"], "seeds: expected an integer, got 'one'"),
    ],
)
def test_wrong_arguments_get_one_sentence(capsys, tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    code, error, _ = answer(capsys, *argv)
    assert code == 2
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_named(capsys, tmp_path):
    code, error, _ = answer(capsys, "simclr", "--accelerator", "gpu", "--out", tmp_path / "run")
    assert code == 2
    assert "accelerator: expected what this machine has, got gpu with devices = 1" in error
    assert not (tmp_path / "run").exists()


def test_a_narrow_table_breaks_names_and_leaves_nothing_out():
    from types import SimpleNamespace

    from rich.console import Console

    from fastcl.trainers.report import Report, _table

    scores = {"trained": {"contrastive": 0.5, "probe@100": 0.25}, "untrained": {"contrastive": 0.1}}
    method, options = SimpleNamespace(title="Instance"), SimpleNamespace(report_on="test")
    experiment = SimpleNamespace(measured="scores")
    results = {0: SimpleNamespace(scores=scores)}
    console = Console(width=24, record=True, quiet=False, file=io.StringIO())
    console.print(_table(Report(method, options, experiment, results, [], 0.0)))
    assert "\N{HORIZONTAL ELLIPSIS}" not in console.export_text()


def test_finished_run_is_not_overwritten_unasked(capsys, finished):
    out = finished[0]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, error, _ = answer(capsys, "simclr", *TINY, "--epochs", "2", "--out", out)
    assert code == 1
    assert "already holds a run; expected --resume" in error
    code, error, _ = answer(capsys, "simclr", *TINY, "--epochs", "3", "--out", out, "--resume")
    assert code == 2
    assert "epochs: expected 2, with which" in error
    assert "got 3" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resuming_a_finished_run_repeats_its_report(capsys, finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    (out / "results.json").unlink()
    arguments = ("--epochs", "2", "--seeds", "0", "1", "--out", out)
    code, error, _ = answer(capsys, "simclr", *TINY, *arguments, "--resume")
    assert (code, error) == (0, "")
    original, repeated = (
        json.loads((folder / "results.json").read_text()) for folder in (finished[0], out)
    )
    assert repeated["scores"] == original["scores"]
    for seed in ("0", "1"):
        assert repeated["seeds"][seed]["last_epoch"] == original["seeds"][seed]["last_epoch"]


def test_truncated_checkpoint_is_named(capsys, finished, tmp_path):
    checkpoint = finished[0] / "seed-0" / "checkpoints" / "last.ckpt"
    broken = tmp_path / "seed-0" / "checkpoints" / "last.ckpt"
    broken.parent.mkdir(parents=True)
    content = checkpoint.read_bytes()
    for length in (0, len(content) // 2, len(content) - 1):
        broken.write_bytes(content[:length])
        code, error, _ = answer(
            capsys, "simclr", *TINY, "--epochs", "2", "--out", tmp_path, "--resume"
        )
        assert code == 1
        assert f"resume: {broken} is not a complete checkpoint" in error
        assert broken.stat().st_size == length


def test_out_must_be_a_writable_folder(capsys, tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    code, error, _ = answer(capsys, "simclr", *TINY, "--out", occupied)
    assert code == 1
    assert f"out: cannot write to {occupied}" in error
    assert occupied.read_text() == "mine"


def test_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(command, "MODULES", ("torch", "absent_one", "absent_two"))
    code, error, _ = answer(capsys, "simclr")
    assert code == 1
    assert error == (
        "fastcl train: fastcl train needs the extra 'train': pip install 'fastcl[train]' "
        "(missing: absent_one, absent_two)"
    )


def test_help_teaches_and_a_config_file_is_read(capsys, tmp_path):
    code, _, overview = answer(capsys, "--help")
    assert code == 0
    assert "simclr" in overview
    code, _, text = answer(capsys, "simclr", "--help")
    assert code == 0
    assert "divisor of the cosine similarities in NT-Xent" in " ".join(text.split())

    config = tmp_path / "run.yaml"
    config.write_text("epochs: 0\nseeds: [3, 4]\n")
    code, error, _ = answer(capsys, "simclr", "--config", config)
    assert code == 2
    assert "epochs: expected an integer >= 1, got 0" in error


def test_training_learns_and_uses_the_loss_of_fastcl(finished):
    from fastcl import NTXentLoss
    from fastcl.trainers.methods.images import SimCLROptions
    from fastcl.trainers.simclr import experiment

    module = experiment(SimCLROptions(width=4), 0).module
    assert isinstance(module.loss, NTXentLoss)
    with (finished[0] / "seed-0" / "log.csv").open() as file:
        first, second = csv.DictReader(file)
    assert float(second["loss"]) < float(first["loss"]) < math.log(799) + 0.1

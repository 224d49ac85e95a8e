"""An interrupted and resumed run ends as if it had never been interrupted, to the last bit."""

from __future__ import annotations

import pytest
import torch

from fastcl.trainers import METHODS
from fastcl.trainers.callbacks import EpochLog
from fastcl.trainers.fit import fit
from fastcl.trainers.simclr import SimCLR

SEED = 7
TINY = {"width": 4, "batch_size": 400, "warmup_epochs": 1, "knn_every": 2, "label_draws": 1}
# what lives from step to step: a queue and a momentum encoder, banks, draws of negatives, of
# permutations; with fewer steps than keys the queue is also met while it fills
STATEFUL = {
    "moco": {"queue_size": 1500, "bn_splits": 2, "symmetric": True},
    "instdisc": {"form": "nce", "negatives": 32},
    "cmc": {"form": "sampled_softmax", "negatives": 32},
    "jigsaw": {"permutations": 8},
    "supcon": {"optimizer": "lars"},
}


class Interrupted(Exception):
    pass


def run(folder, method="simclr", *, checkpoint_every=1, resume=False, **options):
    method = METHODS[method]
    settings = {"epochs": 5, "warmup_epochs": 2, "checkpoint_every": checkpoint_every, **options}
    options = method.options(**{**TINY, **settings})
    experiment = method.experiment(options, SEED)
    fit(
        experiment,
        options,
        SEED,
        folder=folder,
        callbacks=[EpochLog(folder / "log.csv")],
        checkpoint=folder / "last.ckpt" if resume and (folder / "last.ckpt").exists() else None,
    )
    return experiment.details(experiment.module) if experiment.details else {}


def final_state(folder):
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    return {
        "parameters and batch-norm statistics": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
    }


def assert_equal(left, right, where):
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    else:
        assert left == right, where


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run(folder)


@pytest.mark.parametrize(
    ("epoch", "batch", "checkpoint_every"),
    [
        *((epoch, 0, 1) for epoch in range(5)),  # after every epoch; epoch 0: before any checkpoint
        (2, 1, 1),  # within an epoch
        (4, 2, 3),  # epochs since the checkpoint are already in the log, and are done again
    ],
)
def test_resumed_run_is_bit_identical(
    uninterrupted, tmp_path, monkeypatch, epoch, batch, checkpoint_every
):
    training_step = SimCLR.training_step

    def stop_there(module, images, batch_index):
        if (module.current_epoch, batch_index) == (epoch, batch):
            raise Interrupted
        return training_step(module, images, batch_index)

    folder = tmp_path / "interrupted"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(SimCLR, "training_step", stop_there)
        with pytest.raises(Interrupted):
            run(folder, checkpoint_every=checkpoint_every)
    folder = folder.rename(tmp_path / "moved")
    torch.manual_seed(epoch)  # whatever else the process drew must not matter
    matrices = run(folder, checkpoint_every=checkpoint_every, resume=True)

    expected_folder, expected_matrices = uninterrupted
    assert_equal(final_state(folder), final_state(expected_folder), "checkpoint")
    assert_equal(matrices, expected_matrices, "similarity")
    saved = range(checkpoint_every, 6, checkpoint_every)
    assert {path.name for path in folder.glob("*.ckpt")} == {
        "last.ckpt",
        *(f"epoch-{epochs - 1:04d}.ckpt" for epochs in saved),
    }
    log = (folder / "log.csv").read_text()
    assert log == (expected_folder / "log.csv").read_text()
    assert [line.split(",")[0] for line in log.splitlines()] == ["epoch", *"12345"]


@pytest.mark.parametrize("method", STATEFUL)
def test_what_lives_from_step_to_step_is_resumed(tmp_path, monkeypatch, method):
    options = {**STATEFUL[method], "epochs": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run(whole, method, **options)
    kind = type(METHODS[method].experiment(METHODS[method].options(**TINY), SEED).module)
    training_step = kind.training_step

    def stop_there(module, batch, batch_index):
        if (module.current_epoch, batch_index) == (1, 1):
            raise Interrupted
        return training_step(module, batch, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "training_step", stop_there)
        with pytest.raises(Interrupted):
            run(parts, method, **options)
    torch.manual_seed(99)
    run(parts, method, resume=True, **options)
    assert_equal(final_state(parts), final_state(whole), "checkpoint")
    assert (parts / "log.csv").read_text() == (whole / "log.csv").read_text()


def test_resuming_a_finished_run_changes_nothing(uninterrupted):
    folder, matrices = uninterrupted
    state, log = final_state(folder), (folder / "log.csv").read_text()
    assert_equal(run(folder, resume=True), matrices, "similarity")
    assert_equal(final_state(folder), state, "checkpoint")
    assert (folder / "log.csv").read_text() == log

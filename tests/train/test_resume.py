"""An interrupted and resumed run ends as if it had never been interrupted, to the last bit."""

from __future__ import annotations

import pytest
import torch

from fastcl.trainers import METHODS
from fastcl.trainers.callbacks import EpochLog
from fastcl.trainers.fit import fit
from fastcl.trainers.simclr import SimCLR

SEED = 7


class Interrupted(Exception):
    pass


def run(folder, *, checkpoint_every=1, resume=False):
    method = METHODS["simclr"]
    options = method.options(
        epochs=5, width=4, batch_size=400, warmup_epochs=2, knn_every=2,
        label_draws=1, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    experiment = method.experiment(options, SEED)
    fit(
        experiment,
        options,
        SEED,
        folder=folder,
        callbacks=[EpochLog(folder / "log.csv")],
        checkpoint=folder / "last.ckpt" if resume and (folder / "last.ckpt").exists() else None,
    )
    return experiment.details(experiment.module)


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
        assert torch.equal(left, right), where
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


def test_resuming_a_finished_run_changes_nothing(uninterrupted):
    folder, matrices = uninterrupted
    state, log = final_state(folder), (folder / "log.csv").read_text()
    assert_equal(run(folder, resume=True), matrices, "similarity")
    assert_equal(final_state(folder), state, "checkpoint")
    assert (folder / "log.csv").read_text() == log

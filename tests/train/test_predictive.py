"""CPC and C-SWM as they are trained: exact resume, what they learn, what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastcl import CPCBCELoss, CPCLoss, CSWMLoss
from fastcl.data.worlds import move
from fastcl.trainers import METHODS, main
from fastcl.trainers.callbacks import EpochLog
from fastcl.trainers.fit import fit
from fastcl.trainers.methods import predictive

CPC = {"sequences": 96, "width": 2, "features": 8, "context_features": 8, "batch_size": 32}
CASES = {
    "info_nce": ("cpc", CPC),
    "info_nce, same sequence": ("cpc", {**CPC, "negatives": "sequence"}),
    "cpc_bce": ("cpc", {**CPC, "objective": "cpc_bce"}),
    "sound": ("cpc_audio", {"clips": 48, "batch_size": 16, "channels": 4, "context_features": 4}),
    "world": (
        "cswm",
        {
            "train_episodes": 8, "train_steps": 12, "batch_size": 32, "hidden_features": 8,
            "width": 4, "scored_episodes": 20,
        },
    ),
}  # fmt: skip


class Interrupted(Exception):
    pass


def experiment_of(case):
    name, changes = CASES[case]
    method = METHODS[name]
    options = method.options(epochs=2, warmup_epochs=1, checkpoint_every=1, **changes)
    options.check()
    return method.experiment(options, 3), options


def train(case, folder, checkpoint=None, stop_at=None):
    experiment, options = experiment_of(case)
    step = experiment.module.training_step

    def stopping(batch, batch_idx):
        if (experiment.module.current_epoch, batch_idx) == stop_at:
            raise Interrupted
        return step(batch, batch_idx)

    experiment.module.training_step = stopping
    fit(
        experiment, options, 3, folder=folder, checkpoint=checkpoint,
        callbacks=[EpochLog(folder / "log.csv")],
    )  # fmt: skip
    del experiment.module.training_step
    return experiment


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_is_bit_identical_and_its_scores_are_complete(case, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    experiment = train(case, whole)
    with pytest.raises(Interrupted):
        train(case, parts, stop_at=(1, 1))
    torch.manual_seed(99)  # whatever else the process drew must not matter
    resumed = train(case, parts, checkpoint=parts / "last.ckpt")

    first, second = (torch.load(f / "last.ckpt", weights_only=True) for f in (whole, parts))
    for key, value in first["state_dict"].items():
        assert torch.equal(second["state_dict"][key], value), key
    moments = [c["optimizer_states"][0]["state"] for c in (first, second)]
    for index, state in moments[0].items():
        assert all(torch.equal(moments[1][index][name], state[name]) for name in state)
    assert (parts / "log.csv").read_text() == (whole / "log.csv").read_text()

    module = experiment.module.eval()
    scores = experiment.scores(module)
    assert scores == resumed.scores(resumed.module.eval())
    assert experiment.headline in scores
    assert all(0.0 <= value <= 1.0 for value in scores.values())
    assert all(set(known) <= set(scores) for known in experiment.references.values())
    pictures = experiment.figures(module, tmp_path)
    assert all((tmp_path / name).stat().st_size > 5000 for name in pictures)


@pytest.mark.parametrize("method", predictive.METHODS, ids=lambda method: method.name)
def test_fast_and_default_options_are_in_range(method):
    method.options().check()
    method.options(**method.fast).check()


def test_losses_are_those_of_fastcl_with_the_options_given():
    losses = {case: experiment_of(case)[0].module.loss for case in CASES}
    assert isinstance(losses["cpc_bce"], CPCBCELoss)
    assert isinstance(losses["sound"], CPCLoss)
    assert [losses[case].negatives for case in CASES if case.startswith("info")] == [
        "batch",
        "sequence",
    ]
    method = METHODS["cswm"]
    options = method.options(
        form="repository", sigma=0.7, margin=2.0, train_episodes=2, batch_size=32, scored_episodes=2
    )
    loss = method.experiment(options, 0).module.loss
    assert isinstance(loss, CSWMLoss)
    assert (
        loss.options()
        == CSWMLoss(form="repository", sigma=0.7, margin=2.0, return_metrics=True).options()
    )


@torch.no_grad()
def test_predictions_see_what_came_before_them_and_no_more():
    experiment, options = experiment_of("info_nce")
    module = experiment.module.eval()
    images = torch.rand(4, options.length, 1, 8, 8)
    outlook = module(images)
    seen = options.length - options.predicted_steps
    later = images.clone()
    later[:, seen:] = torch.rand_like(later[:, seen:])
    changed = module(later)
    assert torch.equal(changed.predictions, outlook.predictions)
    assert not torch.equal(changed.targets, outlook.targets)
    last = images.clone()
    last[:, seen - 1] = 0
    assert (module(last).predictions != outlook.predictions).any(2).all()
    torch.testing.assert_close(module(last).targets, outlook.targets)
    # the training loss takes every time from context_steps on, this one among them
    features = module.encoder(images)
    targets = features[:, seen:]
    torch.testing.assert_close(targets, outlook.targets)
    torch.testing.assert_close(module.context(features)[:, seen - 1], outlook.context)


def test_a_world_is_rolled_out_step_by_step():
    experiment, _ = experiment_of("world")
    module = experiment.module.eval()
    states, actions = torch.randn(3, 5, 2), torch.tensor([[0, 7], [19, 4], [5, 5]])
    with torch.no_grad():
        first = states + module.transition(states, actions[:, 0])
        second = first + module.transition(first, actions[:, 1])
    once, twice = module.roll_out(states, actions)
    assert torch.equal(once, first)
    assert torch.equal(twice, second)


def test_what_a_world_model_scores_is_what_it_knows(monkeypatch):
    """A model that knows the rules finds every state, one that has seen nothing finds none."""
    experiment, options = experiment_of("world")
    module = experiment.module.eval()

    class Positions(torch.nn.Module):
        def forward(self, images):  # the pictures are the positions themselves
            return images.float()

    class Rules(torch.nn.Module):
        def forward(self, states, actions):
            return torch.from_numpy(move(states.numpy(), actions.numpy()) - states.numpy())

    module.render, module.encoder, module.transition = torch.nn.Identity(), Positions(), Rules()
    scores = experiment.scores(module)
    assert scores["Hits@1 +10"] == scores["MRR +5"] == scores["Hits@1 +1"] == 1.0
    assert scores["still +10"] < 1.0
    monkeypatch.setattr(Positions, "forward", lambda self, seen: torch.zeros(len(seen), 5, 2))
    scores = experiment.scores(module)
    assert scores["Hits@1 +1"] == scores["still +1"] == 0.0
    assert scores["MRR +1"] == pytest.approx(1 / options.scored_episodes)


def test_held_out_data_do_not_depend_on_the_seed_and_differ_from_training(monkeypatch):
    from fastcl.data import worlds
    from fastcl.trainers import cswm

    seeds = []

    def remember(episodes, steps, seed):
        seeds.append(seed)
        return worlds.random_episodes(episodes, steps, seed)

    monkeypatch.setattr(cswm, "random_episodes", remember)
    method = METHODS["cswm"]
    options = method.options(**CASES["world"][1])
    method.experiment(options, 0)
    method.experiment(dataclasses.replace(options, report_on="validation"), 1)
    assert seeds == [0, 2**32, 1, 2**32 + 1]  # seeds of runs are below 2^32


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["cpc", "--objective", "mse"], "objective: expected info_nce or cpc_bce, got 'mse'"),
        (["cpc", "--length", "7"], "length: expected at least 8 for context_steps 4"),
        (["cpc", "--negatives", "sequence", "--length", "8"], "length: expected at least 9"),
        (["cpc", "--negatives", "none"], "negatives: expected batch, sequence, all or other"),
        (["cpc_audio", "--window", "5000"], "window: expected a multiple of 160, got 5000"),
        (["cpc_audio", "--window", "1600"], "window: expected at least 3200 for context_steps 8"),
        (["cpc_audio", "--noise", "-1"], "noise: expected a number >= 0"),
        (["cswm", "--world", "maze"], "world: expected shapes or cubes, got 'maze'"),
        (["cswm", "--form", "mine"], "form: expected paper or repository, got 'mine'"),
        (["cswm", "--scored_episodes", "1"], "scored_episodes: expected an integer >= 2"),
    ],
)
def test_wrong_arguments_get_one_sentence(capsys, tmp_path, monkeypatch, argv, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

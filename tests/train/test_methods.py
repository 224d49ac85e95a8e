"""What each method on images does in a step, and that all of them run from end to end."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from fastcl.data.shifts import SHIFTS, shift
from fastcl.data.tiles import cut_tiles, select_permutations
from fastcl.encoders import LinearHead, SmallCNN
from fastcl.trainers import METHODS, run
from fastcl.trainers.images import similarity_gap
from fastcl.trainers.methods import images as light
from fastcl.trainers.optim import LARS, configure_optimizers, make_optimizer
from fastcl.trainers.options import Optimization, UsageError

TINY = {
    "epochs": 1, "batch_size": 320, "warmup_epochs": 0, "width": 4, "label_draws": 1,
    "report_on": "validation",
}  # fmt: skip
IMAGE_METHODS = [method.name for method in light.METHODS]


def tiny(name, **options):
    method = METHODS[name]
    own = {"domain": {"finetune_epochs": 1, "batch_size": 400}, "jigsaw": {"permutations": 4}}
    return method.options(**{**TINY, **own.get(name, {}), **options})


@pytest.mark.parametrize("name", [name for name in IMAGE_METHODS if name != "moco_v1"])
def test_every_method_runs_and_reports(tmp_path, name):
    report = run(name, tiny(name), seeds=[0], out=tmp_path, console=Console(quiet=True))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["method"] == name
    for who in ("trained", "untrained"):
        scores = results["scores"][who]
        assert all(0 <= entry["mean"] <= 1 for entry in scores.values())
        assert results["headline"]["metric"] in scores
    assert results["scores"]["trained"] != results["scores"]["untrained"]
    assert math.isfinite(results["seeds"]["0"]["last_epoch"]["loss"])
    for picture in results["pictures"]:
        assert (tmp_path / picture).stat().st_size > 5000
    assert report.headline()["metric"] == results["headline"]["metric"]


def test_simclr_takes_each_loss_of_two_views():
    from fastcl import functional as f
    from fastcl.trainers import simclr

    first, second = torch.randn(2, 6, 4)
    definitions = {
        "nt_xent": f.nt_xent,
        "dcl": f.dcl,
        "dclw": lambda a, b, t: f.dcl(a, b, t, sigma=0.5),
        "debiased": f.debiased,
        "hard_negative": f.hard_negative,
    }
    assert set(simclr.LOSSES) == set(light.LOSSES) == set(definitions)
    for loss, definition in definitions.items():
        experiment = METHODS["simclr"].experiment(tiny("simclr", loss=loss, temperature=0.3), 0)
        value, metrics = experiment.module.loss(first, second)
        assert "accuracy" in metrics
        torch.testing.assert_close(value, definition(first, second, 0.3))
        chance = {"loss": math.log(639)} if loss == "nt_xent" else {}
        assert experiment.levels == {"contrastive_accuracy": 1 / 639, **chance}


def test_similarity_gap_compares_own_views_with_those_of_others():
    matrix = torch.full((16, 16), 0.25)
    matrix.fill_diagonal_(1.0)  # a view and itself: no part of either mean
    matrix += 0.5 * (torch.eye(16).roll(8, 0))
    assert similarity_gap(matrix) == pytest.approx(0.5)


@pytest.mark.parametrize("name", IMAGE_METHODS)
def test_fast_and_default_options_are_in_range(name):
    method = METHODS[name]
    method.options().check()
    method.options(**method.fast).check()


def test_same_seed_same_start():
    one, other = (METHODS["moco"].experiment(tiny("moco"), 3).module for _ in range(2))
    for (name, left), right in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(left, right), name


def test_moco_scores_queries_against_the_queue_as_it_was(monkeypatch):
    from fastcl.trainers import moco

    monkeypatch.setattr(moco, "log_batch", lambda *args: None)
    torch.manual_seed(0)

    class Pair(nn.Module):
        def forward(self, images):
            return images, images.flip(3)

    encoder, head = SmallCNN(width=4), LinearHead(64, 8)
    module = moco.MoCo(
        encoder, head, Pair(), out_features=8, queue_size=64, momentum=0.9, temperature=0.2
    )
    images, numbers = torch.rand(16, 1, 8, 8), torch.arange(16)
    module.training_step((images, numbers), 0)
    before, old = copy.deepcopy(module), module.loss.queue.keys.clone()
    assert len(old) == 16
    with torch.no_grad():  # so that the key encoder has something to follow
        for parameter in module.head.parameters():
            parameter.add_(1.0)
    fresh, later = torch.rand(16, 1, 8, 8), numbers + 16
    loss = module.training_step((fresh, later), 1)

    keys_of = before.key_encoder.encoder
    for mine, source in zip(
        keys_of.parameters(), nn.Sequential(module.encoder, module.head).parameters(), strict=True
    ):
        mine.data = 0.9 * mine.data + 0.1 * source.data
    keys = F.normalize(keys_of(fresh.flip(3)), dim=1).detach()
    module.encoder.train()
    queries = F.normalize(module(fresh), dim=1)
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ old.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(16, dtype=torch.long))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(module.loss.queue.keys[16:], keys)
    loss.backward()
    assert all(parameter.grad is None for parameter in module.key_encoder.parameters())


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_does_not_push_an_image_from_its_own_stale_key(monkeypatch, symmetric):
    """Features are the two pixels; the queue holds a key of each image, equal to it."""
    from fastcl.trainers import moco

    class Twice(nn.Module):
        def forward(self, images):
            return images, images

    monkeypatch.setattr(moco, "log_batch", lambda *args: None)
    module = moco.MoCo(
        nn.Flatten(), nn.Identity(), Twice(), out_features=2, queue_size=9, temperature=0.5,
        symmetric=symmetric,
    )  # fmt: skip
    pixels, numbers = torch.eye(2), torch.tensor([5, 6])
    module.loss.queue.enqueue(pixels, numbers)
    loss = module.training_step((pixels.view(2, 1, 1, 2), numbers), 0)
    # one negative is left, the other image's key, at a right angle
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1 / 0.5)))


def test_rotations_turn_counter_clockwise_in_order():
    from fastcl.trainers.rotation import four_rotations

    square = torch.tensor([[0.0, 1], [2, 3]]).view(1, 1, 2, 2)
    turned, classes = four_rotations(square.repeat(2, 1, 1, 1))
    assert classes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    quarter = square.flip(3).transpose(2, 3)  # transposing and flipping up-down
    assert turned[2, 0].tolist() == quarter[0, 0].tolist() == [[1, 3], [0, 2]]
    assert turned[7, 0].tolist() == [[2, 0], [3, 1]]
    with pytest.raises(ValueError, match=r"expected square .*, got \[1, 1, 2, 3\]"):
        four_rotations(torch.rand(1, 1, 2, 3))


def test_tiles_are_where_they_belong_and_normalised_one_by_one():
    images = torch.arange(2 * 1 * 12 * 12.0).view(2, 1, 12, 12)
    tiles = cut_tiles(images, grid=3, tile=4)  # cells are 4 x 4: no room to move
    assert tiles.shape == (2, 9, 1, 4, 4)
    cell = images[1, 0, 4:8, 8:12]  # row 1, column 2
    torch.testing.assert_close(tiles[1, 5, 0], (cell - cell.mean()) / cell.std())
    torch.manual_seed(0)
    moved = cut_tiles(torch.rand(40, 1, 12, 12), grid=3, tile=2)
    torch.testing.assert_close(moved.mean((2, 3, 4)), torch.zeros(40, 9), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved.std((2, 3, 4)), torch.ones(40, 9), atol=1e-3, rtol=0)
    assert cut_tiles(torch.zeros(1, 1, 12, 12), 3, 4).isfinite().all()
    middle = cut_tiles(images, 1, 2, jitter=False)[0, 0, 0]
    torch.testing.assert_close(middle.sign(), torch.tensor([[-1.0, -1], [1, 1]]))
    with pytest.raises(ValueError, match=r"tile: expected from 1 to 4 .*, got 5"):
        cut_tiles(images, 3, 5)


@pytest.mark.parametrize(("tiles", "count"), [(4, 24), (4, 4), (9, 30)])
def test_permutations_are_distinct_and_far_apart(tiles, count):
    chosen = select_permutations(tiles, count)
    assert torch.equal(chosen.sort(1).values, torch.arange(tiles).expand(count, tiles))
    distances = (chosen[:, None] != chosen[None]).sum(2)[~torch.eye(count, dtype=torch.bool)]
    # all there are; the rows of a Latin square; and of nine tiles thirty that share few places
    assert distances.min() >= {24: 2, 4: 4, 30: 7}[count]
    with pytest.raises(ValueError, match="permutations: expected from 1 to 24 of 4 tiles, got 25"):
        select_permutations(4, 25)


def test_multiview_splits():
    from kornia.color import lab_to_rgb

    from fastcl.trainers.cmc import SPLITS

    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 8, 8)
    luminance, colour = SPLITS["lab"][0](pictures)
    assert SPLITS["lab"][1](3) == (luminance.shape[1], colour.shape[1]) == (1, 2)
    back = lab_to_rgb(torch.cat([100 * luminance, 110 * colour], 1))
    torch.testing.assert_close(back, pictures, atol=1e-4, rtol=0)
    upper, lower = SPLITS["halves"][0](pictures)
    assert upper.shape == lower.shape == pictures.shape
    torch.testing.assert_close(upper[:, :, 0], pictures[:, :, 0])
    torch.testing.assert_close(lower[:, :, -1], pictures[:, :, -1])
    same, drawn = SPLITS["edges"][0](torch.ones(1, 1, 8, 8))
    assert same.min() == 1
    assert drawn.max() < 0.01
    with pytest.raises(UsageError, match=r"split: lab needs colour images .* have 1 channel"):
        METHODS["cmc"].experiment(tiny("cmc", split="lab"), 0)


@pytest.mark.parametrize("name", SHIFTS)
def test_domains_differ_and_repeat(name):
    pictures = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shifted = shift(pictures, name, seed=1)
    assert torch.equal(shifted, shift(pictures, name, seed=1))
    assert 0 <= shifted.min() <= shifted.max() <= 1
    assert (shifted - pictures).abs().mean() > 0.1
    if name in ("noisy", "textured"):
        assert not torch.equal(shifted, shift(pictures, name, seed=2))
    with pytest.raises(ValueError, match=r"shift: expected one of inverted, .*, got 'blue'"):
        shift(pictures, "blue", 0)


def test_a_tilted_image_turns_counter_clockwise():
    dot = torch.zeros(1, 1, 9, 9)
    dot[..., 4, 8] = 1  # on the right, in the middle
    row, column = divmod(int(shift(dot, "tilted", 0).argmax()), 9)
    assert row < 4 < column


def test_lars_follows_its_equations():
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    expected = [weight.detach().clone(), bias.detach().clone()]
    velocity = [torch.zeros(3, 4), torch.zeros(3)]
    optimizer = LARS([weight, bias], lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.01)
    for _ in range(2):
        gradients = [torch.randn(3, 4), torch.randn(3)]
        weight.grad, bias.grad = (gradient.clone() for gradient in gradients)
        optimizer.step()
        decayed = gradients[0] + 0.1 * expected[0]
        gradients[0] = 0.01 * expected[0].norm() / decayed.norm() * decayed
        for index in range(2):
            velocity[index] = 0.9 * velocity[index] + 0.5 * gradients[index]
            expected[index] = expected[index] - velocity[index]
    torch.testing.assert_close(weight.data, expected[0])
    torch.testing.assert_close(bias.data, expected[1])
    silent = nn.Parameter(torch.zeros(2, 2))
    silent.grad = torch.zeros(2, 2)
    LARS([silent], lr=1.0).step()
    assert torch.equal(silent.data, torch.zeros(2, 2))


def test_optimizers_and_schedules_are_what_their_names_say():
    parameters = [nn.Parameter(torch.rand(2, 2)), nn.Parameter(torch.tensor(1.0))]
    for name, kind in (("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam),
                       ("sgd", torch.optim.SGD), ("lars", LARS)):  # fmt: skip
        optimizer = make_optimizer(parameters, Optimization(optimizer=name, weight_decay=0.1))
        assert type(optimizer) is kind
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]

    def rates(schedule, warmup):
        how = Optimization(learning_rate=2.0, schedule=schedule, warmup_epochs=warmup)
        module = nn.Linear(1, 1)
        module.trainer = type(
            "T", (), {"estimated_stepping_batches": 20, "num_training_batches": 2}
        )
        made = configure_optimizers(module, how)
        scheduler = made["lr_scheduler"]["scheduler"]
        values = []
        for _ in range(20):
            values.append(made["optimizer"].param_groups[0]["lr"])
            made["optimizer"].step()
            scheduler.step()
        return values

    cosine = rates("cosine", 2)
    assert cosine[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert cosine[12] == pytest.approx(1.0)
    assert 0 < cosine[-1] < 0.05
    steps = rates("steps", 0)
    assert steps == pytest.approx([2.0] * 12 + [0.2] * 4 + [0.02] * 4)
    assert rates("constant", 0) == [2.0] * 20


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("moco", {"bn_splits": 3}, "bn_splits: expected a divisor of the batch of a device, 320"),
        ("moco", {"momentum": 1.5}, "momentum: expected a number from 0 to 1, got 1.5"),
        ("simclr", {"optimizer": "rmsprop"}, "optimizer: expected adamw, adam, sgd or lars, got"),
        ("simclr", {"recipe": "moco_v2"}, "recipe: 'moco_v2' jitters colour and digits is grey"),
        ("simclr", {"devices": 3, "batch_size": 256}, "batch_size: expected a multiple of devices"),
        ("jigsaw", {"side": 20}, "side: expected an integer >= 24, got 20"),
        ("instdisc", {"form": "exact"}, "form: expected softmax, sampled_softmax or nce, got"),
    ],
)  # fmt: skip
def test_options_out_of_range(name, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        tiny(name, **options).check()


def test_absent_data_set_is_one_sentence(tmp_path):
    options = tiny("simclr", data="cifar10", recipe="simclr", data_root=str(tmp_path))
    with pytest.raises(UsageError, match=r"data: cifar10 needs .*data_batch_1, which is absent"):
        METHODS["simclr"].experiment(options, 0)


def test_tensorboard_is_asked_for_only_where_it_is(tmp_path, monkeypatch):
    from fastcl.trainers import runner

    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="tensorboard: expected the package tensorboard"):
        run("simclr", tiny("simclr", tensorboard=True), seeds=[0], out=tmp_path)
    assert not list(tmp_path.iterdir())

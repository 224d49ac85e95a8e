"""Heads, ResNets, frozen encoders."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fastcl.encoders import (
    MNISTCNN,
    RESNETS,
    LinearHead,
    MLPHead,
    ObjectEncoder,
    SmallCNN,
    TextTransformer,
    TransitionGNN,
    check_fit,
    freeze,
    load_torchvision,
    projection_head,
    resnet18,
    torchvision_state,
)

# parameters of torchvision's models with their classifier of 1000 classes, as it documents them
TORCHVISION = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def published_layout(blocks, bottleneck):
    """Keys and shapes of torchvision's ResNets, written out from their naming scheme."""
    layout = {"conv1.weight": (64, 3, 7, 7)}

    def norm(prefix, width):
        for name in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{prefix}.{name}"] = (width,)
        layout[f"{prefix}.num_batches_tracked"] = ()

    norm("bn1", 64)
    width = 64
    for stage, count in enumerate(blocks, 1):
        channels = 64 * 2 ** (stage - 1)
        out = channels * (4 if bottleneck else 1)
        for block in range(count):
            at = f"layer{stage}.{block}"
            kernels = [(channels, width, 3), (channels, channels, 3)]
            if bottleneck:
                kernels = [(channels, width, 1), (channels, channels, 3), (out, channels, 1)]
            for number, (rows, columns, size) in enumerate(kernels, 1):
                layout[f"{at}.conv{number}.weight"] = (rows, columns, size, size)
                norm(f"{at}.bn{number}", rows)
            if block == 0 and (stage > 1 or bottleneck):
                layout[f"{at}.downsample.0.weight"] = (out, width, 1, 1)
                norm(f"{at}.downsample.1", out)
            width = out
    return layout


@pytest.mark.parametrize(
    ("name", "blocks", "bottleneck"),
    [
        ("resnet18", (2, 2, 2, 2), False),
        ("resnet34", (3, 4, 6, 3), False),
        ("resnet50", (3, 4, 6, 3), True),
    ],
)
def test_resnet_has_the_keys_shapes_and_size_of_torchvisions(name, blocks, bottleneck):
    with torch.device("meta"):
        encoder = RESNETS[name]()
        classifier = nn.Linear(encoder.feature_dim, 1000)
    assert encoder.feature_dim == (2048 if bottleneck else 512)
    state = torchvision_state(encoder, classifier)
    expected = published_layout(blocks, bottleneck)
    expected |= {"fc.weight": (1000, encoder.feature_dim), "fc.bias": (1000,)}
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert parameters(encoder) + parameters(classifier) == TORCHVISION[name]


def test_backbone_moves_both_ways():
    torch.manual_seed(0)
    one, other = resnet18(), resnet18()
    classifier = nn.Linear(512, 10)
    state = torchvision_state(one, classifier)
    load_torchvision(other, state)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(one.eval()(images), other.eval()(images))
    assert one(images).shape == (2, 512)
    assert torch.equal(state["fc.bias"], classifier.bias)

    with pytest.raises(ValueError, match=r"conv1.weight has shape \[64, 3, 7, 7\], expected "
                                         r"\[64, 3, 3, 3\] .* cifar stem"):  # fmt: skip
        load_torchvision(resnet18(stem="cifar"), state)
    with pytest.raises(ValueError, match=r"layer1.2.bn1.bias is missing from it"):
        load_torchvision(RESNETS["resnet34"](), state)
    del state["bn1.weight"]
    with pytest.raises(ValueError, match=r"bn1.weight is missing from it"):
        load_torchvision(other, state)
    with pytest.raises(ValueError, match="expected in_features 512, got 2048"):
        torchvision_state(one, nn.Linear(2048, 10))


def test_head_is_replaced_by_a_classifier():
    """What pretraining hands on: backbone keys as they were, fc.* of ten classes, no head."""
    from fastcl.trainers.simclr import SimCLR

    torch.manual_seed(0)
    module = SimCLR(resnet18(), projection_head("simclr", 512), nn.Identity())
    state = torchvision_state(module.encoder, nn.Linear(512, 10))
    own = {f"encoder.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    pretrained = module.state_dict()
    assert set(own) == {key for key in pretrained if key.startswith("encoder.")}
    assert all(torch.equal(value, pretrained[key]) for key, value in own.items())
    assert state["fc.weight"].shape == (10, 512)


def test_backbone_serves_a_fully_convolutional_net():
    backbone = freeze(resnet18(), "eval").encoder
    score = nn.Conv2d(backbone.feature_dim, 21, 1)
    maps = score(backbone.maps(torch.rand(1, 3, 64, 96)))
    assert maps.shape == (1, 21, 2, 3)  # a stride of 32
    pixels = nn.functional.interpolate(maps, (64, 96), mode="bilinear")
    nn.functional.cross_entropy(pixels, torch.zeros(1, 64, 96).long()).backward()
    assert score.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_stems_keep_what_their_images_need():
    images = torch.rand(2, 3, 32, 32)
    assert resnet18(stem="cifar").maps(images).shape == (2, 512, 4, 4)
    assert resnet18().maps(images).shape == (2, 512, 1, 1)
    with pytest.raises(ValueError, match="stem: expected one of imagenet, cifar, got 'mnist'"):
        resnet18(stem="mnist")
    with pytest.raises(ValueError, match=r"in_channels=3, got \[2, 1, 32, 32\]"):
        resnet18()(images[:, :1])


def test_mnist_cnn():
    encoder = MNISTCNN()
    assert parameters(encoder) == 183_296
    assert encoder(torch.rand(2, 1, 28, 28)).shape == (2, 128)
    assert encoder(torch.rand(2, 1, 8, 8)).shape == (2, 128)


def layers(head):
    return [type(layer).__name__ for layer in head]


def test_heads_have_the_layouts_of_their_papers():
    assert layers(projection_head("moco_v1", 512)) == ["Linear"]
    assert layers(projection_head("moco_v2", 512)) == ["Linear", "ReLU", "Linear"]
    assert layers(projection_head("simclr", 512)) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [tuple(p.shape) for p in projection_head("moco_v2", 512).parameters()] == [
        (512, 512), (512,), (128, 512), (128,)
    ]  # fmt: skip
    deep = MLPHead(8, 16, 4, hidden_layers=2, out_batch_norm=True)
    assert layers(deep) == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert deep(torch.rand(3, 8)).shape == (3, 4)
    assert layers(LinearHead(8, 4, batch_norm=True)) == ["Linear", "BatchNorm1d"]
    with pytest.raises(ValueError, match=r"layout: expected one of .*, got 'mlp'"):
        projection_head("mlp", 8)


@pytest.mark.parametrize(
    "head",
    [
        MLPHead(1280, 16, 4),
        LinearHead(1280, 4),
        nn.Linear(1280, 10),
        nn.Sequential(nn.Linear(1280, 64), nn.ReLU(), nn.Linear(64, 10)),
    ],
    ids=["MLP", "linear", "plain linear", "sequential"],
)
def test_the_classic_wrong_width_is_named_before_anything_runs(head):
    with torch.device("meta"):
        encoder = resnet18()
    with pytest.raises(ValueError, match="in_features=1280, but ResNet gives feature_dim=512"):
        check_fit(encoder, head)
    check_fit(encoder, LinearHead(512, 4))


def test_trainers_refuse_a_wrong_head():
    from fastcl.trainers.moco import MoCo

    with pytest.raises(ValueError, match="in_features=1280, but SmallCNN gives feature_dim=64"):
        MoCo(SmallCNN(width=4), LinearHead(1280, 4), nn.Identity())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: MLPHead(0), ValueError, "in_features: expected an integer >= 1, got 0"),
        (lambda: LinearHead(8, 0), ValueError, "out_features: expected an integer >= 1, got 0"),
        (lambda: ObjectEncoder(image_size=9), ValueError, "image_size: expected at least 10"),
        (lambda: resnet18()(torch.zeros(1, 3, 8, 8).byte()), TypeError, "images: expected float"),
        (lambda: TextTransformer(9, width=4)(torch.tensor([[1, 9]])), ValueError,
         r"tokens holds 1 outside \[0, 9\)"),
        (lambda: TransitionGNN()(torch.zeros(2, 5, 2), torch.tensor([0, 20])), ValueError,
         r"actions holds 1 outside \[0, 20\)"),
        (lambda: TransitionGNN()(torch.zeros(2, 5, 2), torch.zeros(2)), TypeError,
         "actions has shape .* expected a tensor of 2 integers"),
    ],
)  # fmt: skip
def test_bad_input_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_a_lone_object_gets_no_messages():
    assert TransitionGNN()(torch.zeros(2, 1, 2), torch.tensor([0, 3])).shape == (2, 1, 2)


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_frozen_encoder_stays_as_it_says(bn):
    torch.manual_seed(0)
    encoder = nn.Sequential(SmallCNN(width=4), nn.Dropout(0.5))
    encoder[0].feature_dim = 64
    before = copy.deepcopy(encoder.state_dict())
    model = nn.Sequential(freeze(encoder, bn), nn.Linear(64, 3))
    images = 5 + torch.rand(16, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(3):
        model.train()
        model(images).square().sum().backward()
        optimizer.step()
    changed = {
        name for name, value in encoder.state_dict().items() if not value.equal(before[name])
    }
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert changed == (statistics if bn == "train" else set())
    frozen = copy.deepcopy(model).train()[0]
    assert torch.equal(frozen(images), frozen(images))  # no dropout in either mode
    assert not frozen(images).requires_grad
    model.eval()
    assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="bn: expected eval or train, got 'both'"):
        freeze(encoder, "both")
    assert math.isfinite(model(images).sum().item())

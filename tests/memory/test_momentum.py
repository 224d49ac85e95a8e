"""Momentum encoder, its schedule and resume; shuffled and split batch statistics."""

import math

import pytest
import torch
from torch import nn

from fastcl import MomentumEncoder, update_momentum
from fastcl.memory import SplitBatchNorm, cosine_momentum, shuffle_batch, split_batch_norm


def encoder():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


@pytest.mark.parametrize("buffers", [False, True])
def test_update_is_the_average(buffers):
    target, source = encoder(), encoder()
    source(torch.randn(8, 5))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    update_momentum(target, source, 0.9, buffers=buffers)
    moving = set(dict(target.named_parameters()))
    if buffers:
        moving |= {"1.running_mean", "1.running_var"}
    for name, value in target.state_dict().items():
        expected = before[name]
        if name in moving:
            expected = 0.9 * expected + 0.1 * source.state_dict()[name]
        elif buffers:
            expected = source.state_dict()[name]  # num_batches_tracked
        torch.testing.assert_close(value, expected)
    update_momentum(target, source, 0.0)
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_schedule_and_exact_resume():
    assert cosine_momentum(0.99, 0, 10) == pytest.approx(0.99)
    assert cosine_momentum(0.99, 5, 10) == pytest.approx(0.995)
    assert cosine_momentum(0.99, 12, 10) == 1.0
    source = encoder()
    keys_of = MomentumEncoder(source, 0.9, total_steps=8)
    x, seen = torch.randn(6, 5), []
    for _ in range(3):
        seen.append(keys_of.momentum)
        with torch.no_grad():
            source[0].weight.add_(1.0)
        keys_of.update(source)
    steps = [1 - 0.1 * (math.cos(math.pi * k / 8) + 1) / 2 for k in range(3)]
    assert seen == pytest.approx(steps)
    twin = MomentumEncoder(encoder(), 0.9, total_steps=8)
    twin.load_state_dict(keys_of.state_dict())
    for module in (keys_of, twin):
        module.update(source)
    assert twin.momentum == keys_of.momentum
    for a, b in zip(twin.state_dict().values(), keys_of.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(twin(x), keys_of(x))
    assert not keys_of(x.requires_grad_()).requires_grad
    assert all(p.requires_grad for p in source.parameters())


def test_what_cannot_average_is_refused():
    with pytest.raises(ValueError, match=r"momentum is 1.5 \(float\); expected a number in"):
        update_momentum(encoder(), encoder(), 1.5)
    with pytest.raises(ValueError, match="source has 2 parameters and target 6"):
        update_momentum(encoder(), nn.Linear(5, 7), 0.9)
    with pytest.raises(ValueError, match="target is bfloat16, which would round every step away"):
        update_momentum(encoder().bfloat16(), encoder(), 0.999)
    target, source = encoder(), encoder().bfloat16()
    update_momentum(target, source, 0.999)
    assert target[0].weight.dtype == torch.float32


@pytest.mark.parametrize("shape", [(12, 4), (12, 4, 3, 3)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_split_statistics_are_those_of_the_groups(shape, momentum):
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    whole = kind(4, momentum=momentum)
    with torch.no_grad():
        whole.weight.uniform_()
        whole.bias.uniform_()
    split = split_batch_norm(nn.Sequential(kind(4, momentum=momentum)), 3)
    assert isinstance(split[0], SplitBatchNorm)
    split[0].load_state_dict(whole.state_dict())
    for _ in range(2):
        x = torch.randn(shape)
        groups = []
        statistics = []
        for g in range(3):
            one = kind(4, momentum=momentum)
            one.load_state_dict(whole.state_dict())
            groups.append(one(x[g::3]))
            statistics.append((one.running_mean, one.running_var))
        out = split(x)
        for g in range(3):
            torch.testing.assert_close(out[g::3], groups[g])
        whole.running_mean, whole.running_var = (
            torch.stack(s).mean(0) for s in zip(*statistics, strict=True)
        )
        whole.num_batches_tracked += 1
        torch.testing.assert_close(split[0].running_mean, whole.running_mean)
        torch.testing.assert_close(split[0].running_var, whole.running_var)
    torch.testing.assert_close(split.eval()(x), whole.eval()(x))
    with pytest.raises(ValueError, match="batch is 11; expected a multiple of splits = 3"):
        split.train()(x[:11])


def test_shuffle_hides_the_group_from_split_statistics():
    """With statistics split, shuffled keys are normalised in other company; restored, in order."""
    x = torch.randn(12, 4)
    layer = SplitBatchNorm(4, 3)
    shuffled, shuffle = shuffle_batch(x)
    assert not torch.equal(shuffled, x)
    assert torch.equal(shuffle.restore(shuffled), x)
    assert not torch.allclose(shuffle.restore(layer(shuffled)), layer(x))
    torch.manual_seed(4)
    again, _ = shuffle_batch(x)
    torch.manual_seed(4)
    assert torch.equal(shuffle_batch(x)[0], again)

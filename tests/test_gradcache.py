"""GradCache: the gradient of the whole batch, by micro-batches."""

import copy
from collections import UserDict

import pytest
import torch
from torch import nn

from fastcl import (
    CLIPLoss,
    GradCache,
    InfoNCELoss,
    MomentumEncoder,
    NegativeQueue,
    NTXentLoss,
    SigLIPLoss,
)
from fastcl.gradcache import _backed_off, _fitting_size

F64 = torch.float64


def tower(d=5, dropout=0.0):
    layers = [nn.Linear(d, 16), nn.LayerNorm(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8)]
    return nn.Sequential(*layers).double()


def gradients(*modules):
    return [p.grad for m in modules for p in m.parameters() if p.requires_grad]


def assert_equal(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("micro", [1, 5, 12, 100], ids=str)  # one, ragged, dividing, whole
@pytest.mark.parametrize("loss", [NTXentLoss, SigLIPLoss], ids=lambda x: x.__name__)
def test_two_views_and_a_learnable_loss(loss, micro):
    encoder, loss = tower(), loss(0.2, learnable=True).double()
    x1, x2 = torch.randn(24, 5, dtype=F64), torch.randn(24, 5, dtype=F64)
    whole, whole_loss = copy.deepcopy(encoder), copy.deepcopy(loss)
    expected = whole_loss(whole(x1), whole(x2))
    expected.backward()
    calls = []
    cache = GradCache(encoder, loss, micro, progress=lambda *call: calls.append(call))
    value = cache(x1, x2)
    assert not value.requires_grad
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert_equal(gradients(encoder, loss), gradients(whole, whole_loss))
    parts = 2 * -(-24 // micro)
    stages = [
        (stage, done, parts) for stage in ("embed", "backward") for done in range(1, parts + 1)
    ]
    assert calls == stages


def test_several_encoders_inputs_of_many_kinds_and_keywords():
    """A text tower called by keyword, an image tower, ids and metrics; gradients accumulate."""

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = tower(4)

        def forward(self, tokens, mask, flag):
            assert flag == "as is"
            return self.tower(tokens * mask)

    image, text = tower(), Text()
    loss = CLIPLoss(return_metrics=True)
    x = torch.randn(17, 5, dtype=F64)
    words = {"tokens": torch.randn(17, 4, dtype=F64), "mask": torch.ones(17, 1), "flag": "as is"}
    ids = torch.randint(0, 9, (17,))
    twins = copy.deepcopy((image, text))
    for _ in range(2):
        expected, expected_metrics = loss(twins[0](x), twins[1](**words), ids=ids)
        expected.backward()
        tokenizers = UserDict(words)  # as transformers' are
        value, metrics = GradCache([image, text], loss, 4)(x, tokenizers, ids=ids)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(metrics, expected_metrics)
    assert_equal(gradients(image, text), gradients(*twins))


def test_dropout_masks_agree_and_generators_move_on():
    """The same masks by hand: micro-batches in order, one draw each."""
    encoder, loss = tower(dropout=0.4), NTXentLoss()
    x1, x2 = torch.randn(14, 5, dtype=F64), torch.randn(14, 5, dtype=F64)
    whole = copy.deepcopy(encoder)
    torch.manual_seed(5)
    z1, z2 = (torch.cat([whole(part) for part in x.split(4)]) for x in (x1, x2))
    loss(z1, z2).backward()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    GradCache(encoder, loss, 4)(x1, x2)
    assert_equal(gradients(encoder), gradients(whole))
    assert torch.equal(torch.get_rng_state(), after)


def test_buffers_are_those_of_one_pass():
    """Spectral normalisation changes with each forward pass, so both must see the same one."""
    encoder = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)), nn.BatchNorm1d(6)
    ).double()
    loss = NTXentLoss()
    x1, x2 = torch.randn(12, 5, dtype=F64), torch.randn(12, 5, dtype=F64)
    by_hand = copy.deepcopy(encoder)
    parts = [[by_hand(part) for part in x.split(4)] for x in (x1, x2)]
    loss(*(torch.cat(p) for p in parts)).backward()
    GradCache(encoder, loss, 4)(x1, x2)
    assert_equal(gradients(encoder), gradients(by_hand))
    for a, b in zip(encoder.buffers(), by_hand.buffers(), strict=True):
        assert torch.equal(a, b)


def test_moco_queue_and_momentum_encoder_run_once():
    encoder = tower()
    keys_of = MomentumEncoder(encoder)
    queue = NegativeQueue(8, 20, dtype=F64)
    queue.enqueue(torch.randn(20, 8, dtype=F64))
    loss, whole_loss = InfoNCELoss(queue=queue), InfoNCELoss(queue=copy.deepcopy(queue))
    x1, x2 = torch.randn(12, 5, dtype=F64), torch.randn(12, 5, dtype=F64)
    whole = copy.deepcopy(encoder)
    whole_loss(whole(x1), keys_of(x2)).backward()
    calls = []
    cache = GradCache([encoder, keys_of], loss, 5, progress=lambda *call: calls.append(call))
    cache(x1, x2)
    assert_equal(gradients(encoder), gradients(whole))
    torch.testing.assert_close(queue.keys, whole_loss.queue.keys)
    assert (len(calls), calls[-1]) == (9, ("backward", 3, 3))


def test_autocast_and_a_gradient_scaler():
    encoder, loss = tower().float(), NTXentLoss()
    x1, x2 = torch.randn(12, 5), torch.randn(12, 5)
    whole = copy.deepcopy(encoder)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(whole(x1), whole(x2))
        ours = GradCache(encoder, loss, 5, scaler=scaler)(x1, x2)
    scaler.scale(value).backward()
    assert float(ours) == pytest.approx(float(value.detach()), rel=1e-2)
    assert all(g is not None and g.dtype == torch.float32 for g in gradients(encoder))
    assert_equal(gradients(encoder), gradients(whole), 0.02)


def test_automatic_size_fits_the_free_memory(monkeypatch):
    """A Linear keeps its input: 5 floats of 8 bytes, and tanh and so on theirs, per sample."""
    encoder = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.5)).double()
    x = torch.randn(64, 5, dtype=F64)
    kept = (16 + 16) * 8  # of tanh, and of dropout; its input is the batch itself
    monkeypatch.setattr("fastcl.gradcache._free_bytes", lambda device: 2 * 20 * kept)
    state = torch.get_rng_state()
    assert _fitting_size(encoder, x) == 16  # 20 would fit
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in encoder.parameters())
    cache = GradCache(encoder, lambda z: z.square().sum())
    cache(x)
    assert cache.micro_batch_size == 16
    monkeypatch.setattr("fastcl.gradcache._free_bytes", lambda device: 2**40)
    assert _fitting_size(encoder, x) == 64
    monkeypatch.undo()
    cache = GradCache(encoder, lambda z: z.square().sum())
    cache(x)
    assert cache.micro_batch_size == 64


def test_trials_halve_until_they_fit():
    tried = []

    def trial(size, limit):
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError

    assert _backed_off(37, lambda size: trial(size, 5)) == 4
    assert tried == [37, 18, 9, 4]
    with pytest.raises(torch.OutOfMemoryError):
        _backed_off(8, lambda size: trial(size, 0))


def test_errors():
    x, loss, encoder = torch.randn(4, 5, dtype=F64), NTXentLoss(), tower()
    with pytest.raises(TypeError, match=r"encoders .* expected a torch.nn.Module or a list"):
        GradCache(encoder.forward, loss)
    with pytest.raises(ValueError, match="micro_batch_size is 0"):
        GradCache(encoder, loss, 0)
    with pytest.raises(ValueError, match="inputs are absent"):
        GradCache(encoder, loss, 2)()
    with pytest.raises(ValueError, match="inputs came 1; expected 2, one for each encoder"):
        GradCache([encoder, encoder], loss, 2)(x)
    with pytest.raises(ValueError, match=r"inputs hold tensors of \[3, 4\] samples"):
        GradCache(encoder, loss, 2)((x, x[:3]), x)
    with pytest.raises(ValueError, match=r"loss has shape \(8,\).*expected one number"):
        GradCache(encoder, NTXentLoss(reduction="none"), 2)(x, x)
    with pytest.raises(TypeError, match=r"has shape \(10,\).*expected a tensor of 2 rows"):
        GradCache(nn.Flatten(0), loss, 2)(x, x)


def test_ddp_synchronises_once(launch):
    assert launch(("one_synchronisation", 2)) == [["once", "once"]]

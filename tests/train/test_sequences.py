"""Sequences of digits, tones, and the encoders of sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastcl.data import digit_sequences, load_digit_splits, random_tones
from fastcl.data.tones import PITCHES, SAMPLE_RATE, VOICES
from fastcl.encoders import AudioEncoder, GRUContext, SmallCNN, StepEncoder
from fastcl.trainers.outlook import Outlook


def images_of(split):
    return {tuple(image.flatten().tolist()): int(y) for image, y in zip(*split, strict=True)}


def test_sequences_count_up_on_images_of_their_split_alone():
    splits = load_digit_splits(0)
    sequences = digit_sequences(splits.test, 30, 1, context=8, steps=4)
    start = torch.arange(30)[:, None]
    assert torch.equal(sequences.labels, (start + torch.arange(12)) % 10)
    assert sequences.follows.all()
    known = images_of((splits.test.images, splits.test.labels))
    for image, label in zip(
        sequences.images.flatten(0, 1), sequences.labels.flatten(), strict=True
    ):
        assert known[tuple(image.flatten().tolist())] == label
    assert sequences.images.shape == (30, 12, 1, 8, 8)
    again, other = (digit_sequences(splits.test, 30, s, context=8, steps=4) for s in (1, 2))
    assert torch.equal(again.images, sequences.images)
    assert not torch.equal(other.images, sequences.images)


@pytest.mark.parametrize("steps", [1, 4])  # one step: a drawing counts up one time in ten
def test_broken_sequences_break_after_the_context_and_never_count_up(steps):
    train = load_digit_splits(0).train
    sequences = digit_sequences(train, 2000, 0, context=3, steps=steps, broken=0.25)
    assert int((~sequences.follows).sum()) == 500
    counting = (torch.arange(2000)[:, None] + torch.arange(3 + steps)) % 10
    right = sequences.labels == counting
    assert right[:, :3].all()
    assert torch.equal(right.all(1), sequences.follows)
    drawn = sequences.labels[~sequences.follows, 3:]
    assert torch.bincount(drawn.flatten(), minlength=10).min() > 500 * steps / 10 * 0.6


def test_arguments_of_sequences_and_tones_are_checked():
    train = load_digit_splits(0).train
    with pytest.raises(ValueError, match=r"integers >= 1 and a share in .*, got 1, 0, 1, 0.0"):
        digit_sequences(train, 1, 0, context=0, steps=1)
    with pytest.raises(ValueError, match=r"got 1, 1, 1, 1.5"):
        digit_sequences(train, 1, 0, context=1, steps=1, broken=1.5)
    with pytest.raises(ValueError, match=r"count, length, noise: expected .*, got 1, 10, -1"):
        random_tones(1, 0, length=10, noise=-1)


def test_tones_have_the_pitch_and_the_voice_that_their_labels_say():
    length = 16000  # one second: a bin of the spectrum is one hertz
    tones = random_tones(64, 5, length=length, noise=0.0)
    assert set(tones.pitch.tolist()) == set(range(PITCHES))
    assert set(tones.voice.tolist()) == set(range(VOICES))
    power = torch.fft.rfft(tones.waveforms[:, 0].double()).abs().square()
    assert length == SAMPLE_RATE
    for spectrum, pitch, voice in zip(
        power, tones.pitch.tolist(), tones.voice.tolist(), strict=True
    ):
        # vibrato swings by one in a hundred
        lowest, highest = (220 * 2 ** ((pitch + side) / PITCHES) for side in (-0.3, 0.3))

        def share(harmonic, low=lowest, high=highest, spectrum=spectrum):
            part = spectrum[int(harmonic * 0.98 * low) : int(harmonic * 1.02 * high) + 2]
            return float(part.sum() / spectrum.sum())

        assert share(1) > 0.005
        if voice == 0:
            assert share(1) > 0.85
        if voice == 1:
            assert share(1) > 0.8 > 0.01 > share(2)
        if voice == 3:
            assert share(1) < 0.1
    loudness = tones.waveforms.square().mean((1, 2))
    torch.testing.assert_close(loudness, torch.full((64,), 0.5), atol=0.01, rtol=0)
    noisy = random_tones(64, 5, length=length, noise=0.5).waveforms
    assert float(noisy.square().mean()) == pytest.approx(0.75, abs=0.01)
    first, again = (random_tones(3, 5, length=99).waveforms for _ in range(2))
    assert torch.equal(first, again)


def test_audio_encoder_gives_one_feature_per_hop_and_is_local():
    torch.manual_seed(0)
    encoder = AudioEncoder(8).eval()
    waveforms = torch.randn(2, 1, 160 * 20)
    features = encoder(waveforms)
    assert features.shape == (2, 20, 8)
    changed = waveforms.clone()
    changed[0, 0, 160 * 15 :] += 1
    differs = (encoder(changed) - features).abs().amax(2) > 0
    # a feature sees 465 samples about its own 160
    assert not differs[1].any()
    assert not differs[0, :13].any()
    assert differs[0, 16:].all()
    assert [layer.stride[0] for layer in encoder.layers[::3]] == [5, 4, 2, 2, 2]
    assert [layer.kernel_size[0] for layer in encoder.layers[::3]] == [10, 8, 4, 4, 4]
    assert AudioEncoder().feature_dim == 512
    with pytest.raises(ValueError, match=r"L a multiple of 160, got \[2, 1, 161\]"):
        encoder(torch.randn(2, 1, 161))


def test_steps_are_encoded_alone_and_context_looks_only_back():
    torch.manual_seed(0)
    encoder = StepEncoder(SmallCNN(width=4), 6).eval()
    context = GRUContext(6, 5)
    sequences = torch.rand(3, 4, 1, 8, 8)
    features = encoder(sequences)
    assert features.shape == (3, 4, 6)
    torch.testing.assert_close(encoder(sequences[1:2, 2:3])[0, 0], features[1, 2])
    contexts = context(features)
    assert contexts.shape == (3, 4, 5)
    later = features.clone()
    later[:, 2] += 1
    differs = (context(later) - contexts).abs().amax((0, 2)) > 0
    assert differs.tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match=r"features: expected shape \[B, T, 6\], got \[3, 6\]"):
        context(features[:, 0])


def test_outlook_scores_against_loops():
    generator = torch.Generator().manual_seed(0)
    predictions, targets = torch.randn(2, 6, 2, 5, generator=generator)
    outlook = Outlook(torch.zeros(6, 1), torch.zeros(6, 1), predictions, targets)
    scores = np.array(
        [[(predictions[i] * targets[j]).mean().item() for j in range(6)] for i in range(6)]
    )
    np.testing.assert_allclose(outlook.scores(), scores.diagonal(), rtol=1e-5)
    grouped = outlook.group_scores(3)
    np.testing.assert_allclose(grouped[0], scores[:3, :3], rtol=1e-5)
    np.testing.assert_allclose(grouped[1], scores[3:, 3:], rtol=1e-5)
    right = [scores[i, i] == scores[i, i // 3 * 3 : i // 3 * 3 + 3].max() for i in range(6)]
    assert outlook.accuracy(3) == np.mean(right)
    torch.testing.assert_close(outlook.step(1).scores(), (predictions * targets)[:, 1].mean(1))

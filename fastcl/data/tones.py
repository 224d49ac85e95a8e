"""Generated sounds: several voices sing notes, with vibrato, in noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SAMPLE_RATE = 16_000
PITCHES = 8
_LOWEST = 220.0  # Hz
_HARMONICS = np.arange(1, 11)
_VOICES = np.stack(
    [
        _HARMONICS**-2.0,  # soft
        np.where(_HARMONICS % 2, 1.0 / _HARMONICS, 0.0),  # hollow: odd harmonics alone
        1.0 / _HARMONICS,  # bright
        np.exp(-(((_HARMONICS - 4) / 1.5) ** 2)) + 0.1 / _HARMONICS,  # a formant at the fourth
    ]
)
VOICES = len(_VOICES)
_VIBRATO_HZ, _VIBRATO_SECONDS = 5.0, 3e-4
_DETUNING = 0.3  # of the distance between two pitches, to either side


@dataclass(frozen=True)
class Tones:
    """N clips: ``waveforms`` [N, 1, L] float32; ``pitch`` [N] in [0, 8) and ``voice`` [N] in
    [0, 4), int64."""

    waveforms: torch.Tensor
    pitch: torch.Tensor
    voice: torch.Tensor

    def __len__(self) -> int:
        return len(self.pitch)


def random_tones(count: int, seed: int, *, length: int, noise: float = 0.3) -> Tones:
    """One note in each clip, at 16 kHz: pitch, voice, tuning and phases drawn at random.

    The eight pitches divide an octave above 220 Hz; a note may lie up to 0.3 of their distance
    beside its own. Every clip is equally loud, so loudness tells nothing apart.

    Args:
        count: N.
        seed: of everything drawn.
        length: L, samples.
        noise: standard deviation of the white noise; the tone's is 1 / sqrt(2).

    Raises:
        ValueError: ``count`` or ``length`` below 1, or ``noise`` below 0.
    """
    if min(count, length) < 1 or noise < 0:
        raise ValueError(
            "count, length, noise: expected integers >= 1 and a number >= 0, "
            f"got {count}, {length}, {noise}"
        )
    generator = np.random.default_rng(seed)
    pitch = generator.integers(0, PITCHES, count)
    voice = generator.integers(0, VOICES, count)
    detuned = pitch + generator.uniform(-_DETUNING, _DETUNING, count)
    frequencies = _LOWEST * 2 ** (detuned / PITCHES)
    seconds = np.arange(length) / SAMPLE_RATE
    swing = np.sin(2 * np.pi * (_VIBRATO_HZ * seconds + generator.random((count, 1))))
    turns = frequencies[:, None] * (seconds + _VIBRATO_SECONDS * swing)
    turns = (turns % 1.0).astype(np.float32)  # in float32 sines cost a fraction
    strengths = (_VOICES[voice] / np.linalg.norm(_VOICES[voice], axis=1, keepdims=True)).T
    phases = generator.random((len(_HARMONICS), count), dtype=np.float32)
    waveforms = generator.standard_normal((count, length), dtype=np.float32)
    waveforms *= np.float32(noise)
    for harmonic, strength, phase in zip(_HARMONICS, strengths, phases, strict=True):
        angle = np.float32(2 * np.pi) * (np.float32(harmonic) * turns + phase[:, None])
        waveforms += strength[:, None].astype(np.float32) * np.sin(angle)
    return Tones(
        torch.from_numpy(waveforms).unsqueeze(1),
        torch.from_numpy(pitch),
        torch.from_numpy(voice),
    )

"""Contrastive predictive coding of sound; the LightningModule is that of sequences of images."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from fastcl import CPCLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.tones import PITCHES, VOICES, Tones, random_tones
from fastcl.encoders import AudioEncoder, GRUContext
from fastcl.evaluation import predictive_figures
from fastcl.evaluation.features import calibrate_batch_norm
from fastcl.trainers.cpc import CPC
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.predictive import CPCAudioOptions
from fastcl.trainers.outlook import look_ahead, probe_scores

_SCORED, _GROUP = 1024, 64  # held-out clips, and among how many of them the true one is picked
_TEST_SEED, _VALIDATION_SEED = 2**32, 2**32 + 1  # runs' own seeds lie below
_PROBED, _CALIBRATED = 1024, 256  # training clips


def experiment(options: CPCAudioOptions, seed: int) -> Experiment:
    """CPC of generated notes; the test clips are the same for every seed."""

    def draw(count: int, seed: int) -> Tones:
        return random_tones(count, seed, length=options.window, noise=options.noise)

    training = draw(options.clips, seed)
    held_out = draw(_SCORED, _TEST_SEED if options.report_on == "test" else _VALIDATION_SEED)

    def scores(module: CPC) -> dict[str, float]:
        known = look_ahead(module, training.waveforms[:_PROBED])
        outlook = look_ahead(module, held_out.waveforms)
        result = {"contrastive": outlook.accuracy(_GROUP)}
        for what in ("pitch", "voice"):
            labels = getattr(training, what)[:_PROBED], getattr(held_out, what)
            probes = probe_scores(known, labels[0], outlook, labels[1])
            result |= {f"{what} {name}": value for name, value in probes.items()}
        return result

    def figures(module: CPC, folder: Path) -> list[str]:
        outlook = look_ahead(module, held_out.waveforms)
        predictive_figures.sound(
            [outlook.step(step).accuracy(_GROUP) for step in range(options.predicted_steps)],
            1 / _GROUP,
            outlook.context,
            {"pitch": held_out.pitch, "voice": held_out.voice},
            path=folder / "contexts.png",
        )
        return ["contexts.png"]

    size = options.batch_size
    return Experiment(
        module=build_cpc_audio(options, training.waveforms[:_CALIBRATED], seed),
        batches=EpochShuffledBatches(training.waveforms, options.batch_size, seed),
        scores=scores,
        headline="pitch c",
        measured=f"contrastive: true continuation picked among {_GROUP}; linear probes",
        data="generated notes of eight pitches and four voices in noise",
        references={
            "chance": {"contrastive": 1 / _GROUP}
            | {f"pitch {name}": 1 / PITCHES for name in ("z", "c", "z+c")}
            | {f"voice {name}": 1 / VOICES for name in ("z", "c", "z+c")}
        },
        levels={"loss": math.log(size), "contrastive_accuracy": 1 / size}
        if options.negatives == "batch"
        else {},
        figures=figures,
    )


def build_cpc_audio(options: CPCAudioOptions, waveforms: torch.Tensor, seed: int) -> CPC:
    """The module with its initial parameters, a function of ``options`` and ``seed``; batch norm
    starts from the statistics of ``waveforms`` [N, 1, L]."""
    torch.manual_seed(seed)
    encoder = AudioEncoder(options.channels)
    calibrate_batch_norm(encoder, waveforms)
    return CPC(
        encoder,
        GRUContext(options.channels, options.context_features),
        CPCLoss(
            options.context_features,
            options.channels,
            options.predicted_steps,
            negatives=options.negatives,
            return_metrics=True,
        ),
        context_steps=options.context_steps,
        optimization=options,
    )

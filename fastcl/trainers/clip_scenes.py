"""CLIP and SigLIP between images and captions of a generated world."""

from __future__ import annotations

import statistics

import torch

from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.scenes import CAPTION_LENGTH, Scenes, load_scenes
from fastcl.data.tokens import WordTokenizer
from fastcl.encoders import SmallCNN, TextTransformer
from fastcl.evaluation.features import calibrate_batch_norm, extract_features
from fastcl.evaluation.probe import linear_probe
from fastcl.trainers import texts
from fastcl.trainers.clip import CLIP, build_clip, chance_levels
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.texts import SceneCLIPOptions


def experiment(options: SceneCLIPOptions, seed: int) -> Experiment:
    """Images and captions, judged by retrieval among scenes never trained on."""
    splits = load_scenes(options.drawings)
    scored: Scenes = getattr(splits, options.report_on)
    tokenizer = WordTokenizer.of_texts(splits.train.captions(), buckets=1)
    seen, found = (
        tokenizer.encode(scenes.captions(), CAPTION_LENGTH) for scenes in (splits.train, scored)
    )
    once = len(seen) // options.drawings  # drawings of a scene share its caption
    torch.manual_seed(seed)
    cnn = SmallCNN(in_channels=3, width=options.cnn_width)
    calibrate_batch_norm(cnn, splits.train.images)
    text = TextTransformer(
        tokenizer.vocabulary_size,
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        max_length=CAPTION_LENGTH,
        pooling=options.pooling,
        dropout=options.dropout,
    )

    def scores(module: CLIP) -> dict[str, float]:
        known, asked = (extract_features(module.towers.second, x) for x in (seen[:once], found))
        probe = reading(known, splits.train.objects[:once], asked, scored.objects)
        return {**texts.search_scores(*module.embed(scored.images, found)), "text probe": probe}

    return Experiment(
        module=build_clip(options, cnn, text),
        batches=EpochShuffledBatches((splits.train.images, seen), options.batch_size, seed),
        scores=scores,
        headline="recall@1",
        measured="Images found by their caption, among scenes never trained on; shape and colour "
        "of either object read off a caption's frozen features by a linear probe",
        data="generated images of two coloured shapes and their captions",
        references={"chance": {**texts.chance_scores(len(scored)), "text probe": 0.25}},
        levels=chance_levels(options),
    )


def reading(
    known: torch.Tensor, known_objects: torch.Tensor, asked: torch.Tensor, objects: torch.Tensor
) -> float:
    """Mean accuracy of four linear probes on features [N, D] and [M, D] of captions: shape and
    colour of the object said first and of the other, as in :class:`Scenes`.

    The words alone do not tell: both objects have a shape and a colour, and only their order says
    which is whose.
    """
    rows, others = known.cpu().numpy(), asked.cpu().numpy()
    return statistics.fmean(
        linear_probe(
            rows, known_objects[:, which, what].numpy(), others, objects[:, which, what].numpy(),
            labels_per_class=None,
        )
        for which in range(2)
        for what in range(2)
    )  # fmt: skip

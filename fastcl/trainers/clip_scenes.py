"""CLIP and SigLIP between images and captions of a generated world."""

from __future__ import annotations

import torch

from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.scenes import CAPTION_LENGTH, Scenes, load_scenes
from fastcl.data.tokens import WordTokenizer
from fastcl.encoders import SmallCNN, TextTransformer
from fastcl.evaluation.features import calibrate_batch_norm
from fastcl.trainers import texts
from fastcl.trainers.clip import build_clip, chance_levels
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
    return Experiment(
        module=build_clip(options, cnn, text),
        batches=EpochShuffledBatches((splits.train.images, seen), options.batch_size, seed),
        scores=lambda module: texts.search_scores(*module.embed(scored.images, found)),
        headline="recall@1",
        measured="Images found by their caption, among scenes never trained on",
        data="generated images of two coloured shapes and their captions",
        references={"chance": texts.chance_scores(len(scored))},
        levels=chance_levels(options),
    )

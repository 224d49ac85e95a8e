"""Methods that learn from text, or from images and text."""

from __future__ import annotations

from dataclasses import dataclass

from fastcl.trainers.methods.record import Method
from fastcl.trainers.options import (
    TrainOptions,
    check_at_least,
    check_choice,
    check_fraction,
    check_positive,
)


@dataclass(frozen=True)
class TokenOptions(TrainOptions):
    """What methods with a text encoder share; every choice was made on validation data.

    Args:
        width: of embeddings and features.
        depth: transformer layers; 0 pools word embeddings.
        heads: of the attention.
        pooling: mean of the tokens, or cls, the first token's state.
        dropout: of embeddings and layers.
        word_dropout: share of the words that training leaves out of each text.
        temperature: divisor of the cosines, or its first value where it is learnt.
    """

    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    warmup_epochs: int = 1
    width: int = 128
    depth: int = 0
    heads: int = 4
    pooling: str = "mean"
    dropout: float = 0.1
    word_dropout: float = 0.3
    temperature: float = 0.07

    def check(self) -> None:
        super().check()
        for name in ("width", "heads"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("depth", self.depth, 0)
        check_choice("pooling", self.pooling, ("mean", "cls"))
        check_fraction("dropout", self.dropout)
        check_fraction("word_dropout", self.word_dropout)
        check_positive("temperature", self.temperature)


@dataclass(frozen=True)
class CodeOptions(TokenOptions):
    """What methods that learn from documented functions share.

    Args:
        vocabulary: words with an embedding of their own; all others share 512.
        source_length: tokens of a function's source that are read.
        docstring_length: tokens of a docstring that are read.
    """

    vocabulary: int = 4096
    source_length: int = 96
    docstring_length: int = 32

    def check(self) -> None:
        super().check()
        check_at_least("vocabulary", self.vocabulary, 1)
        for name in ("source_length", "docstring_length"):
            check_at_least(name, getattr(self, name), 2)


@dataclass(frozen=True)
class TowerOptions(TokenOptions):
    """What two towers can be told.

    Args:
        loss: clip (softmax over the batch, both ways) or siglip (a sigmoid for every pair).
        dim: where both towers meet.
        bias: the first value of siglip's learnable bias.
    """

    loss: str = "clip"
    dim: int = 128
    bias: float = -10.0

    def check(self) -> None:
        super().check()
        check_choice("loss", self.loss, ("clip", "siglip"))
        check_at_least("dim", self.dim, 1)


@dataclass(frozen=True)
class CLIPOptions(TowerOptions, CodeOptions):
    """CLIP (Radford et al. 2021) or SigLIP (Zhai et al. 2023) of sources and docstrings."""


@dataclass(frozen=True)
class SceneCLIPOptions(TowerOptions):
    """CLIP (Radford et al. 2021) or SigLIP (Zhai et al. 2023) of images and captions.

    Args:
        drawings: images of every training scene.
        cnn_width: channels of the image encoder's first convolution.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 3e-3
    depth: int = 1
    dropout: float = 0.0
    word_dropout: float = 0.0
    drawings: int = 4
    cnn_width: int = 8

    def check(self) -> None:
        super().check()
        check_at_least("drawings", self.drawings, 1)
        check_at_least("cnn_width", self.cnn_width, 1)


@dataclass(frozen=True)
class SimCSEOptions(CodeOptions):
    """SimCSE (Gao et al. 2021), one encoder for docstrings and sources.

    Args:
        supervised: the positive of a docstring is its function's source and the hard negative the
            source of another function of the same module; otherwise a text is its own positive,
            under another dropout mask.
        hard_negative_weight: added to the logit of a docstring's own hard negative.
        head: train through the paper's head. Off, for the features of an encoder this small learn
            little behind it.
    """

    epochs: int = 5
    learning_rate: float = 1e-2
    word_dropout: float = 0.0
    temperature: float = 0.2
    supervised: bool = False
    hard_negative_weight: float = 0.0
    head: bool = False


METHODS = (
    Method(
        name="clip",
        title="CLIP",
        summary="two towers meet where what belongs together is near (CLIP or SigLIP)",
        options=CLIPOptions,
        module="fastcl.trainers.clip",
        fast={"epochs": 6},
    ),
    Method(
        name="clip_scenes",
        title="CLIP of images and captions",
        summary="an image and its caption meet in one space (CLIP or SigLIP)",
        options=SceneCLIPOptions,
        module="fastcl.trainers.clip_scenes",
        fast={"epochs": 5},
    ),
    Method(
        name="simcse",
        title="SimCSE",
        summary="a text attracts itself under another dropout mask, or its given partner (InfoNCE)",
        options=SimCSEOptions,
        module="fastcl.trainers.simcse",
        fast={"epochs": 2},
    ),
)

"""Encoders (images or texts to features) and the heads that sit on them during pretraining."""

from fastcl.encoders.captioner import LSTMCaptioner
from fastcl.encoders.cnn import SmallCNN
from fastcl.encoders.heads import MLPHead
from fastcl.encoders.text import HuggingFaceEncoder, TextTransformer
from fastcl.encoders.two_tower import TwoTower

__all__ = [
    "HuggingFaceEncoder",
    "LSTMCaptioner",
    "MLPHead",
    "SmallCNN",
    "TextTransformer",
    "TwoTower",
]

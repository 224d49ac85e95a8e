"""Encoders (images, texts, sounds, worlds to features) and the heads on them in pretraining."""

from fastcl.encoders.audio import AudioEncoder
from fastcl.encoders.captioner import LSTMCaptioner
from fastcl.encoders.cnn import MNISTCNN, SmallCNN
from fastcl.encoders.context import GRUContext, StepEncoder
from fastcl.encoders.freezing import Frozen, freeze
from fastcl.encoders.heads import LinearHead, MLPHead, check_fit, projection_head
from fastcl.encoders.objects import ObjectEncoder, TransitionGNN
from fastcl.encoders.resnet import (
    RESNETS,
    ResNet,
    load_torchvision,
    resnet18,
    resnet34,
    resnet50,
    torchvision_state,
)
from fastcl.encoders.text import HuggingFaceEncoder, TextTransformer
from fastcl.encoders.two_tower import TwoTower

__all__ = [
    "MNISTCNN",
    "RESNETS",
    "AudioEncoder",
    "Frozen",
    "GRUContext",
    "HuggingFaceEncoder",
    "LSTMCaptioner",
    "LinearHead",
    "MLPHead",
    "ObjectEncoder",
    "ResNet",
    "SmallCNN",
    "StepEncoder",
    "TransitionGNN",
    "TextTransformer",
    "TwoTower",
    "check_fit",
    "freeze",
    "load_torchvision",
    "projection_head",
    "resnet18",
    "resnet34",
    "resnet50",
    "torchvision_state",
]

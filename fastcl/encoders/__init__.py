"""Encoders (images to features) and the heads that sit on them while they are pretrained."""

from fastcl.encoders.cnn import MNISTCNN, SmallCNN
from fastcl.encoders.freezing import Frozen, freeze
from fastcl.encoders.heads import LinearHead, MLPHead, check_fit, projection_head
from fastcl.encoders.resnet import (
    RESNETS,
    ResNet,
    load_torchvision,
    resnet18,
    resnet34,
    resnet50,
    torchvision_state,
)

__all__ = [
    "MNISTCNN",
    "RESNETS",
    "Frozen",
    "LinearHead",
    "MLPHead",
    "ResNet",
    "SmallCNN",
    "check_fit",
    "freeze",
    "load_torchvision",
    "projection_head",
    "resnet18",
    "resnet34",
    "resnet50",
    "torchvision_state",
]

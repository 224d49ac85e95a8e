"""Encoders (images to features) and the heads that sit on them while they are pretrained."""

from fastcl.encoders.cnn import SmallCNN
from fastcl.encoders.heads import MLPHead

__all__ = ["MLPHead", "SmallCNN"]

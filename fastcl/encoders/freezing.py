"""Encoders that are used as they are."""

from __future__ import annotations

import torch
from torch import nn

_MODES = ("eval", "train")


class Frozen(nn.Module):
    """An encoder that gives features and does not learn, whatever the model around it does.

    Made by :func:`freeze`; ``encoder`` is the encoder itself.
    """

    def __init__(self, encoder: nn.Module, bn: str):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.bn = bn
        self.train(encoder.training)

    def train(self, mode: bool = True) -> Frozen:
        """Batch norm follows ``mode`` only with ``bn="train"``; dropout never does."""
        super().train(mode)
        for module in self.encoder.modules():
            normalises = isinstance(module, nn.modules.batchnorm._BatchNorm)
            module.training = mode and normalises and self.bn == "train"
        return self

    @torch.no_grad()
    def forward(self, *args, **kwargs):
        """The encoder's features, without a graph."""
        return self.encoder(*args, **kwargs)

    def __getattr__(self, name: str):
        if name == "feature_dim":
            return self.encoder.feature_dim
        return super().__getattr__(name)


def freeze(encoder: nn.Module, bn: str = "eval") -> Frozen:
    """An encoder to build on without training it.

    Args:
        encoder: any module; its parameters no longer require a gradient.
        bn: what batch norm does when the model around it is in training mode. "eval": it uses its
            running statistics, so parameters and buffers stay as they are to the last bit.
            "train": it normalises by the batch and its running statistics go on moving, as in
            code that never calls ``eval()``; only parameters stay. Published frozen-encoder
            figures exist of both kinds and differ.

    Raises:
        ValueError: another ``bn``.
    """
    if bn not in _MODES:
        raise ValueError(f"bn: expected eval or train, got {bn!r}")
    return Frozen(encoder, bn)

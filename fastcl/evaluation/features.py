"""Frozen features of an encoder."""

from __future__ import annotations

import torch
from torch import nn

from fastcl.data.splits import unit_range


@torch.no_grad()
def extract_features(
    encoder: nn.Module, images: torch.Tensor, batch_size: int = 1024
) -> torch.Tensor:
    """Features [N, D] of images [N, ...], the encoder in evaluation mode.

    Images (uint8 ones scaled to [0, 1]) go to the encoder's device and dtype part by part, and the
    features stay there. The encoder's own mode is put back afterwards; no random number is drawn by
    layers that obey the mode.
    """
    was_training = encoder.training
    encoder.eval()
    weight = next(encoder.parameters(), images)
    features = torch.cat([encoder(_like(part, weight)) for part in images.split(batch_size)])
    encoder.train(was_training)
    return features


def _like(images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    images = unit_range(images.to(weight.device))
    both = images.is_floating_point() and weight.is_floating_point()  # neither ids nor bytes
    return images.to(weight.dtype) if both else images


@torch.no_grad()
def calibrate_batch_norm(module: nn.Module, inputs: torch.Tensor) -> None:
    """Set every batch norm's running mean and variance to those of ``inputs`` [N, ...], in place.

    An encoder that was never trained still carries mean 0 and variance 1 there, which would make
    it a needlessly weak baseline. Momentum and mode are put back afterwards.
    """
    norms = [
        layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]
    momenta = [norm.momentum for norm in norms]
    was_training = module.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average: here, of the one pass below
    module.train()
    module(inputs)
    module.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum

"""The methods that ``fastcl train`` knows, by name; importing this needs nothing but Python."""

from __future__ import annotations

from fastcl.trainers.methods import captions, images, metric, predictive, texts
from fastcl.trainers.methods.record import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *images.METHODS,
        *predictive.METHODS,
        *metric.METHODS,
        *texts.METHODS,
        *captions.METHODS,
    )
}

__all__ = ["METHODS", "Method"]

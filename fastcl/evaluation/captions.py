"""Do captions tell images apart?"""

from __future__ import annotations

import torch

from fastcl.data.scenes import COLOURS, PLACES, SHAPES, Scenes
from fastcl.encoders.captioner import LSTMCaptioner

_FILLERS = {"a"}


@torch.no_grad()
def self_retrieval(
    captioner: LSTMCaptioner, features: torch.Tensor, captions: torch.Tensor
) -> float:
    """Share of captions [N, L] likelier for their own image than for each other; in [0, 1].

    ``captions[i]`` was made for the image whose features are ``features[i]``, [N, D]. Images that
    are equally likely share the hit. One caption at a time is tried on all images.

    Source: Dai and Lin 2017, section 4.3.
    """
    hits = 0.0
    for index, caption in enumerate(captions):
        likelihoods = captioner(features, caption.expand(len(features), -1))
        best = likelihoods == likelihoods.max()
        hits += (best[index] / best.sum()).item()
    return hits / len(captions)


def listener_recall(captions: list[str], scenes: Scenes) -> float:
    """Chance that someone who understands caption i picks scene i out of all; in [0, 1].

    The listener picks at random among the scenes of which everything is true that the caption
    says: its two parts, joined by "and", are about the first and the second object. Where nothing
    fits, or a part says nothing, the pick is wrong.
    """
    objects = [[_words(*thing) for thing in scene] for scene in scenes.objects.tolist()]
    hits = 0.0
    for index, caption in enumerate(captions):
        parts = [set(part.split()) - _FILLERS for part in caption.split(" and ")]
        if len(parts) != 2 or not all(parts):
            continue
        fitting = [parts[0] <= first and parts[1] <= second for first, second in objects]
        if fitting[index]:
            hits += 1 / sum(fitting)
    return hits / len(captions)


def _words(shape: int, colour: int, place: int) -> set[str]:
    return {SHAPES[shape], list(COLOURS)[colour], *PLACES[place].split()}

"""Other libraries' losses as steps; imported inside, so that a missing one costs its row only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import TEMPERATURE, Case

Step = Callable[..., Tensor]


def pml_supcon(case: Case) -> Step:
    from pytorch_metric_learning.losses import SelfSupervisedLoss, SupConLoss

    return SelfSupervisedLoss(SupConLoss(temperature=TEMPERATURE))


def pml_ntxent(case: Case) -> Step:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE))


def info_nce_clip(case: Case) -> Step:
    from info_nce import InfoNCE

    loss = InfoNCE(temperature=TEMPERATURE)
    return lambda a, b: (loss(a, b) + loss(b, a)) / 2


def info_nce_queue(case: Case) -> Step:
    from info_nce import InfoNCE

    return InfoNCE(temperature=TEMPERATURE)


def lightly(case: Case) -> Step:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)


def open_clip(case: Case) -> Step:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda a, b: loss(F.normalize(a, dim=1), F.normalize(b, dim=1), 1 / TEMPERATURE)


def sentence_transformers(case: Case) -> Step:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(
        nn.Identity(),
        scale=1 / TEMPERATURE,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    return lambda a, b: loss.compute_loss_from_embeddings([a, b], None)


def inf_cl(case: Case) -> Step:
    from inf_cl import cal_inf_loss

    def step(a, b):
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        scale = torch.tensor(1 / TEMPERATURE)
        return (cal_inf_loss(a, b, scale=scale) + cal_inf_loss(b, a, scale=scale)) / 2

    return step

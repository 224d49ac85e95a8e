"""Other libraries' losses as steps; imported inside, so that a missing one costs its row only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import SIGLIP_BIAS, TEMPERATURE, Case

Step = Callable[..., Tensor]


def pml_views(case: Case) -> Step:
    from pytorch_metric_learning.losses import SelfSupervisedLoss, SupConLoss

    return SelfSupervisedLoss(SupConLoss(temperature=TEMPERATURE))


def pml_supcon(case: Case) -> Step:
    from pytorch_metric_learning.losses import SupConLoss

    loss = SupConLoss(temperature=TEMPERATURE)
    return lambda a, b, labels: loss(torch.cat([a, b]), labels.repeat(2))


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


def lightly_dcl(case: Case) -> Step:
    from lightly.loss import DCLLoss

    return DCLLoss(temperature=TEMPERATURE)


def open_clip(case: Case) -> Step:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda a, b: loss(F.normalize(a, dim=1), F.normalize(b, dim=1), 1 / TEMPERATURE)


def open_clip_siglip(case: Case) -> Step:
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()
    return lambda a, b: loss(
        F.normalize(a, dim=1), F.normalize(b, dim=1), 1 / TEMPERATURE, SIGLIP_BIAS
    )


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
        scale = torch.tensor(1 / TEMPERATURE, device=a.device)
        options = {"scale": scale, "head_dim": min(256, case.width)}
        return (cal_inf_loss(a, b, **options) + cal_inf_loss(b, a, **options)) / 2

    return step


def cce_clip(impl: str, case: Case) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def step(a, b):
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        target = torch.arange(a.shape[0], device=a.device)
        there = linear_cross_entropy(a / TEMPERATURE, b, target, impl=impl)
        back = linear_cross_entropy(b / TEMPERATURE, a, target, impl=impl)
        return (there + back) / 2

    return step


def cce_queue(impl: str, case: Case) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def step(q, k, queue):
        # class 0 stands in for a positive, as with torch's linear_cross_entropy
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        target = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
        losses = linear_cross_entropy(
            q / TEMPERATURE, queue, target, reduction="none", impl=impl
        ).float()
        negatives = losses + (q @ queue[0]) / TEMPERATURE
        return F.softplus(negatives - (q * k).sum(1) / TEMPERATURE).mean()

    return step

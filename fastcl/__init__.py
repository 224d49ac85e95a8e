"""Contrastive losses for PyTorch: fused, exact in every precision, memory linear in the batch.

    from fastcl import NTXentLoss
    loss = NTXentLoss(temperature=0.1)(z1, z2)

Losses are modules here and functions in :mod:`fastcl.functional`; the primitives they are made of
are in :mod:`fastcl.ops`. Importing this needs torch alone.
"""

from . import _checkout, functional, mining, ops
from .gradcache import GradCache
from .losses import (
    CLIPLoss,
    CMCLoss,
    DCLLoss,
    DCLWLoss,
    DebiasedLoss,
    HardNegativeLoss,
    InfoNCELoss,
    LiftedStructureLoss,
    MarginSoftmaxLoss,
    MemoryBankLoss,
    MinedTripletLoss,
    MultiSimilarityLoss,
    NTXentLoss,
    PairwiseContrastiveLoss,
    SigLIPLoss,
    SupConLoss,
    TripletLoss,
    TripletScoreLoss,
)
from .memory import MemoryBank, MomentumEncoder, NegativeQueue, update_momentum
from .ops import Pairs, backends, set_workspace, use_backend

_checkout.install()

__version__ = "0.1.0"

__all__ = [
    "CLIPLoss",
    "CMCLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "GradCache",
    "HardNegativeLoss",
    "InfoNCELoss",
    "LiftedStructureLoss",
    "MarginSoftmaxLoss",
    "MemoryBank",
    "MemoryBankLoss",
    "MinedTripletLoss",
    "MomentumEncoder",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "NegativeQueue",
    "Pairs",
    "PairwiseContrastiveLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TripletLoss",
    "TripletScoreLoss",
    "__version__",
    "backends",
    "functional",
    "mining",
    "ops",
    "set_workspace",
    "update_momentum",
    "use_backend",
]

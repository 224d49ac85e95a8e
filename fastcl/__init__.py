"""Contrastive losses for PyTorch: fused, exact in every precision, memory linear in the batch.

    from fastcl import NTXentLoss
    loss = NTXentLoss(temperature=0.1)(z1, z2)

Losses are modules here and functions in :mod:`fastcl.functional`; the primitives they are made of
are in :mod:`fastcl.ops`. Importing this needs torch alone.
"""

from . import _checkout, functional, mining, ops
from .compat import patch, unpatch
from .gradcache import GradCache
from .losses import (
    BlockContrastiveLoss,
    CaptionContrastiveLoss,
    CLIPLoss,
    CMCLoss,
    ConditionalContrastiveLoss,
    CPCBCELoss,
    CPCLoss,
    CSWMLoss,
    DCLLoss,
    DCLWLoss,
    DebiasedLoss,
    DomainSupConLoss,
    HardNegativeLoss,
    InBatchCMCLoss,
    InfoNCELoss,
    LiftedStructureLoss,
    MarginSoftmaxLoss,
    MemoryBankLoss,
    MIBCompression,
    MinedTripletLoss,
    MultiSimilarityLoss,
    NCELoss,
    NTXentLoss,
    PairwiseContrastiveLoss,
    PatchNCELoss,
    Score,
    SigLIPLoss,
    SimCSELoss,
    SupConLoss,
    TransELoss,
    TripletLoss,
    TripletScoreLoss,
    VIBCompression,
    ZLPRLoss,
)
from .memory import MemoryBank, MomentumEncoder, NegativeQueue, update_momentum
from .ops import Pairs, backends, set_workspace, use_backend

_checkout.install()

__version__ = "0.1.0"

__all__ = [
    "BlockContrastiveLoss",
    "CLIPLoss",
    "CMCLoss",
    "CPCBCELoss",
    "CPCLoss",
    "CSWMLoss",
    "CaptionContrastiveLoss",
    "ConditionalContrastiveLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "DomainSupConLoss",
    "GradCache",
    "HardNegativeLoss",
    "InBatchCMCLoss",
    "InfoNCELoss",
    "LiftedStructureLoss",
    "MIBCompression",
    "MarginSoftmaxLoss",
    "MemoryBank",
    "MemoryBankLoss",
    "MinedTripletLoss",
    "MomentumEncoder",
    "MultiSimilarityLoss",
    "NCELoss",
    "NTXentLoss",
    "NegativeQueue",
    "Pairs",
    "PairwiseContrastiveLoss",
    "PatchNCELoss",
    "Score",
    "SigLIPLoss",
    "SimCSELoss",
    "SupConLoss",
    "TransELoss",
    "TripletLoss",
    "TripletScoreLoss",
    "VIBCompression",
    "ZLPRLoss",
    "__version__",
    "backends",
    "functional",
    "mining",
    "ops",
    "patch",
    "set_workspace",
    "unpatch",
    "update_momentum",
    "use_backend",
]

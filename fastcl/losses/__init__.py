"""Contrastive losses: one function and one small module each."""

from .bank import CMCLoss, MemoryBankLoss, memory_bank
from .debiased import DebiasedLoss, HardNegativeLoss, debiased, hard_negative
from .decoupled import DCLLoss, DCLWLoss, dcl
from .pairwise import (
    LiftedStructureLoss,
    MultiSimilarityLoss,
    PairwiseContrastiveLoss,
    lifted_structure,
    multi_similarity,
    pairwise_contrastive,
)
from .sigmoid import SigLIPLoss, siglip
from .softmax import (
    CLIPLoss,
    InfoNCELoss,
    MarginSoftmaxLoss,
    NTXentLoss,
    clip,
    info_nce,
    margin_softmax,
    nt_xent,
)
from .supcon import SupConLoss, sup_con
from .triplets import (
    MinedTripletLoss,
    TripletLoss,
    TripletScoreLoss,
    mined_triplet,
    triplet,
    triplet_score,
)

__all__ = [
    "CLIPLoss",
    "CMCLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "HardNegativeLoss",
    "InfoNCELoss",
    "LiftedStructureLoss",
    "MarginSoftmaxLoss",
    "MemoryBankLoss",
    "MinedTripletLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "PairwiseContrastiveLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TripletLoss",
    "TripletScoreLoss",
    "clip",
    "dcl",
    "debiased",
    "hard_negative",
    "info_nce",
    "lifted_structure",
    "margin_softmax",
    "memory_bank",
    "mined_triplet",
    "multi_similarity",
    "nt_xent",
    "pairwise_contrastive",
    "siglip",
    "sup_con",
    "triplet",
    "triplet_score",
]

"""Contrastive losses: one function and one small module each."""

from .bank import CMCLoss, MemoryBankLoss, memory_bank
from .block import BlockContrastiveLoss, block_contrastive
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
from .predictive import CPCBCELoss, CPCLoss, cpc, cpc_bce, mi_lower_bound
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
from .world import CSWMLoss, TransELoss, cswm, transe

__all__ = [
    "BlockContrastiveLoss",
    "CLIPLoss",
    "CMCLoss",
    "CPCBCELoss",
    "CPCLoss",
    "CSWMLoss",
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
    "TransELoss",
    "TripletLoss",
    "TripletScoreLoss",
    "block_contrastive",
    "clip",
    "cpc",
    "cpc_bce",
    "cswm",
    "dcl",
    "debiased",
    "hard_negative",
    "info_nce",
    "lifted_structure",
    "margin_softmax",
    "memory_bank",
    "mi_lower_bound",
    "mined_triplet",
    "multi_similarity",
    "nt_xent",
    "pairwise_contrastive",
    "siglip",
    "sup_con",
    "transe",
    "triplet",
    "triplet_score",
]

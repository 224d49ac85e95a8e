"""Contrastive losses: one function and one small module each."""

from .bank import CMCLoss, MemoryBankLoss, memory_bank
from .block import BlockContrastiveLoss, block_contrastive
from .bottleneck import (
    MIBCompression,
    VIBCompression,
    exponential_beta,
    mib_compression,
    vib_compression,
)
from .captions import CaptionContrastiveLoss, caption_contrastive, sequence_log_prob
from .debiased import DebiasedLoss, HardNegativeLoss, debiased, hard_negative
from .decoupled import DCLLoss, DCLWLoss, dcl
from .images import ConditionalContrastiveLoss, PatchNCELoss, conditional_contrastive, patch_nce
from .labels import DomainSupConLoss, ZLPRLoss, domain_sup_con, zlpr
from .multiview import InBatchCMCLoss, cmc
from .pairwise import (
    LiftedStructureLoss,
    MultiSimilarityLoss,
    PairwiseContrastiveLoss,
    lifted_structure,
    multi_similarity,
    pairwise_contrastive,
)
from .predictive import CPCBCELoss, CPCLoss, cpc, cpc_bce, mi_lower_bound
from .scores import Score
from .sentences import SimCSELoss, sim_cse
from .sigmoid import NCELoss, SigLIPLoss, nce, siglip
from .softmax import InfoNCELoss, NTXentLoss, info_nce, nt_xent
from .supcon import SupConLoss, sup_con
from .towers import CLIPLoss, MarginSoftmaxLoss, clip, margin_softmax
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
    "CaptionContrastiveLoss",
    "ConditionalContrastiveLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "DomainSupConLoss",
    "HardNegativeLoss",
    "InBatchCMCLoss",
    "InfoNCELoss",
    "LiftedStructureLoss",
    "MIBCompression",
    "MarginSoftmaxLoss",
    "MemoryBankLoss",
    "MinedTripletLoss",
    "MultiSimilarityLoss",
    "NCELoss",
    "NTXentLoss",
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
    "block_contrastive",
    "caption_contrastive",
    "clip",
    "cmc",
    "conditional_contrastive",
    "cpc",
    "cpc_bce",
    "cswm",
    "dcl",
    "debiased",
    "domain_sup_con",
    "exponential_beta",
    "hard_negative",
    "info_nce",
    "lifted_structure",
    "margin_softmax",
    "memory_bank",
    "mi_lower_bound",
    "mib_compression",
    "mined_triplet",
    "multi_similarity",
    "nce",
    "nt_xent",
    "pairwise_contrastive",
    "patch_nce",
    "sequence_log_prob",
    "siglip",
    "sim_cse",
    "sup_con",
    "transe",
    "triplet",
    "triplet_score",
    "vib_compression",
    "zlpr",
]

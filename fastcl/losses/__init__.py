"""Contrastive losses: one function and one small module each."""

from .bank import CMCLoss, MemoryBankLoss, memory_bank
from .debiased import DebiasedLoss, HardNegativeLoss, debiased, hard_negative
from .decoupled import DCLLoss, DCLWLoss, dcl
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

__all__ = [
    "CLIPLoss",
    "CMCLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "HardNegativeLoss",
    "InfoNCELoss",
    "MarginSoftmaxLoss",
    "MemoryBankLoss",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "clip",
    "dcl",
    "debiased",
    "hard_negative",
    "info_nce",
    "margin_softmax",
    "memory_bank",
    "nt_xent",
    "siglip",
    "sup_con",
]

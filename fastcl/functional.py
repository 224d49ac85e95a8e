"""Every loss as a function; the modules of :mod:`fastcl` wrap these."""

from .losses import (
    clip,
    dcl,
    debiased,
    hard_negative,
    info_nce,
    lifted_structure,
    margin_softmax,
    memory_bank,
    mined_triplet,
    multi_similarity,
    nt_xent,
    pairwise_contrastive,
    siglip,
    sup_con,
    triplet,
    triplet_score,
)

__all__ = [
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

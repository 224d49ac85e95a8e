"""Every loss as a function; the modules of :mod:`fastcl` wrap these."""

from .losses import (
    clip,
    dcl,
    debiased,
    hard_negative,
    info_nce,
    margin_softmax,
    memory_bank,
    nt_xent,
    siglip,
    sup_con,
)

__all__ = [
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

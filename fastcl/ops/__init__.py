"""The primitives, and the backends that compute them in order of preference."""

import torch

from . import chunked, cpu, reference, triton
from .fused import fuses_pairs, pair_softmax
from .normalize import l2_normalize, l2_normalize_pair
from .pairs import ALL, Pairs
from .registry import OPS, OPTIONAL_OPS, Backend, backends, register, set_workspace, use_backend
from .similarity import LogSumExp, TopK, similarity_logsumexp, similarity_sum, similarity_topk

register(cpu.BACKEND)
register(triton.BACKEND)
register(Backend("chunked", chunked, detail=f"torch {torch.__version__}, any device"))
register(
    Backend("reference", reference, ops=OPS + OPTIONAL_OPS, detail="dense float64; the oracle")
)

__all__ = [
    "ALL",
    "LogSumExp",
    "Pairs",
    "TopK",
    "backends",
    "fuses_pairs",
    "l2_normalize",
    "l2_normalize_pair",
    "pair_softmax",
    "set_workspace",
    "similarity_logsumexp",
    "similarity_sum",
    "similarity_topk",
    "use_backend",
]

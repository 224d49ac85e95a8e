"""The primitives, and the backends that compute them in order of preference."""

import torch

from . import chunked, cpu, cuda, reference, triton
from .enqueue import enqueue, fuses_enqueue
from .fused import fuses_pairs, pair_sigmoid, pair_softmax
from .normalize import l2_normalize, l2_normalize_pair
from .pairs import ALL, Pairs
from .registry import OPS, Backend, backends, register, set_workspace, use_backend
from .similarity import LogSumExp, TopK, similarity_logsumexp, similarity_sum, similarity_topk

register(cpu.BACKEND)
register(cuda.BACKEND)
register(triton.BACKEND)
register(Backend("chunked", chunked, detail=f"torch {torch.__version__}, any device"))
register(
    Backend(
        "reference",
        reference,
        ops=(*OPS, "pair_softmax", "pair_sigmoid"),
        detail="dense float64; the oracle",
    )
)

__all__ = [
    "ALL",
    "LogSumExp",
    "Pairs",
    "TopK",
    "backends",
    "enqueue",
    "fuses_enqueue",
    "fuses_pairs",
    "l2_normalize",
    "l2_normalize_pair",
    "pair_sigmoid",
    "pair_softmax",
    "set_workspace",
    "similarity_logsumexp",
    "similarity_sum",
    "similarity_topk",
    "use_backend",
]

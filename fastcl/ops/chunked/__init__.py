"""The primitives tile by tile in plain PyTorch: any device, any dtype, never N x M at once.

Serves every machine for which nothing was compiled (laptops without a compiler, MPS, XPU, odd
dtypes) and every call the compiled backends decline. Products are formed in the accumulator's
dtype (fp32, or fp64 for fp64 inputs) whatever the inputs' dtype.
"""

from .logsumexp import similarity_logsumexp, similarity_logsumexp_backward
from .normalize import (
    l2_normalize,
    l2_normalize_backward,
    l2_normalize_pair,
    l2_normalize_pair_backward,
)
from .sum import similarity_sum, similarity_sum_backward
from .topk import similarity_topk

__all__ = [
    "l2_normalize",
    "l2_normalize_backward",
    "l2_normalize_pair",
    "l2_normalize_pair_backward",
    "similarity_logsumexp",
    "similarity_logsumexp_backward",
    "similarity_sum",
    "similarity_sum_backward",
    "similarity_topk",
]

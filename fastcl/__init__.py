"""Contrastive losses for PyTorch: fused, exact in every precision, memory linear in the batch.

    from fastcl import NTXentLoss
    loss = NTXentLoss(temperature=0.1)(z1, z2)

Losses are modules here and functions in :mod:`fastcl.functional`; the primitives they are made of
are in :mod:`fastcl.ops`. Importing this needs torch alone.
"""

from . import _checkout, functional, ops
from .compat import patch, unpatch
from .gradcache import GradCache
from .losses import (
    CLIPLoss,
    CMCLoss,
    DCLLoss,
    DCLWLoss,
    DebiasedLoss,
    HardNegativeLoss,
    InfoNCELoss,
    MarginSoftmaxLoss,
    MemoryBankLoss,
    NTXentLoss,
    SigLIPLoss,
    SupConLoss,
)
from .memory import MemoryBank, MomentumEncoder, NegativeQueue, update_momentum
from .ops import Pairs, backends, set_workspace, use_backend

_checkout.install()

__version__ = "0.1.0"

__all__ = [
    "CLIPLoss",
    "CMCLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "GradCache",
    "HardNegativeLoss",
    "InfoNCELoss",
    "MarginSoftmaxLoss",
    "MemoryBank",
    "MemoryBankLoss",
    "MomentumEncoder",
    "NTXentLoss",
    "NegativeQueue",
    "Pairs",
    "SigLIPLoss",
    "SupConLoss",
    "__version__",
    "backends",
    "functional",
    "ops",
    "patch",
    "set_workspace",
    "unpatch",
    "update_momentum",
    "use_backend",
]

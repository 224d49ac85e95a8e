"""The losses of sentence-transformers (6.2 or newer) on fastcl's operators.

    from fastcl.compat.sentence_transformers import MultipleNegativesRankingLoss
    # was: from sentence_transformers.losses import MultipleNegativesRankingLoss

Subclasses of the peer's own classes that compute the loss from embeddings differently, so the
trainer, Matryoshka, model cards, ``get_config_dict`` and every check stay the peer's. Importing
this module needs torch alone; the classes need sentence-transformers and appear when first asked
for. Same signatures, values and gradients; no B x B matrix is formed. What differs, and why:

- A ``similarity_fct`` other than ``util.cos_sim`` and ``util.dot_score`` is left to the peer's
  code, which forms that matrix.
- ``Cached...``: the loss takes all embeddings at once, so ``mini_batch_size`` bounds the encoder's
  memory only, as nothing else needs bounding.
- With ``gather_across_devices`` the batches of ranks may differ in size (its #3420: the loss of an
  incomplete last batch jumps).
- The loss of 16-bit embeddings is fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._sentence_transformers import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _sentence_transformers as classes

    return getattr(classes, name)

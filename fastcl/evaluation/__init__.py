"""How good is a representation: kNN, probe, retrieval, figures. Needs the extra ``train``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcl.data.extras import require
from fastcl.evaluation.features import calibrate_batch_norm, extract_features
from fastcl.evaluation.knn import knn_accuracy, knn_predict
from fastcl.evaluation.mean_classifier import mean_classifier_accuracy
from fastcl.evaluation.ranking import hits_at, mean_reciprocal_rank, ranks_by_distance
from fastcl.evaluation.retrieval import (
    alignment,
    retrieval_scores,
    uniformity,
    verification_auc,
    verification_roc,
)

if TYPE_CHECKING:
    from fastcl.evaluation.probe import linear_probe

__all__ = [
    "alignment",
    "calibrate_batch_norm",
    "extract_features",
    "hits_at",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "mean_reciprocal_rank",
    "ranks_by_distance",
    "mean_classifier_accuracy",
    "retrieval_scores",
    "uniformity",
    "verification_auc",
    "verification_roc",
]


def __getattr__(name: str) -> object:
    if name == "linear_probe":
        require("sklearn", user="fastcl.evaluation.linear_probe")
        from fastcl.evaluation.probe import linear_probe

        return linear_probe
    raise AttributeError(f"module 'fastcl.evaluation' has no attribute {name!r}")

"""What is refused is refused in one sentence."""

import importlib
import sys
import warnings

import pytest
import torch

import fastcl
from fastcl.compat import info_nce, lightly, open_clip, solo, supcontrast
from fastcl.compat.ranking import ranking_loss

Z = torch.randn(4, 3)
VIEWS = torch.randn(4, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lightly.NTXentLoss(0.0), ValueError, "Illegal temperature"),
        (lambda: lightly.DCLLoss(1e-9), ValueError, "Illegal temperature"),
        (lambda: lightly.MemoryBankModule((10, -1)), ValueError, "all entries must be non-negative"),
        (lambda: lightly.NTXentLoss()(Z, Z[:3]), ValueError, r"out1 has shape \(3, 3\)"),
        (lambda: lightly.NTXentLoss("warm"), ValueError, "temperature is 'warm'"),
        (lambda: lightly.DCLLoss()(Z, Z[0]), ValueError, r"out1 has shape \(3,\)"),
        (lambda: lightly.NTXentLoss(memory_bank_size=None), TypeError, "size is None"),
        (lambda: lightly.MemoryBankModule(()), ValueError, r"size is \(\) "),
        (lambda: lightly.MemoryBankModule((9, 1.5)), TypeError, r"size is \(9, 1.5\)"),
        (lambda: lightly.DCLLoss(weight_fn=lambda a, b: None)(Z, Z), ValueError, "weight_fn returned what is None"),
        (lambda: lightly.NTXentLoss(memory_bank_size=(5, 3))(Z, Z[:3]), ValueError, r"out1 has shape \(3, 3\)"),
        (lambda: lightly.NTXentLoss(memory_bank_size=(5, 9))(Z, Z), ValueError, "expected width 3"),
        (lambda: lightly.DCLLoss(weight_fn=lambda a, b: a)(Z, Z), ValueError, "weight_fn returned what has shape"),
        (lambda: info_nce.InfoNCE(reduction="avg"), ValueError, "reduction is 'avg'"),
        (lambda: info_nce.InfoNCE(negative_mode="all"), ValueError, "negative_mode is 'all'"),
        (lambda: info_nce.info_nce(Z, Z, VIEWS), ValueError, r"negative_keys .*expected \[M, D\] with negative_mode='unpaired'"),
        (lambda: info_nce.info_nce(Z, Z, Z, negative_mode="paired"), ValueError, r"negative_keys .*expected \[N, M, D\]"),
        (lambda: open_clip.ClipLoss(use_horovod=True), ValueError, "use_horovod is True"),
        (lambda: open_clip.ClipLoss()(Z, Z, -1.0), ValueError, "logit_scale is -1.0"),
        (lambda: open_clip.ClipLoss(True, True, world_size=2)(Z, Z, 1.0), ValueError, "rank and world_size are 0 and 2; expected"),
        (lambda: open_clip.ClipLoss()(Z, Z, 1.0, "low"), TypeError, "logit_bias is 'low'"),
        (lambda: open_clip.SigLipLoss()(Z, Z, torch.tensor(1j), 0.0), ValueError, "logit_scale has shape .*complex64"),
        (lambda: solo.mocov2plus_loss_func(Z, Z[:2], Z.T), ValueError, r"key has shape \(2, 3\)"),
        (lambda: open_clip.SigLipLoss(dist_impl="tree"), ValueError, "dist_impl is 'tree'"),
        (lambda: open_clip.SigLipLoss()(Z, Z[:3], 1.0, 0.0), ValueError, "text_features has shape"),
        (lambda: open_clip.SigLipLoss()(Z, Z, 1.0, torch.ones(2)), ValueError, "logit_bias has shape"),
        (lambda: supcontrast.SupConLoss(base_temperature=0.0), ValueError, "base_temperature is 0.0"),
        (lambda: supcontrast.SupConLoss(-0.1)(VIEWS, mask=torch.eye(4)), ValueError, "temperature is -0.1"),
        (lambda: supcontrast.SupConLoss()(VIEWS, [0, 1, 0, 1]), TypeError, "labels is"),
        (lambda: supcontrast.SupConLoss(contrast_mode="two"), ValueError, "contrast_mode is 'two'"),
        (lambda: supcontrast.SupConLoss()(Z), ValueError, "at least 3 dimensions"),
        (lambda: supcontrast.SupConLoss()(VIEWS.to_sparse()), TypeError, "features has layout"),
        (lambda: supcontrast.SupConLoss()(VIEWS, mask=torch.eye(4).to_sparse()), TypeError, "mask has layout"),
        (lambda: supcontrast.SupConLoss()(VIEWS, mask=torch.eye(4) * 1j), TypeError, "mask .*complex64"),
        (lambda: supcontrast.SupConLoss()(VIEWS, mask=torch.eye(4) / 0.0), ValueError, "mask holds NaN or infinity"),
        (lambda: supcontrast.SupConLoss()(VIEWS, torch.arange(4), torch.eye(4)), ValueError, "both `labels` and `mask`"),
        (lambda: supcontrast.SupConLoss()(VIEWS, torch.arange(3)), ValueError, "labels .*expected 4 integers"),
        (lambda: supcontrast.SupConLoss()(VIEWS, mask=torch.eye(3)), ValueError, r"mask .*expected shape \(4, 4\)"),
        (lambda: ranking_loss([Z]), ValueError, "embeddings came 1; expected at least 2"),
        (lambda: ranking_loss([Z, Z[:3]]), ValueError, r"documents has shape \(3, 3\)"),
        (lambda: ranking_loss([Z, Z], 0.0), ValueError, "scale is 0.0"),
        (lambda: ranking_loss([Z, Z, Z[:2]]), ValueError, r"negatives\[0\] has shape"),
        (lambda: fastcl.patch(), ValueError, r"peers is \(\); expected some of"),
        (lambda: fastcl.patch("sklearn"), ValueError, "peer is 'sklearn'; expected one of"),
    ],
)  # fmt: skip
def test_message(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_labels_by_name(pml):
    for bad in ([0, 1, 0, 1], torch.tensor(1), torch.zeros(4, 1), torch.arange(4).to("meta")):
        with pytest.raises((TypeError, ValueError), match=r"^labels .*expected"):
            pml.NTXentLoss()(Z, bad)
        with pytest.raises((TypeError, ValueError), match=r"^ref_labels .*expected"):
            pml.NTXentLoss()(Z, torch.arange(4), ref_emb=Z, ref_labels=bad)


def test_views_by_name(pml):
    loss = pml.SelfSupervisedLoss(pml.NTXentLoss())
    for bad in (Z[0], Z[:2], Z.to_sparse(), Z.long(), Z.to("meta"), None):
        with pytest.raises((TypeError, ValueError), match=r"^ref_emb .*expected"):
            loss(Z, bad)


def test_what_needs_the_library_says_so(pml):
    labels = torch.arange(4)
    for call, what in (
        (lambda: pml.NTXentLoss(reducer=object()), "reducer="),
        (lambda: pml.CrossBatchMemory(pml.NTXentLoss(), 3), "CrossBatchMemory"),
        (lambda: pml.TripletMarginLoss(swap=True)(Z, labels), "TripletMarginLoss"),
        (lambda: pml.NTXentLoss()(Z, indices_tuple=(labels, labels, labels)), "NTXentLoss"),
    ):
        with pytest.raises(ImportError, match=rf"{what}.* needs pytorch-metric-learning"):
            call()


def test_sentence_transformers_is_asked_for_late(monkeypatch):
    module = importlib.import_module("fastcl.compat.sentence_transformers")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.delitem(sys.modules, "fastcl.compat._sentence_transformers", raising=False)
    with pytest.raises(ImportError, match=r"stands on classes of sentence-transformers 6\.2"):
        _ = module.MultipleNegativesRankingLoss
    with pytest.raises(AttributeError, match="no attribute"):
        _ = module.TripletLoss


def test_warnings():
    with pytest.warns(UserWarning, match=r"open_clip #616"):
        open_clip.ClipLoss(world_size=2)
    with pytest.warns(UserWarning, match="does not specify feature dimension"):
        lightly.NTXentLoss(memory_bank_size=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_clip.ClipLoss()
        lightly.NTXentLoss(memory_bank_size=(9, 3))

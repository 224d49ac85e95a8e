"""Bad input to a loss gets one sentence naming the argument, what came, what was expected."""

import copy
import pickle

import pytest
import torch

import fastcl
from fastcl import functional as f

Z = torch.randn(4, 3)
NAN = Z.clone()
NAN[2, 1] = float("nan")
INF = Z.clone()
INF[1] = float("inf")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: f.nt_xent(Z, Z[:3]), ValueError, r"z2 has shape \(3, 3\).*expected shape \(4, 3\), the shape of z1"),
        (lambda: f.nt_xent(Z, Z.to("meta")), ValueError, "z2 .* on meta; expected cpu, like z1"),
        (lambda: f.nt_xent(Z[0], Z[0]), ValueError, r"z1 has shape \(3,\).*expected \[N, D\]"),
        (lambda: f.nt_xent(Z.int(), Z), TypeError, "z1 .* dtype int32"),
        (lambda: f.nt_xent(NAN, Z), ValueError, "z1 holds NaN or infinity in 1 of its 4 rows"),
        (lambda: f.nt_xent(Z, INF), ValueError, "z2 holds NaN or infinity in 1 of its 4 rows"),
        (lambda: f.clip(NAN, Z, normalize=False), ValueError, "image_features holds NaN"),
        (lambda: f.nt_xent(Z, Z, 0.0), ValueError, r"temperature is 0.0 \(float\); expected a positive finite number"),
        (lambda: f.nt_xent(Z, Z, torch.ones(2)), ValueError, "temperature has shape"),
        (lambda: fastcl.NTXentLoss(-1.0), ValueError, "temperature is -1.0"),
        (lambda: fastcl.NTXentLoss("warm"), ValueError, "temperature is 'warm'"),
        (lambda: fastcl.CLIPLoss(reduction="avg"), ValueError, "reduction is 'avg'; expected one of"),
        (lambda: fastcl.NTXentLoss(label_smoothing=1.0), ValueError, r"label_smoothing is 1.0 \(float\); expected a number in \[0, 1\)"),
        (lambda: f.nt_xent(Z, Z, ids=torch.ones(4)), TypeError, "ids .* expected a tensor of 4 integers"),
        (lambda: f.nt_xent(Z, Z, ids=torch.ones(3).long()), ValueError, "ids .* expected 4 integers"),
        (lambda: f.nt_xent(Z, Z, weight=torch.ones(3)), ValueError, "weight .* expected 4 floats"),
        (lambda: f.clip(Z, Z, weight=torch.ones(4).long()), TypeError, "weight .* expected a tensor of 4 floats"),
        (lambda: f.clip(Z, Z, logit_scale=-1.0), ValueError, "logit_scale is -1.0"),
        (lambda: f.info_nce(Z, Z, torch.randn(5, 2)), ValueError, "negative_keys .* expected width 3, the width of query"),
        (lambda: f.info_nce(Z, Z, torch.randn(3, 5, 3)), ValueError, "negative_keys .* first dimension of 4"),
        (lambda: f.info_nce(Z, Z, torch.randn(5, 3), ids=torch.arange(4)), ValueError, "ids and negative_ids go together"),
        (lambda: f.sup_con(Z), ValueError, r"features .* came without labels"),
        (lambda: f.sup_con(Z, torch.arange(5)), ValueError, "labels .* expected 4 integers"),
        (lambda: f.sup_con(Z, torch.rand(4)), TypeError, "labels .* expected a tensor of 4 integers"),
        (lambda: f.sup_con(Z, torch.arange(4), form="both"), ValueError, "form is 'both'"),
        (lambda: f.debiased(Z, Z, tau_plus=1.5), ValueError, "tau_plus is 1.5"),
        (lambda: f.hard_negative(Z, Z, beta=-1.0), ValueError, "beta is -1.0"),
        (lambda: f.dcl(Z, Z, sigma=0.0), ValueError, "sigma is 0.0"),
        (lambda: f.nt_xent(Z, Z, torch.tensor(-1.0)), ValueError, "temperature is -1.0; expected one positive number"),
        (lambda: f.nt_xent(Z, Z, label_smoothing=None), ValueError, "label_smoothing is None"),
        (lambda: f.nt_xent(Z.numpy(), Z), TypeError, r"z1 is a ndarray|z1 is array"),
        (lambda: f.nt_xent(Z.to_sparse(), Z), TypeError, "z1 has layout torch.sparse_coo; expected a dense tensor"),
        (lambda: fastcl.NTXentLoss(0.005, learnable=True), ValueError, "max_scale is 100.0; expected at least 1 / temperature = 200"),
        (lambda: fastcl.HardNegativeLoss(beta=-1.0), ValueError, r"beta is -1.0 \(float\); expected a finite number of at least 0"),
        (lambda: fastcl.MarginSoftmaxLoss(margin=None), ValueError, "margin is None"),
        (lambda: fastcl.SupConLoss(form="x"), ValueError, "form is 'x'"),
        (lambda: fastcl.SigLIPLoss(bias="x"), ValueError, "bias is 'x'"),
        (lambda: f.siglip(Z, Z, bias=torch.ones(2)), ValueError, "bias has shape"),
        (lambda: f.margin_softmax(Z, Z, margin=float("nan")), ValueError, "margin is nan"),
        (lambda: f.triplet(Z, Z, Z[:3]), ValueError, r"negative has shape \(3, 3\).*expected shape \(4, 3\), the shape of anchor"),
        (lambda: f.triplet(Z, NAN, Z), ValueError, "positive holds NaN or infinity in 1 of its 4 rows"),
        (lambda: f.triplet(Z, Z, Z, distance="cosine"), ValueError, "distance is 'cosine'; expected one of"),
        (lambda: f.triplet(Z, Z, Z, distance=torch.cdist), ValueError, r"distance gave what has shape \(4, 4\).*expected 4 distances"),
        (lambda: fastcl.TripletLoss(margin="x"), ValueError, "margin is 'x'"),
        (lambda: fastcl.TripletLoss(reduction="avg"), ValueError, "reduction is 'avg'; expected one of"),
        (lambda: f.triplet_score(torch.ones(3), torch.ones(4)), ValueError, r"negative_scores .*expected \[3\] or \[3, K\]"),
        (lambda: f.triplet_score(torch.ones(3), [1.0]), TypeError, "negative_scores .*expected a float tensor"),
        (lambda: f.mined_triplet(Z, torch.arange(3)), ValueError, "labels .* expected 4 integers"),
        (lambda: fastcl.MinedTripletLoss(mining="hard"), ValueError, "mining is 'hard'; expected one of"),
        (lambda: fastcl.mining.semi_hard(Z, torch.arange(4), torch.arange(3), torch.arange(2)), ValueError, "positives .*expected 3 entries"),
        (lambda: f.pairwise_contrastive(Z, Z, torch.ones(4)), TypeError, "similar .* expected a tensor of integers or bools"),
        (lambda: f.pairwise_contrastive(Z, Z, torch.tensor([1, -1, 1, -1])), ValueError, "similar holds 2 integers that are not 0 or 1"),
        (lambda: f.pairwise_contrastive(Z, Z, torch.ones(4).long(), 0.0), ValueError, "margin is 0.0"),
        (lambda: fastcl.PairwiseContrastiveLoss(form="x"), ValueError, "form is 'x'; expected one of"),
        (lambda: fastcl.LiftedStructureLoss(distance="l1"), ValueError, "distance is 'l1'"),
        (lambda: f.lifted_structure(Z, torch.rand(4)), TypeError, "labels .* expected a tensor of 4 integers"),
        (lambda: fastcl.MultiSimilarityLoss(beta=0.0), ValueError, "beta is 0.0"),
        (lambda: f.multi_similarity(Z, torch.arange(4), epsilon="x"), ValueError, "epsilon is 'x' .*expected None or a finite number"),
        (lambda: f.cpc(Z[:, None], Z[:, None], negatives="sequence"), ValueError, r"predictions .*expected \[B, T, K, D\] with several times"),
        (lambda: f.cpc(Z[:, None], Z[:3, None]), ValueError, r"targets .*expected shape \(4, 1, 3\), the shape of predictions"),
        (lambda: f.cpc(Z[:, None], Z[:, None], negatives="near"), ValueError, "negatives is 'near'; expected one of"),
        (lambda: fastcl.CPCLoss(3, 3, distributed="gather"), ValueError, "distributed is 'gather'; expected None, since CPCLoss"),
        (lambda: fastcl.CPCLoss(3, 3, steps=4)(torch.randn(2, 4, 3), torch.randn(2, 4, 3)), ValueError, "context .*more times than steps = 4"),
        (lambda: f.cpc_bce(Z[:, None], Z[:, None], torch.ones(4)), TypeError, "labels .* expected a tensor of integers or bools"),
        (lambda: f.cpc_bce(Z[:, None], Z[:, None], torch.arange(3) % 2), ValueError, r"labels .* expected shape \(4,\) on cpu"),
        (lambda: f.block_contrastive(Z, Z[:3], Z), ValueError, r"positive .*expected \[N, D\] or \[N, b, D\] with N = 4"),
        (lambda: f.block_contrastive(Z, Z, Z[:, :2]), ValueError, "negative .*expected width 3, the width of anchor"),
        (lambda: f.block_contrastive(Z, Z, Z, form="x"), ValueError, "form is 'x'; expected one of"),
        (lambda: f.mi_lower_bound(torch.ones(()), 0), ValueError, "candidates is 0"),
        (lambda: f.cswm(Z[:, None], Z[:, None], Z[:3, None]), ValueError, r"next_state .*expected shape \(4, 1, 3\)"),
        (lambda: f.cswm(Z[:, None], Z[:, None], Z[:, None], torch.arange(3)), ValueError, "permutation .* expected 4 integers"),
        (lambda: fastcl.CSWMLoss(sigma=0.0), ValueError, "sigma is 0.0"),
        (lambda: f.transe(Z, Z, Z, Z, Z[:2]), ValueError, r"negative_tail .*expected shape \(4, 3\), the shape of head"),
        (lambda: fastcl.TransELoss(distance="cosine"), ValueError, "distance is 'cosine'"),
        (lambda: f.nce(torch.ones(2), torch.ones(3, 2), 0.0), ValueError, r"negative_scores .*expected \[2\] or \[2, K\]"),
        (lambda: f.nce(torch.ones(2), torch.ones(2, 2), torch.ones(2)), ValueError, "log_noise .*came alone; expected negative_log_noise"),
        (lambda: f.nce(torch.ones(2), torch.ones(2, 2), 0.0, torch.ones(2)), ValueError, r"negative_log_noise .*expected a number or shape \(2, 2\)"),
        (lambda: f.caption_contrastive(torch.ones(2), torch.ones(2), torch.ones(2, 2), torch.ones(2)), ValueError, r"reference_negative .*expected shape \(2, 2\), the shape of negative"),
        (lambda: f.caption_contrastive(torch.ones(2), [1.0], torch.ones(2), torch.ones(2)), TypeError, "reference_positive .*expected a float tensor"),
        (lambda: f.sequence_log_prob(torch.ones(2, 3, 4), torch.ones(2, 3)), TypeError, "tokens .*expected a tensor of integers"),
        (lambda: f.sequence_log_prob(torch.ones(2, 3, 4), torch.ones(2, 2).long()), ValueError, r"tokens .*expected shape \(2, 3\), as logits"),
        (lambda: f.cmc([Z]), ValueError, "views .*expected a sequence of two or more"),
        (lambda: f.cmc([Z, Z, Z[:3]]), ValueError, r"views\[2\] .*expected shape \(4, 3\), the shape of views\[0\]"),
        (lambda: f.cmc([Z, NAN], form="nce"), ValueError, r"views\[1\] holds NaN"),
        (lambda: f.cmc([Z, Z], form="nce", distributed="ring"), ValueError, "distributed is 'ring'; expected None with form 'nce'"),
        (lambda: fastcl.InBatchCMCLoss(return_metrics=True), ValueError, "return_metrics is True; expected False, since InBatchCMCLoss"),
        (lambda: f.sim_cse(Z, Z, Z[:3]), ValueError, r"hard_negative_key .*expected shape \(4, 3\), the shape of query"),
        (lambda: fastcl.SimCSELoss(hard_negative_weight="x"), ValueError, "hard_negative_weight is 'x'"),
        (lambda: f.patch_nce(Z, Z[:3]), ValueError, r"key .*expected shape \(4, 3\), the shape of query"),
        (lambda: f.patch_nce(Z, Z, negatives="x"), ValueError, "negatives is 'x'; expected one of"),
        (lambda: f.conditional_contrastive(Z, torch.arange(4), Z[:2]), ValueError, r"labels holds 2 outside \[0, 2\); expected rows of proxies"),
        (lambda: f.vib_compression(Z, -Z.abs()), ValueError, "std holds 12 numbers of 0 or less; expected positive"),
        (lambda: f.mib_compression(Z, Z.exp(), Z[:3], Z[:3]), ValueError, r"mean2 .*expected shape \(4, 3\), the shape of mean1"),
        (lambda: fastcl.losses.exponential_beta(3, length=0), ValueError, "length is 0"),
        (lambda: f.zlpr(Z, torch.ones(4, 3)), TypeError, "targets .*expected a tensor of integers or bools"),
        (lambda: f.zlpr(Z, torch.ones(4, 2).long()), ValueError, r"targets .*expected shape \(4, 3\)"),
        (lambda: f.zlpr(Z, torch.full((4, 3), -1)), ValueError, "targets holds 12 integers that are not 0 or 1"),
        (lambda: f.triplet_score(NAN[2], Z[0]), ValueError, "positive_scores holds NaN or infinity in 1 of its 3 scores"),
        (lambda: f.nce(Z[0], INF[:3], 0.0), ValueError, "negative_scores holds NaN or infinity in 3 of its 9 scores"),
        (lambda: f.caption_contrastive(Z[0], NAN[2], Z[0], Z[0]), ValueError, "reference_positive holds NaN"),
        (lambda: f.clip(Z, Z, weight=NAN[:, 1]), ValueError, "weight holds NaN or infinity 1 times"),
        (lambda: f.sim_cse(Z, Z, temperature=torch.tensor(1j)), ValueError, "temperature has shape .*complex64"),
        (lambda: f.sim_cse(Z, Z, temperature=torch.tensor(float("inf"))), ValueError, "temperature is inf; expected one positive number"),
        (lambda: f.patch_nce(Z, Z, negatives=torch.zeros(2, 2)), ValueError, r"negatives has shape \(2, 2\).*expected one of"),
        (lambda: f.cswm(Z[:, None], Z[:, None], Z[:, None], torch.tensor([1, 2, -1, 4])), ValueError, r"permutation holds 2 outside \[0, 4\)"),
        (lambda: f.sequence_log_prob(torch.ones(2, 3, 4), torch.full((2, 3), 4)), ValueError, r"tokens holds 6 outside \[0, 4\)"),
        (lambda: f.sequence_log_prob(torch.ones(2, 3, 4), torch.zeros(2, 3, device="meta").long()), ValueError, "tokens .* on meta; expected .* on cpu"),
        (lambda: f.domain_sup_con(Z, Z[:, :2], torch.arange(4), torch.arange(4)), ValueError, "source .*expected width 3, the width of target"),
        (lambda: f.domain_sup_con(Z, Z, torch.arange(4), torch.arange(3)), ValueError, "source_labels .*expected 4 integers"),
        (lambda: fastcl.Score(torch.nn.Linear(3, 2))(Z, Z), ValueError, r"key .*expected shape \(4, 2\), the shape of query"),
    ],
)  # fmt: skip
def test_message(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_process_group_is_shared_by_copies_and_refused_by_pickle():
    group = object()  # stands in for one
    for module, name in (
        (fastcl.NTXentLoss(distributed="gather", process_group=group), "process_group"),
        (fastcl.NegativeQueue(3, 4, group=group), "group"),
    ):
        for twin in (copy.copy(module), copy.deepcopy(module)):
            assert getattr(twin, name) is group
        with pytest.raises(TypeError, match=rf"cannot be pickled with its {name}, which is"):
            pickle.dumps(module)

"""Scores of retrieval, of verification and of features: against sorting and their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastcl.evaluation.mean_classifier import mean_classifier_accuracy
from fastcl.evaluation.retrieval import (
    alignment,
    retrieval_scores,
    uniformity,
    verification_auc,
)


def test_retrieval_scores_against_sorting():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(n, 6, generator=generator) for n in (30, 50))
    query_ids = torch.randint(12, (30,), generator=generator)  # some ids have no key, some several
    key_ids = torch.randint(12, (50,), generator=generator) + 2
    order = (F.normalize(queries) @ F.normalize(keys).T).argsort(1, descending=True)
    hits = key_ids[order] == query_ids[:, None]
    rank = torch.where(hits.any(1), hits.int().argmax(1) + 1, 10**6)
    found = retrieval_scores(
        queries, keys, query_ids=query_ids, key_ids=key_ids, ks=(1, 4), depth=3
    )
    assert found["recall@1"] == pytest.approx((rank <= 1).double().mean().item())
    assert found["recall@4"] == pytest.approx((rank <= 4).double().mean().item())
    expected = torch.where(rank <= 3, 1 / rank.double(), 0.0).mean().item()
    assert found["mrr"] == pytest.approx(expected)
    assert 0 < found["recall@1"] < found["recall@4"] < 1


def test_retrieval_among_themselves_and_of_rows_that_are_all_alike():
    rows = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.05]])
    ids = torch.tensor([0, 0, 1, 1, 2])
    scores = retrieval_scores(rows, query_ids=ids, ks=(1, 2))
    assert scores["recall@1"] == pytest.approx(2 / 5)  # the last row stands between the first two
    assert scores["recall@2"] == pytest.approx(4 / 5)
    # a collapsed encoder is worth what chance is
    alike = retrieval_scores(torch.ones(40, 3), torch.ones(40, 3), ks=(10,))
    assert alike["recall@10"] == pytest.approx(10 / 40)


def test_retrieval_arguments_are_checked():
    rows = torch.rand(3, 2)
    with pytest.raises(ValueError, match=r"query_ids and key_ids: expected both, .*, got neither"):
        retrieval_scores(rows, torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"key_ids: expected shape \[4\], got \[3\]"):
        retrieval_scores(rows, torch.rand(4, 2), query_ids=torch.arange(3), key_ids=torch.arange(3))
    with pytest.raises(ValueError, match="query_ids: expected alone, and always"):
        retrieval_scores(rows)
    with pytest.raises(ValueError, match=r"ks: expected integers >= 1, got \[0\]"):
        retrieval_scores(rows, rows, ks=(0,))


def test_alignment_and_uniformity_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, 4, generator=generator) for _ in range(2))
    a, b = F.normalize(x), F.normalize(y)
    assert alignment(x, y) == pytest.approx(((a - b) ** 2).sum(1).mean().item(), rel=1e-5)
    distances = torch.pdist(a.double())
    expected = (-2 * distances**2).exp().mean().log().item()
    assert uniformity(x) == pytest.approx(expected, rel=1e-5)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0.0, abs=1e-5)


def test_verification_auc():
    labels = torch.arange(40) % 4
    clusters = F.one_hot(labels).float()
    assert verification_auc(clusters, labels) == 1.0
    noise = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert 0.4 < verification_auc(noise, labels) < 0.6
    with pytest.raises(ValueError, match="expected pairs of equal and of different labels"):
        verification_auc(clusters, torch.arange(40))


def test_mean_classifier():
    train = torch.tensor([[2.0, 0], [4, 0], [0, 1], [0, 1], [-1, -1]])
    labels = torch.tensor([5, 5, 7, 7, 9])
    test = torch.tensor([[1.0, 0], [1, 2], [-1, 0], [0, 3]])
    truth = torch.tensor([5, 7, 9, 7])
    # means (3, 0), (0, 1), (-1, -1), not normalised: the second row goes to class 5
    assert mean_classifier_accuracy(train, labels, test, truth) == 0.75
    pairs = mean_classifier_accuracy(train, labels, test, truth, pairs=True)
    assert pairs == pytest.approx((2 / 3 + 1 + 1) / 3)

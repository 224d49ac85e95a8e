"""Bad operands are named in one sentence, with what came and what was expected."""

import pytest
import torch

from fastcl import Pairs, set_workspace
from fastcl.ops import (
    l2_normalize,
    l2_normalize_pair,
    similarity_logsumexp,
    similarity_sum,
    similarity_topk,
)

Q, K = torch.randn(4, 3), torch.randn(5, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: similarity_logsumexp(Q.long(), K, 1.0), TypeError, r"queries has shape \(4, 3\), dtype int64"),
        (lambda: similarity_logsumexp(Q[0], K, 1.0), ValueError, r"queries has shape \(3,\).*expected \[N, D\]"),
        (lambda: similarity_logsumexp(Q, K[:, :2], 1.0), ValueError, r"keys has shape \(5, 2\).*expected width 3, the width of queries"),
        (lambda: similarity_logsumexp(Q[:0], K, 1.0), ValueError, "no dimension empty"),
        (lambda: similarity_logsumexp(Q, K.to("meta"), 1.0), ValueError, "on meta; expected cpu, like queries"),
        (lambda: similarity_logsumexp([1.0], K, 1.0), TypeError, r"queries is \[1.0\] \(list\)"),
        (lambda: similarity_logsumexp(Q, K, torch.ones(2)), ValueError, "scale has shape"),
        (lambda: similarity_logsumexp(Q, K, 1.0, key_bias=torch.ones(4)), ValueError, "key_bias .* expected 5 floats"),
        (lambda: similarity_logsumexp(Q, K, 1.0, precision=torch.int8), TypeError, "precision is torch.int8"),
        (lambda: similarity_logsumexp(Q, K, 1.0, pairs=Pairs("same", torch.arange(4))), ValueError, "key_ids has 4 entries; expected 5, one per key"),
        (lambda: similarity_sum(Q, K, 1.0, phi="tanh"), ValueError, "phi is 'tanh'"),
        (lambda: similarity_topk(Q, K, k=0), ValueError, "k is 0; expected at least 1"),
        (lambda: l2_normalize(torch.ones(3)), ValueError, r"x has shape \(3,\)"),
        (lambda: l2_normalize(Q, eps=0.0), ValueError, "eps is 0.0; expected a positive number"),
        (lambda: l2_normalize_pair(Q, K), ValueError, r"b has shape \(5, 3\).*expected shape \(4, 3\), the shape of a"),
        (lambda: similarity_logsumexp(Q, K, "x"), TypeError, r"scale is 'x' \(str\); expected a number"),
        (lambda: similarity_logsumexp(Q, K, 1.0, pairs=None), TypeError, "pairs is None .* expected fastcl.Pairs"),
        (lambda: Pairs("same", [1, 2]), TypeError, r"query_ids is \[1, 2\] \(list\); expected a 1-D tensor of integers"),
        (lambda: Pairs(skip=0), TypeError, "skip is 0; expected a tuple of integer offsets"),
        (lambda: Pairs(skip=(1.5,)), TypeError, r"skip is \(1.5,\)"),
        (lambda: Pairs("equal"), ValueError, "relation is 'equal'"),
        (lambda: Pairs("same"), ValueError, "relation 'same' needs query_ids"),
        (lambda: Pairs("any", torch.arange(3)), ValueError, "relation 'any' takes no ids"),
        (lambda: Pairs(skip=(0, 1, 2, 3)), ValueError, "skip has 4 offsets; expected at most 3"),
        (lambda: Pairs("same", torch.ones(3)), TypeError, "query_ids .* expected a 1-D tensor of integers"),
        (lambda: set_workspace(-1), ValueError, "megabytes is -1"),
    ],
)  # fmt: skip
def test_message(call, error, message):
    with pytest.raises(error, match=message):
        call()

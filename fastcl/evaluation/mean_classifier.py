"""The classifier whose weights are the mean features of each class."""

from __future__ import annotations

import itertools

import torch


def mean_classifier_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    pairs: bool = False,
) -> float:
    """Share of test rows whose largest score f(x) . mean_c is that of their class; in [0, 1].

    The theory of Arora et al. bounds this classifier's loss by the contrastive one; features are
    not normalised and nothing is fitted.

    Args:
        train_features, test_features: [N, D] and [M, D].
        train_labels, test_labels: [N] and [M] integers.
        pairs: the mean over all pairs of classes of the accuracy on their rows alone (AVG-2), in
            place of the accuracy among all classes.

    Source: Arora et al. 2019, "A Theoretical Analysis of Contrastive Unsupervised Representation
    Learning", section 2 (mean classifier) and table 1.
    """
    classes = train_labels.unique()
    means = torch.stack([train_features[train_labels == label].mean(0) for label in classes])
    scores = test_features @ means.T
    right = test_labels[:, None] == classes
    if not pairs:
        return right.gather(1, scores.argmax(1, keepdim=True)).double().mean().item()
    accuracies = []
    for first, second in itertools.combinations(range(len(classes)), 2):
        is_first, is_second = right[:, first], right[:, second]
        says_first = scores[:, first] > scores[:, second]
        correct = torch.where(is_first, says_first, ~says_first)[is_first | is_second]
        accuracies.append(correct.double().mean())
    return torch.stack(accuracies).mean().item()

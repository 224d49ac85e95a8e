"""What the experiments of methods that learn from text have in common."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import torch

from fastcl.data.code_search import CodePair, load_code_search
from fastcl.data.tokens import WordTokenizer, split_words
from fastcl.encoders import TextTransformer
from fastcl.evaluation.probe import linear_probe
from fastcl.evaluation.retrieval import retrieval_scores
from fastcl.trainers.methods.texts import CodeOptions

MEASURED = "Functions found by their docstring, among those of modules never trained on"
DATA = f"functions and docstrings of the standard library of Python {platform.python_version()}"
KS = (1, 10)
LEAST_OF_PACKAGE = 10


@dataclass(frozen=True)
class TextPairs:
    """Sources [N, L] and docstrings [N, M] as token ids, and the pairs they come from."""

    sources: torch.Tensor
    docstrings: torch.Tensor
    pairs: tuple[CodePair, ...]

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class CodeSearch:
    """Training pairs, those that are scored, and the tokenizer, which knows training words only."""

    train: TextPairs
    scored: TextPairs
    tokenizer: WordTokenizer


def load(options: CodeOptions) -> CodeSearch:
    """The pairs that ``options`` describe."""
    splits = load_code_search()
    tokenizer = WordTokenizer.of_texts(
        (text for pair in splits.train for text in (pair.source, pair.docstring)),
        size=options.vocabulary,
        least=3,
    )

    def part(pairs: tuple[CodePair, ...]) -> TextPairs:
        return TextPairs(
            tokenizer.encode([pair.source for pair in pairs], options.source_length),
            tokenizer.encode([pair.docstring for pair in pairs], options.docstring_length),
            pairs,
        )

    return CodeSearch(part(splits.train), part(getattr(splits, options.report_on)), tokenizer)


def build_encoder(options: CodeOptions, tokenizer: WordTokenizer) -> TextTransformer:
    """The encoder that ``options`` describe, with fresh parameters."""
    return TextTransformer(
        tokenizer.vocabulary_size,
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        max_length=max(options.source_length, options.docstring_length),
        pooling=options.pooling,
        dropout=options.dropout,
    )


def package_numbers(pairs: tuple[CodePair, ...]) -> torch.Tensor:
    """The number of each pair's top-level package, [N] int64, in order of appearance."""
    numbers = {name: index for index, name in enumerate(dict.fromkeys(p.package for p in pairs))}
    return torch.tensor([numbers[pair.package] for pair in pairs])


def tfidf_vectors(data: CodeSearch) -> tuple[torch.Tensor, torch.Tensor]:
    """TF-IDF rows of the scored sources and docstrings, [N, V] each.

    It cuts words as the tokenizer does but sees texts in full and keeps every word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=split_words)
    vectorizer.fit([text for p in data.train.pairs for text in (p.source, p.docstring)])
    sources, docstrings = (
        torch.from_numpy(vectorizer.transform(texts).toarray()).float()
        for texts in (
            [pair.source for pair in data.scored.pairs],
            [pair.docstring for pair in data.scored.pairs],
        )
    )
    return sources, docstrings


def search_scores(sources: torch.Tensor, docstrings: torch.Tensor) -> dict[str, float]:
    """Recall@k and MRR of sources [N, D] searched by their docstrings [N, D]."""
    return retrieval_scores(docstrings, sources, ks=KS)


def chance_scores(candidates: int) -> dict[str, float]:
    """What a random order of ``candidates`` would score."""
    ranks = np.arange(1, min(candidates, 100) + 1)
    recalls = {f"recall@{k}": min(k, candidates) / candidates for k in KS}
    return {**recalls, "mrr": float((1 / ranks).sum() / candidates)}


def package_probe(features: torch.Tensor, pairs: tuple[CodePair, ...]) -> float:
    """Accuracy of a linear probe that tells packages by the features [N, D] of ``pairs``.

    Only packages with at least ten pairs take part; of each, every other pair trains the probe. An
    encoder trained on other packages has seen neither half.
    """
    rows, labels = features.cpu().numpy(), package_numbers(pairs).numpy()
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    members = [member for member in members if len(member) >= LEAST_OF_PACKAGE]
    train = np.concatenate([member[::2] for member in members])
    test = np.concatenate([member[1::2] for member in members])
    return linear_probe(rows[train], labels[train], rows[test], labels[test], labels_per_class=None)

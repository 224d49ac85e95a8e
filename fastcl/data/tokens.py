"""Words of prose and of source code as integers: identifiers are split, rare words are hashed."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

PADDING, START = 0, 1
"""Token ids: behind a text; before its first word ([CLS]) and, if asked, after its last."""

_SPECIAL = 2
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")


def split_words(text: str) -> list[str]:
    """Lower-case words of ``text``: ``getHTTPServer_2`` gives get, http, server, 2.

    Prose and source code are cut alike, so a name in one can match a word in the other.
    """
    return [word.lower() for word in _WORD.findall(text)]


class WordTokenizer:
    """Words to integers: known words have ids of their own, all others share hash buckets.

    Args:
        words: the vocabulary, in the order of its ids.
        buckets: ids for the words outside it, chosen by a checksum of the word.

    Raises:
        ValueError: a word twice, or ``buckets`` below 1.
    """

    def __init__(self, words: Sequence[str], buckets: int = 512):
        if buckets < 1:
            raise ValueError(f"buckets: expected an integer >= 1, got {buckets}")
        self.ids = {word: _SPECIAL + index for index, word in enumerate(words)}
        if len(self.ids) != len(words):
            raise ValueError(
                f"words: expected distinct words, got {len(words) - len(self.ids)} twice"
            )
        self.buckets = buckets

    @classmethod
    def of_texts(
        cls, texts: Iterable[str], size: int = 4096, least: int = 2, buckets: int = 512
    ) -> WordTokenizer:
        """The ``size`` most frequent words that occur in ``texts`` at least ``least`` times.

        The order is by frequency, then by the alphabet: equal texts give equal ids.
        """
        counts = Counter(word for text in texts for word in split_words(text))
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls([word for word, count in ranked[:size] if count >= least], buckets)

    @property
    def vocabulary_size(self) -> int:
        """Number of ids: padding, [CLS], words, buckets."""
        return _SPECIAL + len(self.ids) + self.buckets

    def encode(self, texts: Sequence[str], length: int, *, end: bool = False) -> torch.Tensor:
        """Token ids [N, ``length``] int64: START, the first words of each text, padding.

        With ``end``, as a generator of texts needs it, START again after the last word.

        Raises:
            ValueError: ``length`` below 2.
        """
        if length < 2:
            raise ValueError(f"length: expected an integer >= 2 (start and a word), got {length}")
        tokens = torch.full((len(texts), length), PADDING)
        for row, text in enumerate(texts):
            ids = [START, *map(self._id, split_words(text)[: length - 1 - end])]
            ids += [START] * end
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens

    def decode(self, tokens: torch.Tensor) -> list[str]:
        """The known words of each row of token ids [N, L], joined by spaces."""
        words = {index: word for word, index in self.ids.items()}
        return [" ".join(words[i] for i in row if i in words) for row in tokens.tolist()]

    def _id(self, word: str) -> int:
        known = self.ids.get(word)
        if known is not None:
            return known
        return _SPECIAL + len(self.ids) + zlib.crc32(word.encode()) % self.buckets

"""An LSTM that says what an image shows."""

from __future__ import annotations

import torch
from torch import nn

from fastcl.data.tokens import PADDING, START
from fastcl.functional import sequence_log_prob


class LSTMCaptioner(nn.Module):
    """Image features start an LSTM that emits one word after another.

    Captions are token ids [B, L] as of :meth:`WordTokenizer.encode` with an end: START, words,
    START again as the end, padding.

    Args:
        encoder: images to features [B, D], with a ``feature_dim``.
        vocabulary_size: V, number of token ids.
        width: of word vectors and LSTM state.

    Source: Vinyals et al. 2015, "Show and Tell", with the image as the initial state.
    """

    def __init__(self, encoder: nn.Module, vocabulary_size: int, width: int = 64):
        super().__init__()
        self.encoder = encoder
        features: int = encoder.feature_dim  # type: ignore[assignment]  # of a Module, anything
        self.start = nn.Linear(features, 2 * width)
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.words = nn.Linear(width, vocabulary_size)

    def forward(self, features: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """ln p(caption | image) [B]: the sum over its words, the end included.

        Args:
            features: [B, D], ``encoder(images)``: one image may have many captions.
            captions: [B, L] int64.

        Raises:
            ValueError: not as many captions as feature rows.
        """
        if captions.ndim != 2 or len(captions) != len(features):
            raise ValueError(
                f"captions: expected [{len(features)}, L], one per feature row, "
                f"got {list(captions.shape)}"
            )
        hidden, _ = self.lstm(self.embedding(captions[:, :-1]), self._state(features))
        words = captions[:, 1:]
        return sequence_log_prob(self.words(hidden), words, words != PADDING)

    @torch.no_grad()
    def generate(self, features: torch.Tensor, length: int) -> torch.Tensor:
        """The greedy captions [B, ``length``] of feature rows [B, D], at every step the best word.

        A caption that has no end after ``length`` - 2 words is ended there.
        """
        state = self._state(features)
        captions = torch.full((len(features), length), PADDING, device=features.device)
        captions[:, 0] = START
        ended = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        for step in range(1, length):
            hidden, state = self.lstm(self.embedding(captions[:, step - 1 : step]), state)
            scores = self.words(hidden[:, 0])
            scores[:, PADDING] = -torch.inf
            best = scores.argmax(1) if step < length - 1 else torch.full_like(captions[:, 0], START)
            captions[:, step] = torch.where(ended, PADDING, best)
            ended |= best == START
        return captions

    def _state(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, cell = self.start(features).unsqueeze(0).chunk(2, dim=2)
        return torch.tanh(hidden).contiguous(), cell.contiguous()

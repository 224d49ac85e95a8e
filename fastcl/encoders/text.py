"""Text encoders: token ids [B, L] to features [B, D]."""

from __future__ import annotations

import torch
from torch import nn

from fastcl.data.tokens import PADDING
from fastcl.losses.inputs import check_range

POOLINGS = ("mean", "cls")


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One row per text: the mean of its tokens' states, or the state of its first token.

    Args:
        states: [B, L, D].
        mask: [B, L] bool, True at tokens; a text without any gives zeros for ``"mean"``.
        pooling: ``"mean"`` or ``"cls"``.
    """
    if pooling == "cls":
        return states[:, 0]
    weights = mask.to(states.dtype).unsqueeze(2)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1.0)


def _check_pooling(pooling: str) -> str:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    return pooling


def _check_tokens(tokens: torch.Tensor) -> None:
    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.shape[1]:
        raise ValueError(
            f"tokens: expected integers [B, L >= 1], got {tokens.dtype} {list(tokens.shape)}"
        )


class TextTransformer(nn.Module):
    """A small pre-norm transformer; token ids [B, L] to features [B, D].

    Padding is never attended to, so a text's features do not depend on how far it was padded.

    Args:
        vocabulary_size: number of token ids; ``PADDING`` (0) among them.
        width: D = ``feature_dim``, a multiple of ``heads``.
        depth: layers; 0 pools the embeddings themselves.
        heads: of the attention.
        max_length: longest L.
        pooling: ``"mean"`` over the tokens, or ``"cls"``, the state of the first token.
        dropout: of embeddings and layers; the only difference of two views in SimCSE.

    Raises:
        ValueError: an argument out of range.

    Source: Vaswani et al. 2017, with the normalisation before each block.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        width: int = 128,
        depth: int = 1,
        heads: int = 4,
        max_length: int = 64,
        pooling: str = "mean",
        dropout: float = 0.1,
    ):
        super().__init__()
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"width: expected a multiple of heads = {heads}, got {width}")
        if depth < 0 or max_length < 1 or vocabulary_size < 1:
            raise ValueError(
                "depth, max_length and vocabulary_size: expected integers >= 0, 1 and 1, "
                f"got {depth}, {max_length} and {vocabulary_size}"
            )
        self.feature_dim = width
        self.max_length = max_length
        self.vocabulary_size = vocabulary_size
        self.pooling = _check_pooling(pooling)
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=PADDING)
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, width))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, activation="gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode token ids [B, L], L at most ``max_length``, to features [B, D].

        Raises:
            ValueError: not integers [B, L], too long, or (looked at on a CPU) ids outside the
                vocabulary.
        """
        _check_tokens(tokens)
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"tokens: expected at most {self.max_length} per text (max_length), got {length}"
            )
        check_range(tokens, "tokens", self.vocabulary_size, "ids below vocabulary_size")
        mask = tokens != PADDING
        states = self.dropout(self.embedding(tokens) + self.positions[:length])
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=~mask)
        return pool(self.norm(states), mask, self.pooling)


class HuggingFaceEncoder(nn.Module):
    """A Hugging Face model as an encoder; token ids [B, L] to features [B, D].

        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        encoder = HuggingFaceEncoder.from_pretrained(name, pooling="cls")
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        features = encoder(batch["input_ids"], batch["attention_mask"])

    Args:
        model: an AutoModel (encoder) instance: its ``config`` has ``hidden_size``, its output has
            ``last_hidden_state`` [B, L, D].
        pooling: ``"cls"`` (the first token's state, without the model's own pooler) or ``"mean"``.

    Raises:
        TypeError: ``model`` has no ``config.hidden_size``.
        ValueError: unknown pooling.
    """

    def __init__(self, model: nn.Module, pooling: str = "cls"):
        super().__init__()
        width = getattr(getattr(model, "config", None), "hidden_size", None)
        if not isinstance(width, int):
            raise TypeError(
                "model: expected a Hugging Face model with config.hidden_size, "
                f"got {type(model).__name__}"
            )
        self.model = model
        self.feature_dim = width
        self.pooling = _check_pooling(pooling)

    @classmethod
    def from_pretrained(cls, name: str, pooling: str = "cls", **options) -> HuggingFaceEncoder:
        """The model that ``transformers.AutoModel.from_pretrained(name, **options)`` gives.

        Raises:
            ModuleNotFoundError: the package transformers is not installed.
        """
        try:
            from transformers import AutoModel
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "HuggingFaceEncoder needs the package transformers: pip install transformers"
            ) from error
        return cls(AutoModel.from_pretrained(name, **options), pooling)

    def forward(
        self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode token ids [B, L] to features [B, D].

        Args:
            tokens: [B, L] integers.
            attention_mask: [B, L], 0 at padding; by default, tokens other than the model's
                ``pad_token_id`` are attended to.

        Raises:
            ValueError: ``tokens`` are not integers [B, L].
        """
        _check_tokens(tokens)
        if attention_mask is None:
            padding = getattr(self.model.config, "pad_token_id", None)
            attention_mask = tokens != (-1 if padding is None else padding)
        states = self.model(input_ids=tokens, attention_mask=attention_mask.long())
        return pool(states.last_hidden_state, attention_mask.bool(), self.pooling)

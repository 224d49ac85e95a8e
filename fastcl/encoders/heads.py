"""Projection heads: features [B, D] to the space [B, P] in which a loss compares them."""

from __future__ import annotations

import torch
from torch import nn


class LinearHead(nn.Sequential):
    """One linear layer, MoCo v1's head; optionally followed by batch norm.

    Args:
        in_features: D, the encoder's ``feature_dim``.
        out_features: P.
        batch_norm: normalise the projections.

    Source: He et al. 2020, "Momentum Contrast", section 3.3.
    """

    def __init__(self, in_features: int, out_features: int = 128, *, batch_norm: bool = False):
        _check_widths(in_features=in_features, out_features=out_features)
        layers: list[nn.Module] = [nn.Linear(in_features, out_features, bias=not batch_norm)]
        if batch_norm:
            layers.append(nn.BatchNorm1d(out_features))
        super().__init__(*layers)
        self.in_features = in_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project features [B, D] to [B, P].

        Raises:
            ValueError: ``features`` is not [B, D] with D = ``in_features``.
        """
        check_features(features, self.in_features)
        return super().forward(features)


class MLPHead(nn.Sequential):
    """Linear, batch norm, ReLU, linear: SimCLR's head; without batch norm MoCo v2's.

    The loss sees its output z; downstream tasks use its input h, which keeps more of what the
    augmentations were told to forget. A linear layer before batch norm has no bias, because batch
    norm would subtract it.

    Args:
        in_features: D, the encoder's ``feature_dim``.
        hidden_features: width of the hidden layers.
        out_features: P, the dimension in which views are compared.
        hidden_layers: how many.
        batch_norm: after each hidden linear layer.
        out_batch_norm: also after the last one, as SimCLR's own code has it on ImageNet.

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
    Representations", section 2.1 (g = W2 ReLU(W1 h)) and section 4.2; Chen et al. 2020,
    "Improved Baselines with Momentum Contrastive Learning", section 3.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 128,
        out_features: int = 64,
        *,
        hidden_layers: int = 1,
        batch_norm: bool = True,
        out_batch_norm: bool = False,
    ):
        _check_widths(
            in_features=in_features, hidden_features=hidden_features, out_features=out_features,
            hidden_layers=hidden_layers,
        )  # fmt: skip
        layers: list[nn.Module] = []
        width = in_features
        for _ in range(hidden_layers):
            layers.append(nn.Linear(width, hidden_features, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm1d(hidden_features))
            layers.append(nn.ReLU(inplace=True))
            width = hidden_features
        layers.append(nn.Linear(width, out_features, bias=not out_batch_norm))
        if out_batch_norm:
            layers.append(nn.BatchNorm1d(out_features))
        super().__init__(*layers)
        self.in_features = in_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project features [B, D] to [B, P].

        Raises:
            ValueError: ``features`` is not [B, D] with D = ``in_features``.
        """
        check_features(features, self.in_features)
        return super().forward(features)


def projection_head(
    layout: str, in_features: int, out_features: int = 128, *, hidden_features: int | None = None
) -> LinearHead | MLPHead:
    """A head by the name of the paper it comes from.

    Args:
        layout: "linear" or "moco_v1" (one linear layer), "simclr" (MLP with batch norm),
            "moco_v2" (MLP without).
        in_features: D, the encoder's ``feature_dim``.
        out_features: P.
        hidden_features: of the MLPs; D by default.

    Raises:
        ValueError: an unknown layout.
    """
    hidden = in_features if hidden_features is None else hidden_features
    if layout in ("linear", "moco_v1"):
        return LinearHead(in_features, out_features)
    if layout in ("simclr", "moco_v2"):
        return MLPHead(in_features, hidden, out_features, batch_norm=layout == "simclr")
    raise ValueError(f"layout: expected one of linear, moco_v1, moco_v2, simclr, got {layout!r}")


def _check_widths(**widths: int) -> None:
    for name, width in widths.items():
        if width < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {width}")


def check_features(features: torch.Tensor, in_features: int) -> None:
    """Features as wide as a head was built for.

    Raises:
        ValueError: they are not [B, D] with D = ``in_features``.
    """
    if features.ndim != 2 or features.shape[1] != in_features:
        raise ValueError(
            f"features: expected shape [B, {in_features}], got {list(features.shape)}; "
            "build the head with in_features=encoder.feature_dim"
        )


def check_fit(encoder: nn.Module, head: nn.Module) -> None:
    """A head that expects as many features as the encoder gives, as far as both say so.

    For an ``nn.Sequential`` its first layer speaks.

    Raises:
        ValueError: naming both widths (ResNet-18 gives 512 features, other networks 1280).
    """
    width = getattr(encoder, "feature_dim", None)
    first = head[0] if isinstance(head, nn.Sequential) and len(head) else head
    expected = getattr(head, "in_features", getattr(first, "in_features", width))
    if width is not None and width != expected:
        raise ValueError(
            f"head: {type(head).__name__} was built with in_features={expected}, but "
            f"{type(encoder).__name__} gives feature_dim={width}"
        )

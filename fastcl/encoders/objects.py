"""Images as sets of objects, and a graph network that says where each of them goes.

Source: Kipf, van der Pol and Welling 2020, "Contrastive Learning of Structured World Models",
sections 2.2 and 2.3 and appendix D.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastcl.losses.inputs import check_range, check_vector


def _extractor(form: str, in_channels: int, objects: int, width: int) -> nn.Sequential:
    """Image [B, C, H, W] to one map for each object, values in (0, 1)."""
    layers: dict[str, list[nn.Module]] = {
        "small": [
            nn.Conv2d(in_channels, width, 10, stride=10),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, objects, 1),
        ],
        "medium": [
            nn.Conv2d(in_channels, width, 9, padding=4),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(),
            nn.Conv2d(width, objects, 5, stride=5),
        ],
    }
    if form not in layers:
        raise ValueError(f"form: expected one of {', '.join(layers)}, got {form!r}")
    return nn.Sequential(*layers[form], nn.Sigmoid())


class ObjectEncoder(nn.Module):
    """Images [B, C, H, W] to states [B, K, D]: a map for each object, read by a shared MLP.

    Args:
        form: of the map extractor: ``"small"`` (10 x 10 kernels at stride 10, for objects that
            keep to such cells) or ``"medium"`` (9 x 9 kernels at every pixel, then 5 x 5 at
            stride 5).
        image_size: H and W.
        in_channels: C.
        objects: K.
        state_dim: D of one object.
        width: channels of the extractor's hidden layer.
        hidden_features: of the MLP.

    Raises:
        ValueError: unknown ``form``, or images smaller than one of its cells.
    """

    def __init__(
        self,
        form: str = "small",
        image_size: int = 50,
        in_channels: int = 3,
        objects: int = 5,
        state_dim: int = 2,
        width: int = 32,
        hidden_features: int = 512,
    ):
        super().__init__()
        self.image_shape = (in_channels, image_size, image_size)
        self.feature_dim = objects * state_dim
        self.extractor = _extractor(form, in_channels, objects, width)
        cell = {"small": 10, "medium": 5}[form]
        if image_size < cell:
            raise ValueError(f"image_size: expected at least {cell} for {form}, got {image_size}")
        side = image_size // cell
        self.mlp = _mlp(side**2, hidden_features, state_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode floating-point images to states [B, K, D].

        Raises:
            ValueError: images of another shape than the encoder was built for.
        """
        if images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images: expected shape [B, {expected}], got {list(images.shape)}")
        return self.mlp(self.extractor(images).flatten(2))


class TransitionGNN(nn.Module):
    """How an action changes every object: states [B, K, D] and actions [B] to changes [B, K, D].

    An edge MLP sees every ordered pair of different objects, its messages are summed over the
    pairs that begin at an object, and a node MLP sees the object, the action upon it and that
    sum. The next state is the state plus the change.

    Args:
        state_dim: D.
        actions: A, kinds of action on one object; an action is A times the object plus the kind.
        hidden_features: of both MLPs.
    """

    def __init__(self, state_dim: int = 2, actions: int = 4, hidden_features: int = 512):
        super().__init__()
        self.state_dim = state_dim
        self.actions = actions
        self.edge = _mlp(2 * state_dim, hidden_features, hidden_features)
        self.node = _mlp(hidden_features + state_dim + actions, hidden_features, state_dim)

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Changes [B, K, D] for actions [B] int64 in [0, A K).

        Raises:
            TypeError: actions that are not integers.
            ValueError: states that are not [B, K, D], not one action for each, or (looked at on
                a CPU) actions outside [0, A K).
        """
        if states.ndim != 3 or states.shape[2] != self.state_dim or len(actions) != len(states):
            raise ValueError(
                f"states and actions: expected [B, K, {self.state_dim}] and [B], "
                f"got {list(states.shape)} and {list(actions.shape)}"
            )
        batch, objects, _ = states.shape
        kinds = self.actions * objects
        actions = check_vector(actions, "actions", batch, states)
        check_range(actions, "actions", kinds, f"{self.actions} kinds on each of {objects} objects")
        upon = F.one_hot(actions.long(), kinds).to(states.dtype)
        others = [[j for j in range(objects) if j != i] for i in range(objects)]
        ends = states[:, torch.tensor(others, dtype=torch.int64, device=states.device)]
        starts = states[:, :, None].expand_as(ends)  # both [B, K, K - 1, D]
        messages = self.edge(torch.cat([starts, ends], dim=-1)).sum(dim=2)
        upon = upon.view(batch, objects, self.actions)
        return self.node(torch.cat([states, upon, messages], dim=-1))


def _mlp(in_features: int, hidden_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, hidden_features),
        nn.ReLU(),
        nn.Linear(hidden_features, hidden_features),
        nn.LayerNorm(hidden_features),
        nn.ReLU(),
        nn.Linear(hidden_features, out_features),
    )

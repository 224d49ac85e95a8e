"""ResNets whose parameters carry torchvision's names, so that weights move both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fastcl.encoders.cnn import check_images

STEMS = ("imagenet", "cifar")


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, figure 5, left)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(x)) + shortcut).relu()


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions and a shortcut (He et al. 2016, figure 5, right).

    The 3 x 3 convolution strides, as in torchvision ("v1.5"), not the first 1 x 1.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return (self.bn3(self.conv3(x)) + shortcut).relu()


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """A projection where shapes differ, else the identity, which has no parameters."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResNet(nn.Module):
    """Images [B, C, H, W] to features [B, ``feature_dim``], the averaged last map.

    ``state_dict`` has torchvision's keys and shapes but for ``fc``, the classifier, which an
    encoder lacks: see :func:`load_torchvision` and :func:`torchvision_state`.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        layers: blocks of the four stages.
        stem: "imagenet" (7 x 7, stride 2, max-pool) or "cifar" (3 x 3, stride 1, no pool: Chen et
            al. 2020, appendix B.9), for images of about 32 x 32.
        in_channels: C.

    Raises:
        ValueError: an unknown stem.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition".
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        *,
        stem: str = "imagenet",
        in_channels: int = 3,
    ):
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem: expected one of {', '.join(STEMS)}, got {stem!r}")
        self.in_channels = in_channels
        self.stem = stem
        self.feature_dim = 512 * block.expansion
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(64)
        width = 64
        for stage, (channels, count) in enumerate(zip((64, 128, 256, 512), layers, strict=True)):
            blocks = []
            for index in range(count):
                blocks.append(block(width, channels, 2 if stage and not index else 1))
                width = channels * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Encode floating-point images [B, C, H, W], H and W at least 8, to features [B, D].

        Raises:
            TypeError: not floating point.
            ValueError: wrong number of dimensions or channels, or images below 8 x 8.
        """
        return self.maps(images).mean((2, 3))

    def maps(self, images: Tensor) -> Tensor:
        """The last feature map [B, D, h, w], for detection and segmentation; errors as above."""
        check_images(images, self.in_channels, least=8)
        x = self.maxpool(self.bn1(self.conv1(images)).relu())
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return x


def resnet18(**options) -> ResNet:
    """ResNet-18, 512 features; ``options`` as for :class:`ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options) -> ResNet:
    """ResNet-34, 512 features; ``options`` as for :class:`ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options) -> ResNet:
    """ResNet-50, 2048 features; ``options`` as for :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
}


def load_torchvision(encoder: ResNet, state: Mapping[str, Tensor]) -> None:
    """Take over the ``state_dict`` of torchvision's ResNet of the same depth, in place.

    Its classifier ``fc`` is left out; a stem of another shape is not taken over silently.

    Raises:
        ValueError: keys or shapes that do not fit, the first of them named.
    """
    came = {name: value for name, value in state.items() if not name.startswith("fc.")}
    own = encoder.state_dict()
    for name in sorted(own.keys() ^ came.keys()):
        where = "missing from" if name in own else "unknown in"
        raise ValueError(f"state: {name} is {where} it; expected torchvision's keys of one depth")
    for name, value in came.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"state: {name} has shape {list(value.shape)}, expected {list(own[name].shape)} "
                f"(the encoder has the {encoder.stem} stem and {encoder.in_channels} channels)"
            )
    encoder.load_state_dict(came)


def torchvision_state(encoder: ResNet, classifier: nn.Linear | None = None) -> dict[str, Tensor]:
    """The encoder's ``state_dict`` with torchvision's keys, ``fc`` included if there is one.

    Without a classifier, load it with ``strict=False``: torchvision's own ``fc`` then stays.

    Raises:
        ValueError: a classifier that expects another number of features.
    """
    state = dict(encoder.state_dict())
    if classifier is not None:
        if classifier.in_features != encoder.feature_dim:
            raise ValueError(
                f"classifier: expected in_features {encoder.feature_dim}, "
                f"got {classifier.in_features}"
            )
        state |= {f"fc.{name}": value for name, value in classifier.state_dict().items()}
    return state

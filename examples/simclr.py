"""SimCLR in a plain PyTorch loop: handwritten digits without their labels.

    python examples/simclr.py [--steps 300]

Two augmented views of an image shall be closer than views of different images. Prints how many
held-out digits are right by their nearest neighbours among the training images, before and after.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from fastcl import NTXentLoss
from fastcl.evaluation import knn_accuracy


def augment(images: torch.Tensor) -> torch.Tensor:
    """A slightly rotated, scaled, moved and noisy copy of each image [N, 1, 8, 8]."""
    n = len(images)
    angle = 0.4 * torch.randn(n)
    scale = 1 + 0.15 * torch.randn(n)
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = scale * angle.cos()
    matrix[:, 1, 0] = scale * angle.sin()
    matrix[:, 0, 1] = -matrix[:, 1, 0]
    matrix[:, :, 2] = 0.2 * torch.randn(n, 2)
    grid = nn.functional.affine_grid(matrix, images.shape, align_corners=False)
    moved = nn.functional.grid_sample(images, grid, align_corners=False)
    return moved + 0.1 * torch.randn_like(images)


def encoder_and_head() -> tuple[nn.Module, nn.Module]:
    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
    )  # fmt: skip
    head = nn.Sequential(nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, 64))
    return encoder, head


def split_digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images [1200, 1, 8, 8] and labels, then held-out ones."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return images[train], labels[train], images[test], labels[test]


@torch.no_grad()
def score(encoder: nn.Module, data) -> float:
    encoder.eval()
    train, train_labels, test, test_labels = data
    right = knn_accuracy(encoder(test), test_labels, encoder(train), train_labels, k=20)
    encoder.train()
    return float(right)


def main(steps: int = 300) -> tuple[float, float]:
    torch.manual_seed(0)
    data = split_digits()
    encoder, head = encoder_and_head()
    encoder(data[0])  # batch norm's statistics, so that the untrained encoder is not weak for them
    before = score(encoder, data)
    loss_of = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3)
    for step in range(steps):
        images = data[0][torch.randint(len(data[0]), (256,))]
        z1, z2 = (head(encoder(augment(images))) for _ in range(2))
        loss = loss_of(z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    after = score(encoder, data)
    print(f"nearest neighbours: {before:.1%} right before, {after:.1%} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)

"""CLIP's two towers on a generated world: scenes seen by two sensors that share no feature.

    python examples/clip_two_tower.py [--steps 300]

Hidden causes make an "image" and a "text", each through its own nonlinear mixing and with noise.
Prints how many held-out images find their text among 500, before and after.
"""

import argparse

import torch
from torch import nn

from fastcl import CLIPLoss


class World:
    """Pairs of what two sensors see of the same hidden causes."""

    def __init__(self, causes: int = 8, image: int = 64, text: int = 48):
        generator = torch.Generator().manual_seed(0)
        self.causes = causes
        self.mixings = [
            (torch.randn(causes, 32, generator=generator), torch.randn(32, d, generator=generator))
            for d in (image, text)
        ]

    def draw(self, n: int, generator: torch.Generator) -> list[torch.Tensor]:
        hidden = torch.randn(n, self.causes, generator=generator)
        seen = [torch.tanh(hidden @ into / 2) @ out / 4 for into, out in self.mixings]
        return [x + 0.1 * torch.randn(x.shape, generator=generator) for x in seen]


def tower(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64))


@torch.no_grad()
def recall(images: torch.Tensor, texts: torch.Tensor) -> float:
    """Share of images whose most similar text is their own."""
    images, texts = (nn.functional.normalize(x, dim=1) for x in (images, texts))
    return float(((images @ texts.T).argmax(1) == torch.arange(len(images))).float().mean())


def main(steps: int = 300) -> tuple[float, float]:
    torch.manual_seed(0)
    world = World()
    held_out = world.draw(500, torch.Generator().manual_seed(1))
    towers = nn.ModuleList([tower(64), tower(48)])
    loss_of = CLIPLoss(learnable=True)  # the temperature is a parameter, as in CLIP
    optimizer = torch.optim.AdamW([*towers.parameters(), *loss_of.parameters()], lr=2e-3)
    before = recall(*(t(x) for t, x in zip(towers, held_out, strict=True)))
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        batch = world.draw(256, generator)
        loss = loss_of(*(t(x) for t, x in zip(towers, batch, strict=True)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}  temperature {loss_of.temperature:.3f}")
    after = recall(*(t(x) for t, x in zip(towers, held_out, strict=True)))
    print(f"recall@1 among 500: {before:.1%} before, {after:.1%} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)

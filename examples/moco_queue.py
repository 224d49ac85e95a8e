"""MoCo in a plain PyTorch loop: a small batch against thousands of keys from earlier steps.

    python examples/moco_queue.py [--steps 400]

Queries come from the encoder, keys from its moving average; keys of earlier batches wait in a queue
as further negatives, which costs no gradient and no copy.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from fastcl import InfoNCELoss, MomentumEncoder, NegativeQueue

sys.path.insert(0, str(Path(__file__).parent))
from simclr import augment, encoder_and_head, score, split_digits


def main(steps: int = 400) -> tuple[float, float]:
    torch.manual_seed(0)
    data = split_digits()
    encoder, head = encoder_and_head()
    encoder(data[0])
    before = score(encoder, data)
    model = nn.Sequential(encoder, head)
    keys_of = MomentumEncoder(model, momentum=0.99)
    loss_of = InfoNCELoss(temperature=0.2, queue=NegativeQueue(dim=64, size=1024))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        chosen = torch.randint(len(data[0]), (64,))
        images = data[0][chosen]
        keys_of.update(model)  # a little towards the encoder
        # equal ids are never each other's negatives: an image's own older keys are left out
        loss = loss_of(model(augment(images)), keys_of(augment(images)), ids=chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    after = score(encoder, data)
    print(f"nearest neighbours: {before:.1%} right before, {after:.1%} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    main(parser.parse_args().steps)

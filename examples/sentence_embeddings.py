"""Sentence embeddings from pairs: the names of Python's functions and their docstrings.

    python examples/sentence_embeddings.py [--steps 300]

Text comes from this machine's standard library; modules are either for training or held out.
Prints how many held-out names find their docstring's first line among the ten most similar.
"""

import argparse
import ast
import re
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import nn

from fastcl import InfoNCELoss

BUCKETS = 8192


def pairs() -> tuple[list, list]:
    """(name, first line of its docstring) of functions, in training and in held-out modules."""
    sides: tuple[list, list] = ([], [])
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")]):
        if file.parent.name in ("test", "idlelib", "lib2to3"):
            continue
        side = sides[zlib.crc32(file.name.encode()) % 10 == 0]
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                line = text.splitlines()[0]
                if len(line.split()) > 2:
                    arguments = " ".join(a.arg for a in node.args.args)
                    side.append((f"{file.stem} {node.name} {arguments}", line))
    return sides


def words(text: str) -> list[int]:
    """Word and letter-triple numbers of a text."""
    found = re.findall(r"[A-Z]?[a-z]+", text)
    parts = [w.lower() for w in found]
    parts += [w[i : i + 3] for w in parts for i in range(len(w) - 2)]
    return [zlib.crc32(p.encode()) % BUCKETS for p in parts] or [0]


class Embedder(nn.Module):
    """Mean of word vectors, then two layers; a list of texts to [N, 128].

    In training three words in ten are left out, so that no single one decides.
    """

    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, 128, mode="mean")
        self.layers = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128))

    def forward(self, texts: list[str]) -> torch.Tensor:
        numbers = [torch.tensor(words(text)) for text in texts]
        if self.training:
            kept = [n[torch.rand(len(n)) > 0.3] for n in numbers]
            numbers = [k if len(k) else n for k, n in zip(kept, numbers, strict=True)]
        offsets = torch.tensor([0, *map(len, numbers[:-1])]).cumsum(0)
        bags = self.table(torch.cat(numbers), offsets)
        return bags + self.layers(bags)


@torch.no_grad()
def recall_at_10(embed: Embedder, held_out: list) -> float:
    embed.eval()
    rows = [embed(list(texts)) for texts in zip(*held_out, strict=True)]
    names, lines = (nn.functional.normalize(r, dim=1) for r in rows)
    nearest = (names @ lines.T).topk(10).indices
    embed.train()
    return float((nearest == torch.arange(len(names))[:, None]).any(1).float().mean())


def main(steps: int = 300) -> tuple[float, float]:
    torch.manual_seed(0)
    train, held_out = pairs()
    print(f"{len(train)} pairs to train on, {len(held_out)} held out")
    embed = Embedder()
    before = recall_at_10(embed, held_out)
    loss_of = InfoNCELoss(temperature=0.05)
    optimizer = torch.optim.AdamW(embed.parameters(), lr=1e-3)
    for step in range(steps):
        batch = [train[i] for i in torch.randint(len(train), (128,))]
        names, lines = zip(*batch, strict=True)
        # a docstring that stands twice in the batch is no negative of itself
        ids = torch.tensor([zlib.crc32(line.encode()) for line in lines])
        loss = loss_of(embed(list(names)), embed(list(lines)), ids=ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    after = recall_at_10(embed, held_out)
    print(f"recall@10 of {len(held_out)}: {before:.1%} before, {after:.1%} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)

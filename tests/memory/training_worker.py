"""A small MoCo run that checkpoints every step: python training_worker.py FILE STEPS

It goes on where FILE ends, prints each step it has finished, and keeps the loss curve in FILE.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from fastcl import InfoNCELoss, MemoryBankLoss, MomentumEncoder, NegativeQueue
from fastcl.checkpoint import save_checkpoint

path, steps = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
data = torch.randn(300, 12)

encoder = nn.Sequential(
    nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16)
)
keys_of = MomentumEncoder(encoder, 0.9, total_steps=steps, buffers=True)
queue = NegativeQueue(16, 200, dtype=torch.bfloat16)  # wraps after 200 / 23 steps
loss = InfoNCELoss(0.1, queue=queue, learnable=True)
bank = MemoryBankLoss(300, 16, form="nce", negatives=20)
modules = nn.ModuleDict({"encoder": encoder, "keys_of": keys_of, "loss": loss, "bank": bank})
optimizer = torch.optim.AdamW([*encoder.parameters(), *loss.parameters()], 1e-3)
curve: list[float] = []

if path.exists():
    state = torch.load(path, weights_only=True)
    modules.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["generator"])
    curve = state["curve"]

for step in range(len(curve), steps):
    ids = torch.randint(300, (23,))
    view1, view2 = (data[ids] + 0.1 * torch.randn(23, 12) for _ in range(2))
    keys_of.update(encoder)
    z = encoder(view1)
    value = loss(z, keys_of(view2), ids=ids) + bank(z, ids)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    curve.append(value.item())
    save_checkpoint(
        {
            "modules": modules.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "curve": curve,
        },
        path,
    )
    print(step, flush=True)

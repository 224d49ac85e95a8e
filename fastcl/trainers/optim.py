"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl.trainers.options import Optimization


def configure_optimizers(module: pl.LightningModule, how: Optimization) -> OptimizerLRScheduler:
    """What a LightningModule's ``configure_optimizers`` returns: one optimizer, stepped schedule.

    Frozen parameters are left out; weight decay spares single numbers (a learnt temperature).
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, how)
    trainer = module.trainer
    total = int(trainer.estimated_stepping_batches)
    warmup = how.warmup_epochs * int(trainer.num_training_batches)
    factor = SCHEDULES[how.schedule]

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return factor(min(1.0, (step - warmup) / max(1, total - warmup)), step / max(1, total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, at)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda since_warmup, of_all: 0.5 * (1.0 + math.cos(math.pi * since_warmup)),
    "steps": lambda since_warmup, of_all: 0.1 ** ((of_all >= 0.6) + (of_all >= 0.8)),
    "constant": lambda since_warmup, of_all: 1.0,
}
"""Factor of the learning rate, of the shares of the run done since the warm-up and in all."""


def make_optimizer(parameters: Iterable[nn.Parameter], how: Optimization) -> torch.optim.Optimizer:
    """The optimizer named by ``how``; single numbers get no weight decay."""
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.numel() > 1]}]
    if numbers := [p for p in parameters if p.numel() == 1]:
        groups.append({"params": numbers, "weight_decay": 0.0})
    rate, decay, momentum = how.learning_rate, how.weight_decay, how.sgd_momentum
    if how.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, weight_decay=decay)
    if how.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, weight_decay=decay)
    if how.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=rate, weight_decay=decay, momentum=momentum, nesterov=momentum > 0
        )
    return LARS(groups, lr=rate, weight_decay=decay, momentum=momentum)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, which lets SGD take the large rates of large batches.

        g <- gradient + weight_decay w;  g <- trust |w| / |g| g
        v <- momentum v + lr g;  w <- w - v

    The first line is for matrices and kernels alone: biases and normalisation have no decay and
    take plain steps (Chen et al. 2020, appendix B). Written here because neither PyTorch nor
    Lightning has it.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: in [0, 1).
        weight_decay: added to the gradient.
        trust: the trust coefficient, eta in the paper.

    Source: You et al. 2017, "Large Batch Training of Convolutional Networks", algorithm 1.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
        trust: float = 1e-3,
    ):  # fmt: skip
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if parameter.ndim > 1:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                    length, steepness = parameter.norm(), gradient.norm()
                    ratio = group["trust"] * length / steepness
                    # a matrix of zeros, or without a gradient, has no ratio
                    gradient *= torch.where((length > 0) & (steepness > 0), ratio, 1.0)
                state = self.state[parameter]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(parameter)
                state["velocity"].mul_(group["momentum"]).add_(gradient, alpha=group["lr"])
                parameter -= state["velocity"]
        return loss

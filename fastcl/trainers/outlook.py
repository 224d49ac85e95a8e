"""What a predictive model foresees at one step of its inputs, and how good that is."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
import torch

from fastcl.evaluation.probe import linear_probe


@dataclass(frozen=True)
class Outlook:
    """A look ahead from one step: its features z [B, D], its context c [B, C], predictions
    [B, K, D] of the next K steps and the features ``targets`` [B, K, D] found there."""

    features: torch.Tensor
    context: torch.Tensor
    predictions: torch.Tensor
    targets: torch.Tensor

    def scores(self) -> torch.Tensor:
        """Mean [B] over steps and features of prediction times target."""
        return (self.predictions * self.targets).mean(dim=(1, 2))

    def group_scores(self, group: int) -> torch.Tensor:
        """Scores [B / G, G, G] of every prediction with every target of its group of G."""
        predictions, targets = self.predictions.flatten(1), self.targets.flatten(1)
        predictions, targets = (x.unflatten(0, (-1, group)) for x in (predictions, targets))
        return predictions @ targets.transpose(1, 2) / predictions.shape[2]

    def accuracy(self, group: int) -> float:
        """Share of predictions that score highest with what really followed, among ``group``."""
        picked = self.group_scores(group).argmax(dim=2)
        return (picked == torch.arange(group)).double().mean().item()

    def step(self, step: int) -> Outlook:
        """The same, of one step alone."""
        one = slice(step, step + 1)
        return Outlook(self.features, self.context, self.predictions[:, one], self.targets[:, one])

    def representations(self) -> dict[str, torch.Tensor]:
        """z, c and both side by side, to be probed."""
        return {
            "z": self.features,
            "c": self.context,
            "z+c": torch.cat([self.features, self.context], dim=1),
        }


@torch.no_grad()
def look_ahead(module: pl.LightningModule, inputs: torch.Tensor, batch_size: int = 256) -> Outlook:
    """An :class:`Outlook` of many inputs in evaluation mode, on the processor."""
    was_training = module.training
    module.eval()
    parts = [module(part.to(module.device)) for part in inputs.split(batch_size)]
    module.train(was_training)
    return Outlook(
        *(
            torch.cat([getattr(part, name) for part in parts]).cpu()
            for name in ("features", "context", "predictions", "targets")
        )
    )


def probe_scores(
    train: Outlook, train_labels: torch.Tensor, held_out: Outlook, labels: torch.Tensor
) -> dict[str, float]:
    """Accuracy of linear probes of z, c and both that are trained with every label."""
    train_rows, rows = train.representations(), held_out.representations()
    return {
        name: linear_probe(
            train_rows[name].numpy(),
            train_labels.numpy(),
            rows[name].numpy(),
            labels.numpy(),
            labels_per_class=None,
        )
        for name in rows
    }

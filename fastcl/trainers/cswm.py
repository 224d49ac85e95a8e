"""C-SWM: states of objects in which the effect of an action is the difference of two pictures."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from fastcl import CSWMLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.render import WORLDS
from fastcl.data.worlds import Episodes, random_episodes
from fastcl.encoders import ObjectEncoder, TransitionGNN
from fastcl.evaluation import predictive_figures
from fastcl.evaluation.features import calibrate_batch_norm, extract_features
from fastcl.evaluation.ranking import hits_at, mean_reciprocal_rank, ranks_by_distance
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.predictive import CSWMOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization

_AHEAD = (1, 5, 10)  # actions
_TEST_SEED, _VALIDATION_SEED = 2**32, 2**32 + 1  # runs' own seeds lie below
_CALIBRATED, _SHOWN = 256, 300  # states


class CSWM(pl.LightningModule):
    """Object encoder and transition network trained with the contrastive energy.

    Batches are positions [B, K, 2], actions [B] and the positions after them; the pictures are
    drawn on the module's device.

    Args:
        render: positions [B, K, 2] to images [B, 3, H, W].
        encoder: images to states [B, K, D].
        transition: states [B, K, D] and actions [B] to changes [B, K, D].
        form, sigma, margin: of the loss.
        optimization: optimizer and schedule.

    Source: Kipf, van der Pol and Welling 2020, "Contrastive Learning of Structured World Models",
    section 2.
    """

    def __init__(
        self,
        render: nn.Module,
        encoder: nn.Module,
        transition: nn.Module,
        *,
        form: str = "paper",
        sigma: float = 0.5,
        margin: float = 1.0,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.render = render
        self.encoder = encoder
        self.transition = transition
        self.loss = CSWMLoss(form=form, sigma=sigma, margin=margin, return_metrics=True)
        self.optimization = optimization

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """States [B, K, D] of what is seen where objects are at positions [B, K, 2]."""
        return self.encoder(self.render(positions))

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        before, actions, after = batch
        states, next_states = self(torch.cat([before, after])).chunk(2)
        loss, metrics = self.loss(states, self.transition(states, actions), next_states)
        log_batch(self, len(actions), loss, metrics)
        return loss

    @torch.no_grad()
    def roll_out(self, states: torch.Tensor, actions: torch.Tensor) -> list[torch.Tensor]:
        """Predicted states [N, K, D] after each of the actions [N, T], T of them."""
        predicted = []
        for upon in actions.unbind(1):
            states = states + self.transition(states, upon)
            predicted.append(states)
        return predicted

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


@torch.no_grad()
def ranks_ahead(
    module: CSWM, episodes: Episodes, steps: tuple[int, ...]
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Ranks [E] of the states reached among those of all episodes, by number of actions ahead;
    beside them the same where nothing is predicted to change."""
    positions, actions = (x.to(module.device) for x in (episodes.positions, episodes.actions))
    start = extract_features(module, positions[:, 0])
    predicted = module.roll_out(start, actions)
    moved, still = {}, {}
    for step in steps:
        reached = extract_features(module, positions[:, step]).flatten(1)
        moved[step] = ranks_by_distance(predicted[step - 1].flatten(1), reached)
        still[step] = ranks_by_distance(start.flatten(1), reached)
    return moved, still


def experiment(options: CSWMOptions, seed: int) -> Experiment:
    """C-SWM in one of its worlds; the test episodes are the same for every seed."""
    training = random_episodes(options.train_episodes, options.train_steps, seed)
    scored = random_episodes(
        options.scored_episodes,
        max(_AHEAD),
        _TEST_SEED if options.report_on == "test" else _VALIDATION_SEED,
    )

    def scores(module: CSWM) -> dict[str, float]:
        ranks, still = ranks_ahead(module, scored, _AHEAD)
        return {
            **{f"Hits@1 +{step}": hits_at(ranks[step], 1) for step in _AHEAD},
            **{f"MRR +{step}": mean_reciprocal_rank(ranks[step]) for step in _AHEAD},
            **{f"still +{step}": hits_at(still[step], 1) for step in (_AHEAD[0], _AHEAD[-1])},
        }

    def figures(module: CSWM, folder: Path) -> list[str]:
        ranks, still = ranks_ahead(module, scored, tuple(range(1, max(_AHEAD) + 1)))
        predictive_figures.hits_by_steps(
            {
                "Hits@1": [hits_at(r, 1) for r in ranks.values()],
                "MRR": [mean_reciprocal_rank(r) for r in ranks.values()],
                "Hits@1 if nothing moved": [hits_at(r, 1) for r in still.values()],
            },
            path=folder / "hits.png",
        )
        shown = scored.positions[:_SHOWN].to(module.device)
        actions = scored.actions[:_SHOWN, :5].to(module.device)
        predictive_figures.latent_states(
            extract_features(module, shown[:, 5]).cpu(),
            module.roll_out(extract_features(module, shown[:, 0]), actions)[-1].cpu(),
            module.render(shown[0, :5]).cpu(),
            5,
            path=folder / "states.png",
        )
        return ["hits.png", "states.png"]

    return Experiment(
        module=build_cswm(options, training, seed),
        batches=EpochShuffledBatches(training.transitions(), options.batch_size, seed),
        scores=scores,
        headline="Hits@1 +1",
        measured=f"State n actions ahead (+n) found among {options.scored_episodes}; "
        "still: Hits@1 if nothing were predicted to move",
        data=f"random episodes in the world of {options.world}, seen as pictures of 50 x 50",
        references={"chance": {f"Hits@1 +{step}": 1 / len(scored.actions) for step in _AHEAD}},
        figures=figures,
    )


def build_cswm(options: CSWMOptions, episodes: Episodes, seed: int) -> CSWM:
    """The module with its initial parameters, a function of ``options`` and ``seed``; batch norm
    starts from the statistics of pictures of ``episodes``."""
    torch.manual_seed(seed)
    module = CSWM(
        WORLDS[options.world](),
        ObjectEncoder(
            options.encoder, width=options.width, hidden_features=options.hidden_features
        ),
        TransitionGNN(hidden_features=options.hidden_features),
        form=options.form,
        sigma=options.sigma,
        margin=options.margin,
        optimization=options,
    )
    calibrate_batch_norm(module, episodes.positions[:_CALIBRATED, 0])
    return module

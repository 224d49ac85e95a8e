"""Contrastive learning of captions: say what tells an image from others."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from fastcl import CaptionContrastiveLoss
from fastcl.data.batches import EpochShuffledBatches
from fastcl.data.scenes import CAPTION_LENGTH, Scenes, load_scenes
from fastcl.data.tokens import WordTokenizer
from fastcl.encoders import LSTMCaptioner, SmallCNN
from fastcl.evaluation.captions import listener_recall, self_retrieval
from fastcl.evaluation.features import calibrate_batch_norm, extract_features
from fastcl.trainers.callbacks import log_batch
from fastcl.trainers.experiment import Experiment
from fastcl.trainers.methods.captions import CaptioningOptions
from fastcl.trainers.optim import configure_optimizers
from fastcl.trainers.options import Optimization

_AMONG = 100  # scenes of the self-retrieval, which tries every caption on every image


class Captioning(pl.LightningModule):
    """A captioner trained by maximum likelihood and then against its own frozen copy.

    Batches are (images [B, C, H, W], captions [B, L] token ids). From epoch ``mle_epochs`` on, the
    captioner shall find an image's own caption likelier than the reference does, and captions of
    other images less likely. The reference is the captioner as it was at that moment, in evaluation
    mode.

    Args:
        captioner: what is trained.
        mle_epochs: epochs of maximum likelihood.
        negatives: captions of other images that each image is shown (vu in the paper's code).
        optimization: optimizer and schedule.

    Source: Dai and Lin 2017, "Contrastive Learning for Image Captioning", section 3.
    """

    def __init__(
        self,
        captioner: LSTMCaptioner,
        *,
        mle_epochs: int = 10,
        negatives: int = 5,
        optimization: Optimization = Optimization(),  # noqa: B008  # frozen
    ):
        super().__init__()
        self.captioner = captioner
        self.reference = copy.deepcopy(captioner).requires_grad_(False)
        self.loss = CaptionContrastiveLoss()
        self.mle_epochs = mle_epochs
        self.negatives = negatives
        self.optimization = optimization

    def on_train_epoch_start(self) -> None:
        self.reference.eval()  # Lightning puts all parts into training mode
        if self.current_epoch == self.mle_epochs:
            self.reference.load_state_dict(self.captioner.state_dict())

    def training_step(
        self, batch: tuple[torch.Tensor, torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        images, captions = batch
        features = self.captioner.encoder(images)
        if self.current_epoch < self.mle_epochs:
            loss = -self.captioner(features, captions).mean()
        else:
            others = self._others(captions)
            with torch.no_grad():
                known = self.reference.encoder(images)
                before = _log_likelihoods(self.reference, known, captions, others)
            own, other = _log_likelihoods(self.captioner, features, captions, others)
            loss = self.loss(own, before[0], other, before[1])
        log_batch(self, len(images), loss, {})
        return loss

    def _others(self, captions: torch.Tensor) -> torch.Tensor:
        """For each image, captions [B, V, L] of V different other images of the batch."""
        count = len(captions)
        draws = torch.rand(count, count - 1, device=captions.device)
        shifts = 1 + draws.argsort(1)[:, : self.negatives]
        return captions[(torch.arange(count, device=captions.device)[:, None] + shifts) % count]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimizers(self, self.optimization)


def _log_likelihoods(
    captioner: LSTMCaptioner, features: torch.Tensor, own: torch.Tensor, others: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ln p of each image's own caption [B] and of others' [B, V]."""
    shown = features.repeat_interleave(others.shape[1], 0)
    return captioner(features, own), captioner(shown, others.flatten(0, 1)).view(others.shape[:2])


def experiment(options: CaptioningOptions, seed: int) -> Experiment:
    """Scenes whose training captions leave things out, judged by whether captions tell apart."""
    splits = load_scenes(options.drawings)
    scored: Scenes = getattr(splits, options.report_on)
    tokenizer = WordTokenizer.of_texts(splits.train.captions(), buckets=1)
    captions = tokenizer.encode(
        splits.train.captions(options.detail, seed), CAPTION_LENGTH, end=True
    )
    torch.manual_seed(seed)
    cnn = SmallCNN(in_channels=3, width=options.cnn_width)
    calibrate_batch_norm(cnn, splits.train.images)
    captioner = LSTMCaptioner(cnn, tokenizer.vocabulary_size, options.width)

    def scores(module: Any) -> dict[str, float]:
        results = {}
        for name, captioner in (("", module.captioner), (" of MLE", module.reference)):
            features = extract_features(captioner.encoder, scored.images)
            spoken = captioner.generate(features, CAPTION_LENGTH)
            results["self-retrieval" + name] = self_retrieval(
                captioner, features[:_AMONG], spoken[:_AMONG]
            )
            results["listener" + name] = listener_recall(tokenizer.decode(spoken), scored)
        return results

    return Experiment(
        module=Captioning(
            captioner,
            mle_epochs=options.mle_epochs,
            negatives=options.negatives,
            optimization=options,
        ),
        batches=EpochShuffledBatches((splits.train.images, captions), options.batch_size, seed),
        scores=scores,
        headline="self-retrieval",
        measured="Scenes found by the caption made for them: by the captioner among "
        f"{_AMONG} scenes, a listener among {len(scored)}; of MLE: before the contrastive epochs",
        data="generated images of two coloured shapes and captions that leave things out",
    )

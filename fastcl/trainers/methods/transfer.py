"""What ``fastcl transfer`` can be told; importing this needs nothing but Python."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastcl.trainers.methods.images import RECIPES
from fastcl.trainers.options import Optimization, UsageError, check_at_least, check_choice

MODES = {
    "scratch": "from scratch",
    "frozen": "frozen (BN eval)",
    "frozen_bn_train": "frozen (BN train)",
    "fine_tuned": "fine-tuned",
}
"""What is compared: the name in files, and in tables. Batch norm of a frozen encoder normalises by
its running statistics (eval) or by the batch (train)."""

METHODS_WITH_ENCODER = (
    "simclr", "moco", "moco_v1", "instdisc", "supcon", "rotation", "jigsaw"
)  # fmt: skip
"""Methods whose encoder of images can be handed on."""


@dataclass(frozen=True)
class ClassifierOptions(Optimization):
    """Supervised training on labelled images: the same for all that are compared.

    On the digits with 10 labels per class the order of the frozen and the fine-tuned encoder
    depends on the budget: fine-tuning is ahead at 12 epochs, where training from scratch has nearly
    stopped to improve, and the frozen encoder from about 25 epochs on.

    Args:
        epochs: passes over the labelled images.
        batch_size: images per step; all labelled ones where there are fewer.
        recipe: augmentation of the labelled images, or none.
    """

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    schedule: str = "constant"
    epochs: int = 12
    batch_size: int = 32
    recipe: str = "none"

    def check(self) -> None:
        super().check()
        check_at_least("classifier.epochs", self.epochs, 1)
        check_at_least("classifier.batch_size", self.batch_size, 2)
        check_choice("classifier.recipe", self.recipe, ("none", *RECIPES))


@dataclass(frozen=True)
class Amount:
    """How many labels there are: a share of the training images, or a number for each class."""

    text: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*", self.text) and not 0 < self._percent() <= 100:
            raise UsageError(
                "labels: expected percentages such as 10% or labels per class such as 10, "
                f"got {self.text!r}"
            )

    def _percent(self) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)%", self.text)
        return float(found[1]) if found else 0.0

    @property
    def title(self) -> str:
        """In tables and pictures."""
        return self.text if self._percent() else f"{self.text} per class"

    @property
    def phrase(self) -> str:
        """As a title of its own."""
        return f"{self.text} of the labels" if self._percent() else f"{self.text} labels per class"

    @property
    def slug(self) -> str:
        """In file names."""
        return self.text.replace("%", "pct").replace(".", "_")

    def per_class(self, counts: list[int]) -> list[int]:
        """Labels to draw from classes of these sizes; at least one of each.

        Raises:
            UsageError: more than a class has.
        """
        percent = self._percent()
        wanted = [max(1, round(n * percent / 100)) if percent else int(self.text) for n in counts]
        if any(w > n for w, n in zip(wanted, counts, strict=True)):
            raise UsageError(
                f"labels: expected at most {min(counts)} per class (training images of the "
                f"rarest), got {self.text}"
            )
        return wanted

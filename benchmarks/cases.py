"""What is measured: problems as data, their inputs, and the truth in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.1
# "tf32" is fp32 whose products may be rounded to TF32: torch.set_float32_matmul_precision("high")
DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16
}  # fmt: skip

# Largest relative error of the loss and of the gradient (Frobenius norm) that may be timed.
TOLERANCES = {
    "fp32": (1e-5, 1e-4), "tf32": (1e-3, 5e-3), "bf16": (2e-2, 5e-2), "fp16": (5e-3, 2e-2)
}  # fmt: skip

SIGLIP_BIAS = -10.0
# Arithmetic that no exact method avoids: NT-Xent, DCL and SupCon use symmetry and form scores
# twice, CLIP keeps its exponentials; a sigmoid needs no sum before its gradient, and the queue's
# one pass gives sums and gradient together.
_FLOP = {"ntxent": 4, "dcl": 4, "supcon": 4, "clip": 6, "siglip": 6, "queue": 4}
_VIEWS = ("ntxent", "dcl", "supcon")  # rows are both views of a batch
_CLASSES = 100  # of SupCon


@dataclass(frozen=True)
class Case:
    """One problem: forward and backward with normalisation at temperature 0.1.

    Attributes:
        task: ``"ntxent"``, ``"dcl"`` (two views), ``"supcon"`` (two views with labels), ``"clip"``
            (both directions), ``"siglip"`` (bias -10) or ``"queue"`` (MoCo: query, key, and unit
            rows that need no gradient).
        rows: rows of both views, CLIP and SigLIP pairs, or queries.
        width: features per row.
        dtype: a key of :data:`DTYPES`, of inputs and gradients.
        keys: rows that each row is compared with.
        quick: belongs to the default selection.
        hidden: runs only where ``--case`` names it.
    """

    task: str
    rows: int
    width: int
    dtype: str
    keys: int
    quick: bool = False
    hidden: bool = False

    @property
    def name(self) -> str:
        between = f"x{self.keys}" if self.task == "queue" else ""
        return f"{self.task}-{self.rows}{between}x{self.width}-{self.dtype}"

    @property
    def flop(self) -> int:
        """Floating-point operations of the minimal method."""
        return _FLOP[self.task] * self.rows * self.keys * self.width

    @property
    def scores(self) -> int:
        """Numbers in the matrix that plain PyTorch stores."""
        return self.rows * self.keys

    def describe(self) -> dict:
        """The problem, as in a file of results."""
        names = ("task", "rows", "keys", "width", "dtype", "flop")
        return {"case": self.name} | {name: getattr(self, name) for name in names}

    def inputs(self, device: str = "cpu") -> list[Tensor]:
        """Two leaves [rows or rows / 2, width], then what needs no gradient.

        That is a queue's unit rows [keys, width], or labels [rows / 2]. Partners have a cosine near
        0.7, as early in training; the numbers are reproducible on one kind of device.
        """
        generator = torch.Generator(device).manual_seed(self.rows + self.width)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, self.width, generator=generator, device=device)

        n = self.rows // 2 if self.task in _VIEWS else self.rows
        first = normal(n)
        second = first + normal(n)
        dtype = DTYPES[self.dtype]
        tensors = [x.to(dtype).requires_grad_() for x in (first, second)]
        if self.task == "queue":
            tensors.append(F.normalize(normal(self.keys), dim=1).to(dtype))
        elif self.task == "supcon":
            tensors.append(torch.arange(n, device=device) % _CLASSES)
        return tensors

    def tiny(self) -> Case:
        """The same task on a few rows, for loading code before anything is counted."""
        return Case(self.task, 16, self.width, self.dtype, 16)


def _ntxent(rows: int, width: int, dtype: str, **flags: bool) -> Case:
    return Case("ntxent", rows, width, dtype, rows, **flags)


def _clip(rows: int, dtype: str, **flags: bool) -> Case:
    return Case("clip", rows, 512, dtype, rows, **flags)


CASES = (
    *(
        _ntxent(n, d, dtype, quick=d == 128 and dtype == "fp32" and n <= 8192)
        for dtype in ("fp32", "bf16")
        for d in (128, 512)
        for n in (128, 512, 2048, 8192, 16384, 32768)
    ),
    *(
        _clip(n, dtype, quick=n <= 512)
        for dtype in ("fp32", "bf16")
        for n in (128, 512, 4096, 16384)
    ),
    *(Case("queue", 256, 128, dtype, 65536, quick=dtype == "fp32") for dtype in ("fp32", "bf16")),
    *(
        Case(task, n, d, dtype, n, quick=n == quick and dtype == "fp32")
        for task, d, quick in (("supcon", 128, 2048), ("dcl", 128, 2048), ("siglip", 512, 512))
        for dtype in ("fp32", "bf16")
        for n in (512, 2048, 8192)
    ),
    *(_ntxent(64, 32, dtype, hidden=True) for dtype in ("fp32", "bf16")),
    *(Case(task, 64, 32, "fp32", 64, hidden=True) for task in ("clip", "siglip", "supcon", "dcl")),
    Case("queue", 16, 32, "fp32", 256, hidden=True),
)


def select(substrings: list[str] | None, full: bool) -> list[Case]:
    """Cases whose name holds one of ``substrings``, or the full or quick selection."""
    if substrings is not None:
        return [case for case in CASES if any(part in case.name for part in substrings)]
    return [case for case in CASES if not case.hidden and (full or case.quick)]


@dataclass
class Truth:
    """Loss [] and gradients of a case's leaves in float64."""

    loss: Tensor
    gradients: list[Tensor]

    def errors(self, loss: Tensor, gradients: list[Tensor]) -> tuple[float, float]:
        """Relative error of a loss, and of its gradients in the Frobenius norm."""
        loss_error = (loss.detach().double() - self.loss).abs() / self.loss.abs()
        wrong = sum(
            float((g.double() - t).square().sum())
            for g, t in zip(gradients, self.gradients, strict=True)
        )
        size = sum(float(t.square().sum()) for t in self.gradients)
        return float(loss_error), (wrong / size) ** 0.5


def truth(case: Case, block: int = 256, device: str = "cpu") -> Truth:
    """The definition in float64, ``block`` rows of scores at a time, differentiated by autograd.

    It shares no code with fastcl, and its memory is linear in the batch.
    """
    tensors = case.inputs(device)
    leaves, rest = [x.detach().double().requires_grad_() for x in tensors[:2]], tensors[2:]
    units = [F.normalize(x, dim=1) for x in leaves]
    # blocks accumulate into the unit rows' gradients; normalisation follows once
    held = [u.detach().requires_grad_() for u in units]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for begin in range(0, case.rows, block):
        rows = torch.arange(begin, min(begin + block, case.rows), device=device)
        part = _blocks_of(case, held, rest, rows)
        part.backward()
        total += part.detach()
    torch.autograd.backward(units, [h.grad for h in held])
    return Truth(total, [x.grad for x in leaves])


def _blocks_of(case: Case, units: list[Tensor], rest: list[Tensor], rows: Tensor) -> Tensor:
    """The share of ``rows`` in the mean loss."""
    a, b = units
    if case.task in _VIEWS:
        z = torch.cat(units)
        itself = rows[:, None] == torch.arange(case.rows, device=z.device)
        scores = (z[rows] @ z.T / TEMPERATURE).masked_fill(itself, float("-inf"))
        partner = (rows + case.rows // 2) % case.rows
        if case.task == "ntxent":
            return F.cross_entropy(scores, partner, reduction="sum") / case.rows
        if case.task == "dcl":  # the positive only pulls
            positive = scores.gather(1, partner[:, None])
            negatives = scores.scatter(1, partner[:, None], float("-inf"))
            return (negatives.logsumexp(1) - positive[:, 0]).sum() / case.rows
        labels = rest[0].repeat(2)
        positive = (labels[rows, None] == labels) & ~itself
        log_probability = F.log_softmax(scores, 1).masked_fill(~positive, 0.0)
        return -(log_probability.sum(1) / positive.sum(1)).sum() / case.rows
    if case.task == "clip":
        both = [x[rows] @ y.T / TEMPERATURE for x, y in ((a, b), (b, a))]
        return sum(F.cross_entropy(s, rows, reduction="sum") for s in both) / (2 * case.rows)
    if case.task == "siglip":
        logits = a[rows] @ b.T / TEMPERATURE + SIGLIP_BIAS
        positive = rows[:, None] == torch.arange(case.rows, device=rows.device)
        return F.softplus(torch.where(positive, -logits, logits)).sum() / case.rows
    positive = (a[rows] * b[rows]).sum(1, keepdim=True)
    scores = torch.cat([positive, a[rows] @ rest[0].double().T], 1) / TEMPERATURE
    target = torch.zeros_like(rows)
    return F.cross_entropy(scores, target, reduction="sum") / case.rows

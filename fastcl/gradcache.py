"""Batches whose encoder does not fit: exact gradients of one large batch from small ones.

GradCache (Gao et al. 2021): a contrastive loss couples samples only through their embeddings, so

1. embed every micro-batch without a graph,
2. take the one loss over all embeddings and its gradient with respect to them,
3. embed every micro-batch again, now with a graph, and pass its rows of that gradient back.

An encoder's activations are held for one micro-batch at a time, for one more forward pass. The
result is the gradient of the whole batch as long as the encoder treats samples independently;
batch statistics are those of micro-batches.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from .ops.pairs import describe

_SHARE = 0.5  # of the memory that is free which an automatic micro-batch may fill


class GradCache:
    """One loss over a batch of any size, its gradients by micro-batches.

        cache = GradCache(encoder, NTXentLoss(0.1), micro_batch_size=64)
        loss = cache(view1, view2)      # instead of loss(...).backward(); gradients are in .grad
        optimizer.step()

    - Random numbers are those of the first pass in both, so dropout masks agree; module buffers
      (running statistics) are updated once per micro-batch, as by one pass.
    - Under DDP gradients are synchronised once, in the last micro-batch.
    - Mixed precision: call it inside ``torch.autocast``; give a ``GradScaler`` as ``scaler`` and
      step with it as usual.
    - A loss may have parameters (a learnable temperature), a queue, or return (loss, metrics).

    Args:
        encoders: one module for all inputs, or one for each input (the same may repeat). Each
            maps a micro-batch to embeddings [n, ...]. One without a gradient (a
            :class:`~fastcl.MomentumEncoder`) runs once.
        loss: called as ``loss(*embeddings, **keywords)``, one tensor [N, ...] per input.
        micro_batch_size: samples at a time, or ``"auto"``: when first called, the bytes that
            autograd keeps per sample are measured, and half of the free memory filled; on a GPU a
            trial then halves that until it fits.
        scaler: ``torch.amp.GradScaler`` in use.
        progress: called as ``progress(stage, done, total)`` after each micro-batch, with stage
            ``"embed"`` or ``"backward"``.

    Raises:
        TypeError, ValueError: encoders that are no modules; a micro-batch size below 1.
    """

    def __init__(
        self,
        encoders: nn.Module | Sequence[nn.Module],
        loss: Callable[..., Any],
        micro_batch_size: int | str = "auto",
        *,
        scaler: torch.amp.GradScaler | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ):
        several: list[Any] = list(encoders) if isinstance(encoders, (list, tuple)) else [encoders]
        if not several or not all(isinstance(encoder, nn.Module) for encoder in several):
            raise TypeError(
                f"encoders {describe(encoders)}; expected a torch.nn.Module or a list of them"
            )
        if micro_batch_size != "auto" and (
            not isinstance(micro_batch_size, int) or micro_batch_size < 1
        ):
            raise ValueError(
                f"micro_batch_size {describe(micro_batch_size)}; expected a positive integer or "
                "'auto'"
            )
        self.encoders = several
        self.loss = loss
        self.micro_batch_size = micro_batch_size
        self.scaler = scaler
        self.progress = progress

    def __call__(self, *inputs, **keywords):
        """The loss of the whole batch, detached; gradients are added to ``.grad``.

        Args:
            inputs: one per view or modality: a tensor [N, ...], or a tuple, list or mapping of such
                (a tokenizer's output). An encoder gets a micro-batch of it, a mapping by keyword.
            keywords: for the loss (labels, ids, weight).

        Returns:
            What the loss returned, without its graph.

        Raises:
            ValueError: no inputs, another number than encoders, or tensors of different lengths; a
                loss that is not one number.
            TypeError: an encoder that does not return a tensor.
        """
        inputs = tuple(dict(x) if isinstance(x, Mapping) else x for x in inputs)
        encoders = self._encoders_for(inputs)
        if self.micro_batch_size == "auto":
            self.micro_batch_size = min(
                _fitting_size(e, x) for e, x in zip(encoders, inputs, strict=True)
            )
        size = int(self.micro_batch_size)
        batches = [
            _MicroBatch(encoder, index, rows, part)
            for index, (encoder, x) in enumerate(zip(encoders, inputs, strict=True))
            for rows, part in _split(x, size)
        ]
        before = {id(encoder): _snapshot(encoder) for encoder in encoders}
        parts = self._embed(batches)
        embeddings = [
            torch.cat([p for p, b in zip(parts, batches, strict=True) if b.input == index])
            for index in range(len(inputs))
        ]
        for encoder, embedding in zip(encoders, embeddings, strict=True):
            embedding.requires_grad_(_learns(encoder))
        result = self.loss(*embeddings, **keywords)
        value = result[0] if isinstance(result, tuple) else result
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"loss {describe(value)}; expected one number to differentiate")
        with _no_autocast():
            (value if self.scaler is None else self.scaler.scale(value)).backward()

        gradients = [embedding.grad for embedding in embeddings]
        batches = [batch for batch in batches if gradients[batch.input] is not None]
        for encoder in {id(batch.encoder): batch.encoder for batch in batches}.values():
            _restore(encoder, before[id(encoder)])
        self._backward(batches, gradients)
        detached = value.detach()
        return (detached, *result[1:]) if isinstance(result, tuple) else detached

    def _encoders_for(self, inputs) -> list[nn.Module]:
        if not inputs:
            raise ValueError("inputs are absent; expected one for each view or encoder")
        if len(self.encoders) == 1:
            return self.encoders * len(inputs)
        if len(self.encoders) != len(inputs):
            raise ValueError(
                f"inputs came {len(inputs)}; expected {len(self.encoders)}, one for each encoder"
            )
        return self.encoders

    def _embed(self, batches: list[_MicroBatch]) -> list[Tensor]:
        """First pass: embeddings without a graph."""
        parts = []
        for done, batch in enumerate(batches, 1):
            batch.remember_generators()
            with torch.no_grad(), _unsynchronised(batch.encoder):
                parts.append(batch.embed())
            if self.progress is not None:
                self.progress("embed", done, len(batches))
        # up to torch 2.10 weights cast without a graph would serve the second pass, and lose theirs
        torch.clear_autocast_cache()
        return parts

    def _backward(self, batches: list[_MicroBatch], gradients: list) -> None:
        """Second pass, in the order of the first, so that buffers pass through the same states."""
        last = {id(batch.encoder): index for index, batch in enumerate(batches)}
        for index, batch in enumerate(batches):
            synchronised = last[id(batch.encoder)] == index
            context = contextlib.nullcontext() if synchronised else _unsynchronised(batch.encoder)
            with context:
                with batch.remembered_generators(), torch.enable_grad():
                    embedding = batch.embed()
                with _no_autocast():
                    embedding.backward(gradients[batch.input][batch.rows])
            if self.progress is not None:
                self.progress("backward", index + 1, len(batches))


@dataclass
class _MicroBatch:
    """Some rows of one input, their encoder, and the generators as they were before it ran."""

    encoder: nn.Module
    input: int
    rows: slice
    samples: Any

    def embed(self) -> Tensor:
        samples, n = self.samples, self.rows.stop - self.rows.start
        embedding = self.encoder(**samples) if isinstance(samples, dict) else self.encoder(samples)
        if not isinstance(embedding, Tensor) or embedding.shape[:1] != (n,):
            raise TypeError(
                f"embeddings: the encoder returned what {describe(embedding)}; expected a tensor "
                f"of {n} rows"
            )
        return embedding

    def remember_generators(self) -> None:
        self.cpu = torch.get_rng_state()
        tensors = [*tree_flatten(self.samples)[0], *self.encoder.parameters()]
        self.devices, self.states = get_device_states(*tensors)

    @contextlib.contextmanager
    def remembered_generators(self) -> Iterator[None]:
        """The generators of the first pass inside, those of now again afterwards."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states)
            yield


def _length(x) -> int:
    lengths = {leaf.shape[0] for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor)}
    if len(lengths) != 1:
        raise ValueError(
            f"inputs hold tensors of {sorted(lengths) or 'no'} samples; expected one number"
        )
    return lengths.pop()


def _split(x, size: int) -> Iterator[tuple[slice, Any]]:
    n = _length(x)
    leaves, structure = tree_flatten(x)
    for begin in range(0, n, size):
        rows = slice(begin, min(begin + size, n))
        yield (
            rows,
            tree_unflatten([v[rows] if isinstance(v, Tensor) else v for v in leaves], structure),
        )


def _learns(encoder: nn.Module) -> bool:
    return any(p.requires_grad for p in encoder.parameters())


def _unsynchronised(encoder: nn.Module):
    if isinstance(encoder, DistributedDataParallel):
        return encoder.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Autocast belongs to forward passes; backward ones repeat their dtypes."""
    devices = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _snapshot(module: nn.Module) -> list[Tensor]:
    return [b.detach().clone() for b in module.buffers()]


@torch.no_grad()
def _restore(module: nn.Module, values: list[Tensor]) -> None:
    for buffer, value in zip(module.buffers(), values, strict=True):
        buffer.copy_(value)


# ------------------------------------------------------------------- automatic micro-batch size


def _fitting_size(encoder: nn.Module, x) -> int:
    """A power of two (or the whole batch) of samples whose activations fit the free memory."""
    n = _length(x)
    if not _learns(encoder):
        return n
    module = encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
    device = next(leaf.device for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor))
    trial = min(n, 2)  # layers may want more than one sample
    per_sample = _trial(module, x, trial) / trial
    size = max(1, min(n, int(_SHARE * _free_bytes(device) / max(per_sample, 1.0))))
    if size < n:
        size = 2 ** (size.bit_length() - 1)
    if device.type == "cuda":
        size = _backed_off(size, lambda size: _trial(module, x, size))
    return size


def _backed_off(size: int, trial: Callable[[int], Any]) -> int:
    """``size``, halved until ``trial`` of it fits the memory of the accelerator."""
    while True:
        try:
            trial(size)
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        torch.cuda.empty_cache()  # outside the handler, whose traceback holds what did not fit
        size //= 2


def _trial(module: nn.Module, x, size: int) -> float:
    """Bytes that autograd keeps for ``size`` samples; one backward pass that leaves no trace."""
    rows, samples = next(_split(x, size))
    batch, buffers = _MicroBatch(module, 0, rows, samples), _snapshot(module)
    kept: dict[int, int] = {}
    here_anyway = [*module.parameters(), *tree_flatten(samples)[0]]
    own = {t.untyped_storage().data_ptr() for t in here_anyway if isinstance(t, Tensor)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch.remember_generators()
    try:
        with batch.remembered_generators(), torch.enable_grad():
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                embedding = batch.embed()
            parameters = [p for p in module.parameters() if p.requires_grad]
            torch.autograd.grad(embedding.sum(), parameters, allow_unused=True)
    finally:
        _restore(module, buffers)
    return float(sum(kept.values()))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:  # what Linux could free counts too
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

"""What test_elsewhere.py runs in a process of its own: the same on the CPU and elsewhere."""

from __future__ import annotations

import copy
import importlib.util
import types
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from rich.console import Console
from torch import nn

import fastcl
from fastcl import mining
from fastcl.distributed.check import _Trained
from fastcl.evaluation import (
    alignment,
    knn_accuracy,
    mean_classifier_accuracy,
    retrieval_scores,
    uniformity,
    verification_auc,
)
from fastcl.evaluation.ranking import ranks_by_distance
from fastcl.trainers import METHODS, run
from fastcl.trainers.callbacks import EpochLog
from fastcl.trainers.fit import fit


def _load(name):
    path = Path(__file__).parent / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


elsewhere = _load("elsewhere.py")
contract = _load("distributed/test_contract.py")
DEVICE = elsewhere.DEVICE
LOSSES = {
    name: case for name, case in contract.cases().items()
    if " gather" in name and "float32" not in name
}  # fmt: skip


@pytest.fixture(autouse=True)
def there():
    with elsewhere.Elsewhere():
        yield


def moved(x, device):
    """Tensors and modules among ``x``, copied to ``device``."""
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).to(device)
    if isinstance(x, torch.Tensor):
        return x.detach().clone().to(device).requires_grad_(x.requires_grad)
    if isinstance(x, dict):
        return {key: moved(value, device) for key, value in x.items()}
    return type(x)(moved(value, device) for value in x) if isinstance(x, (list, tuple)) else x


def assert_alike(compute, *inputs):
    """``compute`` of inputs there gives, there, what it gives on the CPU, where ``None`` is too."""
    torch.manual_seed(5)
    here = compute(*moved(inputs, "cpu"))
    torch.manual_seed(5)
    found = compute(*moved(inputs, DEVICE))
    assert here.keys() == found.keys()
    for name, value in here.items():
        if isinstance(value, torch.Tensor):
            assert found[name].device == DEVICE, name
            value, other = value.detach(), found[name].detach().cpu()
            torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert found[name] == pytest.approx(value, rel=1e-6), name


def test_it_is_as_strict_as_a_gpu():
    x = torch.randn(4, 3).to(DEVICE)
    assert (
        x.device == torch.ones(2, device=DEVICE).device == torch.tensor([1.0], device=DEVICE).device
    )
    for mix in (lambda: x + torch.ones(4, 3), lambda: torch.cat([x, torch.ones(4, 3)]),
                lambda: nn.Linear(3, 2)(x), lambda: torch.ones(4)[x.argmax(0)]):  # fmt: skip
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    for leave in (x.numpy, lambda: torch.zeros(4, 3).numpy() + x.__array__()):
        with pytest.raises(TypeError, match="numpy"):
            leave()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())
    assert (x * 2.0 + torch.tensor(1.0)).cpu().device.type == "cpu"  # numbers go with either


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    case = LOSSES[name]
    model = _Trained(case)
    model.loss.distributed = None

    def step(model, inputs, options):
        output = model(*inputs, **options)
        loss, metrics = output if isinstance(output, tuple) else (output, {})
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss, **metrics, **gradients}

    assert_alike(step, model, case.inputs, dict(case.options))


def _others():
    x, y = torch.randn(2, 12, 6, requires_grad=True)
    labels = torch.arange(12) % 4
    yield "pairwise", fastcl.PairwiseContrastiveLoss(), (x, y, labels < 2)
    yield "triplet", fastcl.TripletLoss(), (x, y, y.roll(1, 0))
    yield "lifted", fastcl.LiftedStructureLoss(), (x, labels)
    yield "multi-similarity", fastcl.MultiSimilarityLoss(), (x, labels)
    for kind in ("batch_all", "batch_hard", "semi_hard"):
        yield f"mined {kind}", fastcl.MinedTripletLoss(0.2, mining=kind), (x, labels)
    blocks = torch.randn(2, 12, 5, 6, requires_grad=True)
    yield "block", fastcl.BlockContrastiveLoss(), (x, *blocks)
    yield "patch", fastcl.PatchNCELoss(), tuple(blocks)
    states = torch.randn(3, 12, 4, 6, requires_grad=True)
    yield "world", fastcl.CSWMLoss(), tuple(states)
    own, others = torch.randn(2, 12, requires_grad=True), torch.randn(2, 12, 3)
    yield "captions", fastcl.CaptionContrastiveLoss(), (*own, *others)
    for negatives in ("batch", "sequence"):
        loss = fastcl.CPCLoss(6, 6, 2, negatives=negatives)
        yield f"predictive {negatives}", loss, (blocks[0], blocks[1])
    for form in ("softmax", "sampled_softmax", "nce"):
        loss = fastcl.MemoryBankLoss(
            20, 6, form=form, **{"negatives": 5} if form != "softmax" else {}
        )
        yield f"bank {form}", loss, (x, labels)


OTHERS = {name: (loss, inputs) for name, loss, inputs in _others()}


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses(name):
    loss, inputs = OTHERS[name]

    def step(loss, *inputs):
        output = loss(*inputs)
        value = output[0] if isinstance(output, tuple) else output
        value.backward()
        grads = {f"gradient {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
        state = {n: t for n, t in loss.state_dict().items() if t.is_floating_point()}
        return {"loss": value, **grads, **state}

    assert_alike(step, loss, *inputs)


def test_memory():
    """A queue that wraps around, filled by a momentum encoder; its state comes back from a CPU."""

    def steps(encoder, queue, inputs):
        device = inputs.device
        keys_of = fastcl.MomentumEncoder(encoder, 0.9)
        loss = fastcl.InfoNCELoss(queue=queue, return_metrics=True)
        values = {}
        for step in range(4):
            keys_of.update(encoder)
            keys = keys_of(inputs + step)
            ids = torch.arange(len(keys), device=device)
            value, metrics = loss(encoder(inputs), keys, ids=ids)
            value.backward()
            values |= {f"{step} {n}": v for n, v in {"loss": value, **metrics}.items()}
        state = {name: tensor.cpu() for name, tensor in queue.state_dict().items()}
        again = fastcl.NegativeQueue(8, 20).to(device)
        again.load_state_dict(state)
        assert (again.fill, again.pointer) == (20, 28 % 20)
        return {**values, "keys": again.keys, "ids": again.ids}

    encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
    assert_alike(steps, encoder, fastcl.NegativeQueue(8, 20), torch.randn(7, 5))


def test_gradcache():
    def step(encoder, first, second):
        loss = fastcl.GradCache(encoder, fastcl.NTXentLoss(0.2), 4)(first, second)
        return {"loss": loss, **{n: p.grad for n, p in encoder.named_parameters()}}

    encoder = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 8))
    assert_alike(step, encoder, *torch.randn(2, 10, 5))


def test_evaluation():
    def measure(x, y, labels):
        return {
            "hard": torch.stack(mining.batch_hard(x, labels)),
            "ranks": ranks_by_distance(x, y),
            "alignment": alignment(x, y),
            "uniformity": uniformity(x),
            "auc": verification_auc(x, labels),
            "knn": knn_accuracy(x, labels, y, labels, k=5),
            "means": mean_classifier_accuracy(x, labels, y, labels),
            "pairs": mean_classifier_accuracy(x, labels, y, labels, pairs=True),
            **retrieval_scores(x, y),
            **{f"own {n}": v for n, v in retrieval_scores(x, query_ids=labels).items()},
        }

    assert_alike(measure, *torch.randn(2, 30, 6), torch.arange(30) % 4)


class There(Accelerator):
    """Lightning's word for the device."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    def get_device_stats(self, device):
        return {}

    parse_devices = staticmethod(lambda devices: [DEVICE])
    get_parallel_devices = staticmethod(lambda devices: [DEVICE])
    auto_device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    name = staticmethod(lambda: "elsewhere")


@pytest.fixture
def trained_there(monkeypatch):
    """``fastcl.trainers`` finds one device, which is not the CPU."""

    def trainer(**options):
        there = {"accelerator": There(), "strategy": SingleDeviceStrategy(DEVICE), "devices": 1}
        return pl.Trainer(**{**options, **there})

    names = {name: getattr(pl, name) for name in ("Callback", "loggers", "LightningModule")}
    module = importlib.import_module("fastcl.trainers.fit")
    monkeypatch.setattr(module, "pl", types.SimpleNamespace(Trainer=trainer, **names))


TINY = {"batch_size": 400, "width": 4, "label_draws": 1, "knn_every": 1, "warmup_epochs": 0}


@pytest.mark.usefixtures("trained_there")
def test_simclr(tmp_path):
    """Trained, scored beside its untrained twin, drawn, reported."""
    options = METHODS["simclr"].options(epochs=1, view_noise=0.1, optimizer="lars", **TINY)
    report = run("simclr", options, seeds=[0], out=tmp_path, console=Console(quiet=True))
    assert report.results[0].device == {"name": "elsewhere"}
    assert next(report.experiment.module.parameters()).device == DEVICE


@pytest.mark.usefixtures("trained_there")
def test_moco(tmp_path):
    """Resumed from a checkpoint, queue and momentum encoder go on where they were."""
    options = METHODS["moco"].options(
        epochs=2, checkpoint_every=1, queue_size=1000, bn_splits=2, symmetric=True, **TINY
    )

    def train(folder, checkpoint=None):
        log = EpochLog(tmp_path / f"{folder}.csv")
        experiment = METHODS["moco"].experiment(options, 0)
        fit(experiment, options, 0, folder=tmp_path / folder, callbacks=[log],
            checkpoint=checkpoint)  # fmt: skip
        assert experiment.module.loss.queue.keys.device == DEVICE
        return log.path.read_text()

    assert train("whole") == train("resumed", tmp_path / "whole/epoch-0000.ckpt")


@pytest.mark.usefixtures("trained_there")
def test_code_search(tmp_path):
    """Its module and scores, of a few token ids in place of a library's functions."""
    from fastcl.data.batches import EpochShuffledBatches
    from fastcl.encoders import TextTransformer
    from fastcl.trainers import texts
    from fastcl.trainers.clip import build_clip
    from fastcl.trainers.experiment import Experiment

    options = METHODS["clip"].options(epochs=1, batch_size=16, width=8, dim=8, warmup_epochs=0)
    sources, docstrings = torch.randint(1, 50, (2, 32, 10))
    encoder = TextTransformer(50, width=8, depth=1, heads=2, max_length=10, dropout=0.1)
    module = build_clip(options, encoder, encoder)
    batches = EpochShuffledBatches((sources, docstrings), 16, 0)
    experiment = Experiment(module, batches, lambda _: {}, "", "", "")
    assert fit(experiment, options, 0, folder=tmp_path) == DEVICE
    first, second = module.eval().embed(sources, docstrings)
    assert first.device == second.device == DEVICE
    assert 0 <= texts.search_scores(first, second)["mrr"] <= 1

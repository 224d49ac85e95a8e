"""Who serves a call: refusals, kernels that wait for a measurement, arguments that are declined."""

import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastcl
from fastcl import NegativeQueue
from fastcl.ops import Backend, chunked, library, registry


@contextlib.contextmanager
def registered(**functions):
    """A backend of the given functions on CPUs, preferred to all others; its calls by name."""
    options = {
        key: functions.pop(key) for key in ("withheld", "partial", "fuses") if key in functions
    }
    ops = tuple(functions)
    backend = Backend("mine", SimpleNamespace(**functions), ops=ops, devices=("cpu",), **options)
    before = registry.backends()
    for name in before:
        registry.unregister(name)
    for one in (backend, *before.values()):
        registry.register(one)
    try:
        yield
    finally:
        registry.unregister("mine")


def normalize(x):
    return fastcl.ops.l2_normalize(x)[0]


def test_a_withheld_kernel_serves_only_when_forced():
    def doubled(x, eps, precision):
        y, factors = chunked.l2_normalize(x, eps, precision)
        return 2 * y, factors

    x = torch.randn(3, 4)
    with registered(l2_normalize=doubled, withheld=lambda call: f"{call.op}: unmeasured"):
        exact = normalize(x)
        with fastcl.use_backend("mine"):
            assert torch.equal(normalize(x), 2 * exact)
            with pytest.raises(RuntimeError, match="mine: does not implement similarity_topk"):
                fastcl.ops.similarity_topk(x, x, k=1)
        assert torch.equal(normalize(x), exact)


def test_each_device_is_judged_by_itself(monkeypatch):
    """A GPU too old for a backend beside one that is not, whichever of them is current."""
    capabilities = {None: (7, 5), 0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    for backend in (fastcl.ops.triton.BACKEND, fastcl.ops.cuda.BACKEND):
        monkeypatch.setitem(
            registry._REGISTRY.backends, backend.name, dataclasses.replace(backend, unavailable="")
        )
    monkeypatch.setattr(registry._REGISTRY, "answers", {})
    with FakeTensorMode():
        rows = [torch.empty(3, 4, device=f"cuda:{i}") for i in range(2)]
    monkeypatch.setattr(library, "run", lambda call, *_: registry.pick(call).name)
    names = [library.dispatch("l2_normalize", "", x, torch.float32) for x in rows]
    assert names == ["chunked", "triton"]
    assert registry.find(registry.Call("enqueue", "cuda", torch.float32, 0)) is None
    with fastcl.use_backend("cuda"):
        found = registry.find(registry.Call("enqueue", "cuda", torch.float32, 1))
        assert found is not None
        assert found.name == "cuda"


def test_a_partial_backend_leaves_the_rest_to_others():
    """What it has no kernel for, and what it declines, goes on as if it were not there."""

    def narrow(x, eps, precision):
        if x.shape[1] > 4:
            return NotImplemented
        y, factors = chunked.l2_normalize(x, eps, precision)
        return 2 * y, factors

    narrow_x, wide_x = torch.randn(3, 4), torch.randn(3, 5)
    with registered(l2_normalize=narrow, partial=True), fastcl.use_backend("mine"):
        assert torch.allclose(normalize(narrow_x).norm(dim=1), torch.tensor(2.0))
        assert torch.allclose(normalize(wide_x).norm(dim=1), torch.tensor(1.0))
        fastcl.NTXentLoss()(wide_x, wide_x + 1)
    with (
        registered(l2_normalize=narrow), fastcl.use_backend("mine"),
        pytest.raises(RuntimeError, match="no backend serves this l2_normalize: mine declined"),
    ):  # fmt: skip
        normalize(wide_x)


def test_who_declines_a_whole_loss_leaves_it_to_the_next():
    """A kernel for small batches, and behind it one for the others."""
    calls = []

    def declined(*_):
        calls.append("small")
        return NotImplemented

    a, b = torch.randn(5, 4), torch.randn(5, 4)
    with fastcl.use_backend("chunked"):
        exact = fastcl.NTXentLoss()(a, b)
    small = registered(pair_softmax=declined, partial=True, fuses=lambda *_: False)
    with small, fastcl.use_backend("mine"):
        call = registry.Call("pair_softmax", "cpu", torch.float32)
        assert registry.fuses(call, 5, 4) == (not fastcl.backends()["cpu"].unavailable)
        torch.testing.assert_close(fastcl.NTXentLoss()(a, b), exact)
        assert bool(calls) == registry.fuses(call, 5, 4)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_queue_gives_its_step_to_a_backend_that_takes_it_whole(normalized):
    """The same ring as composed from PyTorch, with and without ids, past the end."""
    calls = []

    def enqueue(rows, ids, eps, no_id, keys, key_ids, pointer, fill, precision):
        calls.append(eps)
        for i, row in enumerate(rows):
            slot = int(pointer)
            keys[slot] = row / max(float(row.norm()), eps) if eps else row
            key_ids[slot] = no_id if ids is None else ids[i]
            pointer.copy_((slot + 1) % len(keys))
            fill.clamp_(max=len(keys) - 1).add_(1)

    ours = NegativeQueue(4, 7, normalize=normalized)
    theirs = copy.deepcopy(ours)
    for n, ids in ((3, None), (5, torch.arange(5)), (20, None)):
        rows = torch.randn(n, 4)
        theirs.enqueue(rows, ids)
        with registered(enqueue=enqueue):
            ours.enqueue(rows, ids)
        state = theirs.state_dict()
        torch.testing.assert_close(dict(ours.state_dict()), dict(state))
        assert (ours.fill, ours.pointer) == (theirs.fill, theirs.pointer)
    assert calls == [1e-12 if normalized else 0.0] * 3
    with registered(enqueue=enqueue):
        arguments = (torch.randn(2, 4), None, 0.0, -1, torch.zeros(7, 4), torch.zeros(7).long())
        head = torch.tensor(0), torch.tensor(0)
        torch.library.opcheck(torch.ops.fastcl.enqueue.default, (*arguments, *head, torch.float32))

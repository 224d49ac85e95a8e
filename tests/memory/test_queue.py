"""NegativeQueue: exact ring, exact losses, nothing copied, nothing lost on resume."""

import copy
import importlib.util
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcl
from fastcl import InfoNCELoss, NegativeQueue, NTXentLoss, SupConLoss
from fastcl import functional as f

_path = Path(__file__).parent.parent / "losses" / "oracle.py"
_spec = importlib.util.spec_from_file_location("oracle", _path)
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

F64 = torch.float64
_k, _j = torch.arange(1, 13, dtype=F64), torch.arange(1, 16, dtype=F64)
A0 = torch.sin(_k).reshape(4, 3)
A = torch.nn.functional.normalize(A0)
B = torch.nn.functional.normalize(A0 + 0.5 * torch.cos(_k / 2).reshape(4, 3))
Q = torch.nn.functional.normalize(torch.cos(_j / 3).reshape(5, 3))


def filled(n=60, d=20, size=80, dtype=F64, ids=None, **options):
    queue = NegativeQueue(d, size, dtype=dtype, **options)
    queue.enqueue(torch.randn(n, d, dtype=F64), ids)
    return queue


def assert_same_gradient(ours, theirs, inputs, rtol=1e-11):
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=rtol)
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    for a, b in pairs:
        assert float((a - b).norm()) <= rtol * float(b.norm())


# ---------------------------------------------------------------------------------------- ring


def test_the_ring_is_that_of_a_list():
    """Any batch against any size: one key, a size reached exactly, several times round."""
    for size in (1, 5, 16):
        queue, slots, position = NegativeQueue(3, size, normalize=False), {}, 0
        generator = random.Random(size)
        for step in range(40):
            n = generator.choice([1, 2, 3, 5, 7, 16, 40])
            keys, ids = torch.randn(n, 3), torch.randint(0, 100, (n,))
            queue.enqueue(keys, ids if step % 3 else None)
            for i in range(n):
                slots[position] = (keys[i], int(ids[i]) if step % 3 else -(2**63))
                position = (position + 1) % size
            assert (queue.fill, queue.pointer) == (len(slots), position)
            expected = [slots[s] for s in range(len(slots))]
            assert torch.equal(queue.keys, torch.stack([key for key, _ in expected]))
            assert queue.ids.tolist() == [i for _, i in expected]


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_storage_dtype(dtype):
    keys = torch.nn.functional.normalize(torch.randn(7, 5))
    queue = NegativeQueue(5, 8, dtype=dtype, normalize=False)
    queue.enqueue(keys)
    assert torch.equal(queue.keys, keys.to(dtype))
    query = torch.randn(3, 5, requires_grad=True)
    ours = f.info_nce(query, keys[:3], queue=queue, normalize=False)
    theirs = f.info_nce(query, keys[:3], queue.keys.double(), normalize=False)
    assert_same_gradient(ours, theirs, (query,), 1e-6)


def test_nothing_is_copied_and_evaluation_freezes():
    queue = filled()
    address = queue.keys.data_ptr()
    loss = InfoNCELoss(queue=queue)
    z1, z2 = torch.randn(9, 20, dtype=F64), torch.randn(9, 20, dtype=F64)
    loss(z1, z2)
    assert queue.keys.data_ptr() == address
    assert (queue.fill, queue.pointer) == (69, 69)
    loss.eval()
    value = loss(z1, z2)
    queue.enqueue(z1)
    assert (queue.fill, queue.pointer) == (69, 69)
    assert torch.equal(value, loss(z1, z2))


# -------------------------------------------------------------------------------------- losses


def test_moco_known_answers():
    values = {0.07: 0.779116901835, 0.1: 0.804117796214, 0.2: 0.857080516564}
    for temperature, expected in values.items():
        queue = NegativeQueue(3, 5, dtype=F64)
        queue.enqueue(Q)
        a = A.clone().requires_grad_()
        loss = InfoNCELoss(temperature, queue=queue)(a, B)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-10)
    queue = NegativeQueue(3, 5, dtype=F64, normalize=False)
    queue.enqueue(Q)
    a = A.clone().requires_grad_()
    InfoNCELoss(0.07, normalize=False, queue=queue)(a, B).backward()  # Q is overwritten before
    expected = [-0.032912246421, -0.104769348658, 0.356024009222]
    assert a.grad[0].tolist() == pytest.approx(expected, abs=1e-11)
    assert float(a.grad.norm()) == pytest.approx(1.800374294204, rel=1e-10)
    assert torch.equal(queue.keys[:4], B)  # the loss came first, then the keys
    assert queue.keys.grad is None


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("n", [0, 60], ids=["empty", "part full"])
def test_nt_xent_is_the_dense_definition(with_ids, n):
    ids, key_ids = torch.randint(0, 20, (13,)), torch.randint(0, 30, (60,))
    queue = filled(ids=key_ids) if n else NegativeQueue(20, 80, dtype=F64)
    z1 = torch.randn(13, 20, dtype=F64, requires_grad=True)
    z2 = torch.randn(13, 20, dtype=F64, requires_grad=True)
    options = {"ids": ids} if with_ids else {}
    s, positive, keep = oracle.two_views(z1, z2, 0.1, options.get("ids"))
    keys = queue.keys.clone()
    s = torch.cat([s, torch.nn.functional.normalize(torch.cat([z1, z2])) @ keys.T / 0.1], 1)
    also = torch.ones(26, n, dtype=torch.bool)
    if with_ids and n:
        also = torch.cat([ids, ids])[:, None] != key_ids
    keep = torch.cat([keep, also], 1)
    theirs = oracle.softplus(oracle.masked_lse(s, keep) - positive)
    theirs = oracle.smoothed(theirs, s, positive, keep, 0.1).mean()
    hardest = s.masked_fill(~keep, float("-inf")).amax(1)

    loss = NTXentLoss(0.1, label_smoothing=0.1, queue=queue, return_metrics=True)
    ours, metrics = loss(z1, z2, **options)
    assert_same_gradient(ours, theirs, (z1, z2))
    assert float(metrics["accuracy"]) == float((positive > hardest).double().mean())
    torch.testing.assert_close(metrics["negative_similarity"], (s[keep].mean() * 0.1).detach())
    assert queue.fill == min(n + 26, 80)
    if with_ids:
        assert queue.ids[n : n + 20].tolist() == torch.cat([ids, ids])[:20].tolist()


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("negatives", ["queue", "shared", "own"])
def test_info_nce_is_the_dense_definition(with_ids, negatives):
    if with_ids and negatives == "own":
        pytest.skip("each query's own negatives take no ids")
    ids, key_ids = torch.randint(0, 20, (13,)), torch.randint(0, 30, (60,))
    queue = filled(ids=key_ids)
    q = torch.randn(13, 20, dtype=F64, requires_grad=True)
    p = torch.randn(13, 20, dtype=F64, requires_grad=True)
    more = {"queue": 0, "shared": (6, 20), "own": (13, 6, 20)}[negatives]
    more = torch.randn(more, dtype=F64) if more else None
    options = {"ids": ids} if with_ids else {}
    keys, all_ids = queue.keys.clone(), key_ids
    if negatives == "shared":
        keys = torch.cat([more, keys])
        if with_ids:
            options["negative_ids"] = torch.arange(6)
            all_ids = torch.cat([torch.arange(6), key_ids])
    elif negatives == "own":
        keys = torch.cat([more, keys.expand(13, 60, 20)], 1)
    theirs = oracle.info_nce(
        q, p, keys, ids=options.get("ids"), negative_ids=all_ids, label_smoothing=0.1
    ).mean()
    ours = f.info_nce(q, p, more, queue=queue, label_smoothing=0.1, **options)
    assert_same_gradient(ours, theirs, (q, p))


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("views", [1, 2])
def test_cross_batch_memory_is_the_dense_definition(form, views):
    """SupCon over batch and queue; label 50 has its only positive in the queue, 51 has none."""
    labels, key_labels = torch.randint(0, 6, (14,)), torch.randint(0, 9, (60,))
    labels[:3] = torch.tensor([50, 51, 8])
    key_labels[7] = 50
    queue = filled(ids=key_labels)
    x = torch.randn(14, views, 20, dtype=F64, requires_grad=True)
    rows = torch.nn.functional.normalize(x.transpose(0, 1).flatten(0, 1))
    everything, every_label = torch.cat([rows, queue.keys]), torch.cat([labels] * views)
    s = rows @ everything.T / 0.1
    other = ~torch.eye(len(rows), len(everything), dtype=torch.bool)
    same = (every_label[:, None] == torch.cat([every_label, key_labels])) & other
    count = same.sum(1).double()
    lse = oracle.masked_lse(s, other)
    if form == "out":
        losses = lse - s.masked_fill(~same, 0.0).sum(1) / count.clamp(min=1)
    else:
        keep = torch.where(count[:, None] > 0, same, other)
        losses = lse - oracle.masked_lse(s, keep) + count.clamp(min=1).log()
    theirs = torch.where(count > 0, losses, 0.0).mean()
    ours = SupConLoss(0.1, form=form, queue=queue)(x, labels)
    assert_same_gradient(ours, theirs, (x,))
    assert queue.fill == min(60 + 14 * views, 80)
    assert queue.ids[60:74].tolist() == labels.tolist()


def test_a_single_stored_positive_stays_out_of_the_sum():
    """Aligned rows at temperature 0.02: the loss is tiny and must not cancel away."""
    z = torch.nn.functional.normalize(torch.randn(8, 64, dtype=F64))
    queue = NegativeQueue(64, 8, dtype=F64)
    queue.enqueue(z, torch.arange(8))
    x = (z + 1e-3 * torch.randn_like(z)).requires_grad_()
    rows = torch.nn.functional.normalize(x)
    s = rows @ z.T / 0.02
    others = torch.cat([rows @ rows.T / 0.02, s], 1)  # of the batch and of the queue
    keep = ~torch.eye(8, dtype=torch.bool).repeat(1, 2)
    theirs = oracle.softplus(oracle.masked_lse(others, keep) - s.diagonal()).mean()
    ours = f.sup_con(x, torch.arange(8), 0.02, queue=queue, normalize=True)
    assert 0 < float(theirs.detach()) < 1e-9
    assert_same_gradient(ours, theirs, (x,), 1e-6)


def test_an_empty_queue_gives_no_loss_and_no_nan():
    q = torch.randn(4, 20, requires_grad=True)
    loss, metrics = InfoNCELoss(queue=NegativeQueue(20, 8), return_metrics=True)(q, q.detach())
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert (q.grad == 0).all()
    assert all(torch.isfinite(value) for value in metrics.values())


# ------------------------------------------------------------------------------------ gradient


@pytest.mark.parametrize("loss", [InfoNCELoss, NTXentLoss, SupConLoss])
@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_keys_may_change_between_forward_and_backward(loss, backend):
    if fastcl.backends()[backend].unavailable:
        pytest.skip(fastcl.backends()[backend].unavailable)
    ids = torch.randint(0, 9, (13,))
    queue = filled(dtype=torch.float32, ids=torch.randint(0, 9, (60,)))
    z1 = torch.randn(13, 20, requires_grad=True)
    z2 = torch.randn(13, 20)

    def value(module):
        if loss is SupConLoss:
            return module(torch.stack([z1, z2], 1), ids)
        return module(z1, z2, ids=ids)

    with fastcl.use_backend(backend):
        (expected,) = torch.autograd.grad(value(loss(queue=copy.deepcopy(queue)).eval()), z1)
        ours = value(loss(queue=queue))
        queue.enqueue(torch.full((200, 20), 1.0), torch.zeros(200).long())
        assert torch.equal(torch.autograd.grad(ours, z1)[0], expected)


def test_second_derivatives_are_exact_or_refused():
    queue = filled(5, 3, 8).eval()
    z1, z2 = torch.randn(4, 3, dtype=F64, requires_grad=True), torch.randn(4, 3, dtype=F64)
    assert torch.autograd.gradgradcheck(
        lambda a: f.info_nce(a, z2, temperature=0.5, queue=queue), (z1,)
    )
    loss = f.info_nce(z1, z2, queue=queue)
    queue.train().enqueue(z2)
    with pytest.raises(RuntimeError, match="keys were changed in place"):
        torch.autograd.grad(loss, z1, create_graph=True)


def test_a_gradient_through_stored_keys_is_refused():
    queue, keys = NegativeQueue(3, 4), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="keys require a gradient, which stored keys cannot pass"):
        queue.enqueue(keys)
    assert queue.fill == 0
    with torch.no_grad():
        queue.enqueue(keys)
    assert not queue.keys.requires_grad


def test_compiled_losses_share_two_graphs():
    """One while the queue is empty and one for ever after, whatever fill and pointer."""
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module.forward

    for with_ids in (False, True):
        torch._dynamo.reset()
        graphs.clear()
        plain = InfoNCELoss(queue=NegativeQueue(6, 20))
        loss = copy.deepcopy(plain)
        compiled = torch.compile(loss, fullgraph=True, backend=count)
        for step in range(7):
            q, k = torch.randn(8, 6, requires_grad=True), torch.randn(8, 6)
            ids = {"ids": torch.arange(step, step + 8)} if with_ids else {}
            assert_same_gradient(compiled(q, k, **ids), plain(q, k, **ids), (q,), 1e-5)
            assert torch.equal(loss.queue.keys, plain.queue.keys)
            assert loss.queue.pointer == plain.queue.pointer
        assert len(graphs) == 2


# --------------------------------------------------------------------------------------- state


def test_resume_is_exact_and_the_module_travels():
    queue = filled(70, 20, 32, dtype=torch.bfloat16, ids=torch.arange(70))
    assert set(queue.state_dict()) == {"keys", "ids", "pointer", "fill", "shard"}
    assert not list(queue.buffers())  # DDP would broadcast them
    loaded = NegativeQueue(20, 32, dtype=torch.bfloat16)
    loaded.load_state_dict(queue.state_dict())
    queues = (queue, loaded, copy.deepcopy(queue), pickle.loads(pickle.dumps(queue)))
    keys = torch.randn(11, 20)
    for twin in queues:
        twin.enqueue(keys)
        assert (twin.fill, twin.pointer) == (32, (70 + 11) % 32)
        for name, tensor in queue.state_dict().items():
            assert torch.equal(tensor, twin.state_dict()[name])
    assert len({twin.keys.data_ptr() for twin in queues}) == 4
    young = NegativeQueue(20, 32)
    state = young.state_dict()  # as any module's, it shows what comes after
    young.enqueue(keys)
    young.load_state_dict(state)
    assert (young.fill, young.pointer) == (11, 11)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: NegativeQueue(16, 32), r"queue.keys has shape \(32, 20\).* shape \(32, 16\)"),
        (lambda: NegativeQueue(20, 64), r"queue.keys has shape \(32, 20\).* shape \(64, 20\)"),
        (lambda: NegativeQueue(20, 32, dtype=torch.float16), "dtype float32.*dtype float16"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_whole(other, message):
    state = InfoNCELoss(queue=filled(40, 20, 32, torch.float32)).state_dict()
    loss = InfoNCELoss(queue=other())
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        loss.load_state_dict(state)
    assert loss.queue.fill == 0
    for name, tensor in loss.state_dict().items():
        assert torch.equal(tensor, before[name])
    del state["queue.pointer"]
    with pytest.raises(RuntimeError, match=r"Missing key.*queue.pointer"):
        InfoNCELoss(queue=NegativeQueue(20, 32)).load_state_dict(state)


def test_it_follows_to():
    loss = InfoNCELoss(queue=filled(40, 20, 32)).to(torch.float32)
    assert loss.queue.keys.dtype == torch.float32
    assert loss.queue.ids.dtype == torch.int64
    state = loss.to("meta").queue.tensors()
    assert {state[name].device.type for name in ("keys", "ids", "pointer", "fill")} == {"meta"}


# -------------------------------------------------------------------------------------- memory

MEASURE = """
import re, sys, torch, fastcl
queue = fastcl.NegativeQueue(128, 65536)
queue.enqueue(torch.randn(65536, 128))
loss = fastcl.InfoNCELoss(0.07, queue=queue)

def status(key):  # MB
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def step(n):
    ids = {"ids": torch.arange(n)} if sys.argv[1] == "ids" else {}
    q, k = torch.randn(n, 128, requires_grad=True), torch.randn(n, 128)
    loss(q, k, **ids).backward()

step(8)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
step(256)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("ids", ["none", "ids"])
def test_peak_of_a_moco_step_is_far_below_one_copy_of_the_queue(ids):
    """The queue is 32 MB; loss, backward and enqueue together."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, ids], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert 0 < float(result.stdout) < 24

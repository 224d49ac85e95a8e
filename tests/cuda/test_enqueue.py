"""The queue's step on the emulated machine, against a ring that is written one key at a time."""

import ctypes

import pytest
import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_ID = -(2**63)


class Enqueue(ctypes.Structure):
    """``fastcl::cuda::Enqueue`` of csrc/cuda/enqueue.h."""

    _fields_ = (
        ("rows", ctypes.c_void_p), ("rows_type", ctypes.c_int), ("n", ctypes.c_int64),
        ("d", ctypes.c_int64), ("stride", ctypes.c_int64), ("eps", ctypes.c_float),
        ("ids", ctypes.c_void_p), ("no_id", ctypes.c_int64), ("keys", ctypes.c_void_p),
        ("keys_type", ctypes.c_int), ("size", ctypes.c_int64), ("key_ids", ctypes.c_void_p),
        ("pointer", ctypes.c_void_p), ("fill", ctypes.c_void_p),
    )  # fmt: skip


class Ring:
    """A queue's tensors, and the same ring as a list of rows."""

    def __init__(self, size, d, dtype):
        self.keys = torch.full((size, d), float("nan"), dtype=dtype)
        self.ids = torch.full((size,), NO_ID)
        self.pointer, self.fill = torch.tensor(0), torch.tensor(0)
        self.expected, self.expected_ids, self.head = self.keys.clone(), self.ids.clone(), 0

    def enqueue(self, emulated, rows, ids, eps):
        function = emulated("enqueue")._ZN6fastcl4cuda7enqueueERKNS0_7EnqueueEPv
        function.restype = ctypes.c_char_p
        call = Enqueue(
            rows.data_ptr(), TYPES[rows.dtype], *rows.shape, rows.stride(0), eps,
            None if ids is None else ids.data_ptr(), NO_ID, self.keys.data_ptr(),
            TYPES[self.keys.dtype], len(self.keys), self.ids.data_ptr(),
            self.pointer.data_ptr(), self.fill.data_ptr(),
        )  # fmt: skip
        assert function(ctypes.byref(call), None) is None
        exact = rows.double()
        if eps:
            exact = exact / exact.norm(dim=1, keepdim=True).clamp(min=eps)
        for i, row in enumerate(exact):
            self.expected[self.head] = row.to(self.keys.dtype)
            self.expected_ids[self.head] = NO_ID if ids is None else ids[i]
            self.head = (self.head + 1) % len(self.keys)

    def check(self, stored, units):
        torch.testing.assert_close(
            self.keys.double(), self.expected.double(), atol=0, equal_nan=True,
            rtol=units * torch.finfo(self.keys.dtype).eps,
        )  # fmt: skip
        assert torch.equal(self.ids, self.expected_ids)
        assert (int(self.pointer), int(self.fill)) == (self.head, min(stored, len(self.keys)))


@pytest.mark.parametrize("rows", TYPES, ids=str)
@pytest.mark.parametrize("keys", TYPES, ids=str)
def test_dtypes(emulated, rows, keys):
    """Every pair of types, a width that no warp divides, rows apart, a wrap in the second step."""
    ring = Ring(20, 37, keys)
    emulated("enqueue").fastcl_emulate(3, 1, 227 * 1024, 0)
    for step in range(2):
        batch = (10.0 * torch.randn(13, 50)).to(rows)[:, :37]
        ring.enqueue(emulated, batch, torch.arange(13) + 100 * step, 1e-12)
        ring.check(13 * (step + 1), 4 if keys == torch.float32 else 1)


@pytest.mark.parametrize(("processors", "blocks"), [(1, 1), (3, 1), (2, 2)])
def test_any_batch_on_any_machine(emulated, processors, blocks):
    """One key, the size exactly, once and several times round; rows beyond what is resident. The
    head must not move before every block has read it: blocks run in another order each time."""
    ring, stored = Ring(33, 5, torch.float32), 0
    for seed, n in enumerate((1, 32, 33, 7, 34, 65, 66, 150, 0, 3)):
        emulated("enqueue").fastcl_emulate(processors, blocks, 227 * 1024, seed)
        ids = torch.arange(n) + 1000 * seed if seed % 2 else None
        ring.enqueue(emulated, torch.randn(n, 5), ids, 0.0)
        stored += n
        ring.check(stored, 0)


def test_lengths_at_the_ends_of_the_range(emulated):
    """Squares that overflow or vanish, rows shorter than eps, zeros, and a NaN, which stays."""
    rows = torch.randn(6, 40).double()
    rows = rows * torch.tensor([1e37, 1e-30, 1e-11, 1e-13, 0.0, 1.0]).double()[:, None]
    rows = rows.float()
    rows[5, 3] = float("nan")
    ring = Ring(6, 40, torch.float32)
    emulated("enqueue").fastcl_emulate(3, 1, 227 * 1024, 0)
    ring.enqueue(emulated, rows, None, 1e-12)
    ring.check(6, 4)
    assert torch.isnan(ring.keys[5]).all()

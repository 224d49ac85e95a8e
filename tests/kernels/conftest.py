"""Triton's interpreter with the eyes of a sanitizer: bounds, races between programs, dots.

It runs programs one after the other in this process's memory, where a read past the end of a
tensor, or of what another program of the same launch wrote, goes unnoticed.
"""

import math
import os

import numpy as np
import pytest


class Memory:
    """The tensors of one launch, and which programs have read and written each element."""

    _NOBODY, _MANY = -1, -2

    def __init__(self):
        self.tensors = {}

    def begin(self, tensors) -> None:
        self.tensors = {}
        for tensor in tensors:
            assert tensor.element_size() < 8 or not tensor.is_floating_point(), "takes float64"
            if tensor.numel() == 0:
                continue
            extent = 1 + sum(
                (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
            )
            size = tensor.element_size()
            legal = np.zeros(extent, bool)
            strides = [stride * legal.itemsize for stride in tensor.stride()]
            np.lib.stride_tricks.as_strided(legal, tensor.shape, strides)[...] = True
            start = tensor.data_ptr()
            users = np.full((2, extent), self._NOBODY)
            self.tensors[start, start + extent * size, size] = legal, *users

    def touch(self, pointers, mask, program: int, values=None) -> None:
        """Reads, or writes of ``values``, by ``program``.

        Raises:
            AssertionError: one is out of bounds, or races with another program. Several may write
                NaN, by which they tell that an offset failed.
        """
        pointers, mask = np.broadcast_arrays(pointers, mask)
        left = pointers[mask]
        if values is not None:
            values = np.broadcast_to(values, mask.shape)[mask]
        for (start, end, size), (legal, readers, writers) in self.tensors.items():
            here = (left >= start) & (left < end)
            if not here.any():
                continue
            at = ((left[here] - start) // size).astype(np.int64)
            assert legal[at].all(), "between the rows of a tensor"
            others = np.isin(writers[at], (self._NOBODY, program), invert=True)
            if values is None:
                assert not others.any(), "reads what another program of the launch writes"
                alone = np.isin(readers[at], (self._NOBODY, program))
                readers[at] = np.where(alone, program, self._MANY)
            else:
                read = np.isin(readers[at], (self._NOBODY, program), invert=True)
                assert not read.any(), "writes what another program of the launch reads"
                assert np.isnan(values[here][others]).all(), "two programs write one element"
                writers[at] = program
                values = values[~here]
            left = left[~here]
        assert left.size == 0, f"{left.size} elements out of bounds"


@pytest.fixture(autouse=True)
def sanitizer(monkeypatch):
    """Check every load, store and dot of kernels that run through the interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    memory, builder = Memory(), interpreter.InterpreterBuilder
    start, load, store = (
        interpreter.GridExecutor._init_args_hst, builder.create_masked_load,
        builder.create_masked_store,
    )  # fmt: skip
    dot = builder.create_dot

    def program(self) -> int:
        x, y, z = self.grid_idx
        return x + self.grid_dim[0] * (y + self.grid_dim[1] * z)

    def starts(self, args, kwargs):
        found = start(self, args, kwargs)
        memory.begin(x for x in [*found[0], *found[1].values()] if hasattr(x, "data_ptr"))
        return found

    def loads(self, pointers, mask, other, *rest):
        memory.touch(pointers.data, mask.data, program(self))
        result = load(self, pointers, mask, other, *rest)
        if other is None and result.data.dtype.kind == "f":  # what a GPU leaves undefined
            result.data[~np.broadcast_to(mask.data, result.data.shape)] = math.nan
        return result

    def stores(self, pointers, value, mask, *rest):
        memory.touch(pointers.data, mask.data, program(self), value.data)
        return store(self, pointers, value, mask, *rest)

    def dots(self, a, b, *rest):
        assert min(*a.data.shape, *b.data.shape) >= 16, "a dot smaller than tensor cores multiply"
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", starts)
    monkeypatch.setattr(builder, "create_masked_load", loads)
    monkeypatch.setattr(builder, "create_masked_store", stores)
    monkeypatch.setattr(builder, "create_dot", dots)

"""The launchers of the sm_90a kernels on an emulated device, as the operators that bind them."""

import ctypes

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SOURCES = ("logsumexp_sm90a", "product_sm90a", "finish", "gains")
SHARED = 227 * 1024
P = ctypes.c_void_p


class Rows(ctypes.Structure):
    """``fastcl::cuda::Rows`` of csrc/cuda/pairing.h, as the others below of their headers."""

    _fields_ = (("data", P), ("count", ctypes.c_int64), ("stride", ctypes.c_int64))


class Pairing(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int), ("own", Rows), ("other", Rows), ("d", ctypes.c_int64),
        ("scale", P), ("skip", ctypes.c_int64 * 3), ("skips", ctypes.c_int),
    )  # fmt: skip

    @classmethod
    def of(cls, own: Tensor, other: Tensor, scale: Tensor, skip: list[int]) -> "Pairing":
        sides = [Rows(x.data_ptr(), len(x), x.stride(0)) for x in (own, other)]
        offsets = (ctypes.c_int64 * 3)(*skip, *[0] * (3 - len(skip)))
        kind = TYPES[own.dtype]
        return cls(kind, *sides, own.shape[1], scale.data_ptr(), offsets, len(skip))


class LogSumExp(ctypes.Structure):
    _fields_ = (
        ("pairing", Pairing), ("symmetric", ctypes.c_bool), ("workspace", P), ("rows", P),
        ("columns", P), ("offset", P),
    )  # fmt: skip


class Side(ctypes.Structure):
    _fields_ = (
        ("gradient", P), ("logsum", P), ("count", ctypes.c_int64), ("gain", P), ("shift", P),
        ("ratio", P),
    )  # fmt: skip

    @classmethod
    def of(cls, gradient: Tensor | None, logsum: Tensor | None, count: int, table: Tensor):
        inputs = (None if x is None else x.data_ptr() for x in (gradient, logsum))
        return cls(*inputs, count, *(x.data_ptr() for x in table))


class Gains(ctypes.Structure):
    _fields_ = (("sides", Side * 2), ("scale", P), ("offset", P), ("unit", P))


class Product(ctypes.Structure):
    _fields_ = (
        ("pairing", Pairing), ("own", Side), ("other", Side), ("offset", P), ("factor", P),
        ("workspace", P), ("out", P),
    )  # fmt: skip


class Mean(ctypes.Structure):
    _fields_ = (("pairing", Pairing), ("workspace", P), ("logsum", P), ("mean", P), ("offset", P))


def unset(*shape: int) -> Tensor:
    """What no kernel has written to is not a number."""
    return torch.full(shape, float("nan"))


class Machine:
    """A device of so many multiprocessors, with the operators that fastcl/ops/hopper.py calls."""

    def __init__(self, emulated, processors: int, seed: int = 0):
        self.library = emulated(*SOURCES)
        self.library.fastcl_emulate(processors, 1, SHARED, seed)

    def call(self, name, argument, stream=True):
        """``fastcl::cuda::name(const Argument&, void* stream)``, by its mangled name."""
        kind = type(argument).__name__
        mangled = f"_ZN6fastcl4cuda{len(name)}{name}ERKNS0_{len(kind)}{kind}E" + "Pv" * stream
        function = getattr(self.library, mangled)
        function.restype = ctypes.c_char_p if stream else ctypes.c_int64
        return function(ctypes.byref(argument), *[None] * stream)

    def operands(self):
        """Descriptors given to products since the last call: of left operands, of right ones by
        rows and by columns."""
        found = (ctypes.c_uint64 * 1024)()
        count = self.library.fastcl_operands
        return [set(found[: count(kind, found, len(found))]) for kind in range(3)]

    def run(self, name, argument):
        reason = self.call(name, argument)
        assert reason is None, reason

    def workspace(self, name, argument):
        return unset(self.call(f"{name}_workspace", argument, stream=False))

    def logsumexp(self, queries, keys, scale, skip, columns):
        symmetric = keys is None
        keys = queries if symmetric else keys
        rows, offset = unset(len(queries)), unset()
        column_sums = unset(len(keys) if columns else 0)
        call = LogSumExp(Pairing.of(queries, keys, scale, skip), symmetric, None, rows.data_ptr())
        call.columns = column_sums.data_ptr() if columns else None
        call.offset = offset.data_ptr()
        workspace = self.workspace("logsumexp", call)
        call.workspace = workspace.data_ptr()
        self.run("logsumexp", call)
        return rows, column_sums, offset

    def gains(
        self, grad_own, own_sums, own_count, grad_other, other_sums, other_count, scale, offset
    ):
        tables = [unset(3, -(-count // 128) * 128) for count in (own_count, other_count)]
        own = Side.of(grad_own, own_sums, own_count, tables[0])
        other = Side.of(grad_other, other_sums, other_count, tables[1])
        unit = unset(2)
        pointers = (x.data_ptr() for x in (scale, offset, unit))
        self.run("gains", Gains((Side * 2)(own, other), *pointers))
        return *tables, unit

    def product(self, own, other, scale, skip, own_gains, other_gains, offset, factor):
        pairing = Pairing.of(own, other, scale, skip)
        workspace, out = self.workspace("product", pairing), unset(*own.shape)
        sides = (
            Side.of(None, None, len(own), own_gains),
            Side.of(None, None, len(other), other_gains),
        )
        pointers = (x.data_ptr() for x in (offset, factor, workspace, out))
        self.run("product", Product(pairing, *sides, *pointers))
        return out

    def mean(self, own, other, scale, skip):
        pairing = Pairing.of(own, other, scale, skip)
        workspace = self.workspace("mean", pairing)
        rows, mean, offset = unset(len(own)), unset(*own.shape), unset()
        self.run("mean", Mean(pairing, *(x.data_ptr() for x in (workspace, rows, mean, offset))))
        return rows, mean, offset

"""What a launch is about: two sides of packed rows, the rule between them, a tile to run with."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs

INTERPRETED: bool = triton.knobs.runtime.interpret


@functools.cache
def device(index: int | None) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and multiprocessors; the interpreter is (0, 2)."""
    if index is None:
        return 0, 2
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def held_width(precision: torch.dtype) -> int:
    return configs.RULES[f"held_width_{8 * precision.itemsize}"]


def floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def unpad(x: Tensor, width: int) -> Tensor:
    return x if x.shape[1] == width else x[:, :width].contiguous()


def _packed_width(d: int) -> int:
    """The next power of two up to 256, the next multiple of 64 beyond."""
    return max(16, 1 << (d - 1).bit_length()) if d <= 256 else 64 * ceil(d, 64)


def _pack(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as the kernels read them; ``x`` itself where it already is so."""
    width = _packed_width(x.shape[1])
    if width == x.shape[1]:
        x = x.to(dtype).contiguous()
        return x if x.data_ptr() % 16 == 0 else x.clone()  # else loads are one number at a time
    packed = x.new_zeros(x.shape[0], width, dtype=dtype)
    packed[:, : x.shape[1]] = x
    return packed


@dataclass
class Side:
    """Packed rows of one side and what belongs to each of them."""

    rows: Tensor
    bias: Tensor | None
    ids: Tensor | None

    def __len__(self) -> int:
        return self.rows.shape[0]


@dataclass
class Problem:
    """Two sides and the rule between them; ``flip`` exchanges their roles."""

    own: Side
    other: Side
    scale: Tensor
    relation: str
    skip: list[int]  # other index - own index

    @classmethod
    def of(
        cls, queries, keys, scale, key_bias, row_bias, query_ids, key_ids, relation, skip, precision
    ) -> Problem:
        q = _pack(queries, precision)
        k = q if keys is None else _pack(keys, precision)
        key_ids = query_ids if keys is None else key_ids

        def vector(x):
            return None if x is None else x.contiguous()

        return cls(
            Side(q, floats(row_bias), vector(query_ids)),
            Side(k, floats(key_bias), vector(key_ids)),
            scale.float(),
            relation,
            list(skip),
        )

    def flip(self) -> Problem:
        offsets = [-offset for offset in self.skip]
        return Problem(self.other, self.own, self.scale, self.relation, offsets)

    @property
    def width(self) -> int:
        return self.own.rows.shape[1]

    def new(self, *shape: int) -> Tensor:
        return self.scale.new_empty(shape)

    @property
    def held_width(self) -> int:
        """Rows up to this width are held by a program, and multiplied in the tile."""
        return held_width(self.own.rows.dtype)

    @property
    def streamed(self) -> bool:
        """Whether rows are too wide for that."""
        return self.width > self.held_width

    @property
    def half(self) -> bool:
        return self.own.rows.dtype == torch.float16

    @property
    def precision(self) -> str:
        """How fp32 products are formed; 16-bit ones ignore it."""
        if self.own.rows.dtype != torch.float32:
            return "tf32"
        if INTERPRETED:
            return "ieee"
        # torch.get_float32_matmul_precision raises where this was set, as PyTorch now advises
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"

    def config(self, kernel: str):
        arch, _ = device(self.scale.device.index if self.scale.is_cuda else None)
        bits = 8 * self.own.rows.element_size()
        return configs.lookup(kernel, arch, bits, self.width, len(self.own))

    def splits(self, config, blocks: int) -> int:
        """How many programs share an own block, so that so many fill the device twice."""
        _, processors = device(self.scale.device.index if self.scale.is_cuda else None)
        tiles = ceil(len(self.other), config.other)
        return max(1, min(ceil(2 * processors * config.programs, blocks), ceil(tiles, 2)))

    def rule(self) -> dict[str, Any]:
        """The rule and the shape of a tile, as every kernel takes them."""
        offsets = self.skip + [0] * (3 - len(self.skip))
        return {
            "size_own": len(self.own), "size_other": len(self.other),
            "skip0": offsets[0], "skip1": offsets[1], "skip2": offsets[2],
            "SKIPS": len(self.skip), "RELATION": self.relation, "D": self.width,
            "PRECISION": self.precision,
            "EMULATE": INTERPRETED and self.own.rows.dtype == torch.bfloat16,
        }  # fmt: skip

    def tile(self, config) -> dict[str, int]:
        block = config.block_d if self.streamed else self.width
        return {"BD": block, "OWN": config.own, "OTHER": config.other, **config.options}

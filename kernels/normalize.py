"""Rows of unit length, forward and backward, and two aligned batches of them in one pass."""

import triton
import triton.language as tl


@triton.jit
def _length(x, stride, index, D, inside, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Euclidean length of rows, the largest entry taken out so that no square overflows."""
    top = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK):
        column = d + tl.arange(0, BLOCK)
        at = x + index[:, None].to(tl.int64) * stride + column[None, :]
        v = tl.load(at, mask=inside[:, None] & (column[None, :] < D), other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(v), 1))
    unit = tl.where((top > 0) & (top < float("inf")), top, 1.0)
    total = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK):
        column = d + tl.arange(0, BLOCK)
        at = x + index[:, None].to(tl.int64) * stride + column[None, :]
        v = tl.load(at, mask=inside[:, None] & (column[None, :] < D), other=0.0).to(tl.float32)
        v = v / unit[:, None]
        total += tl.sum(v * v, 1)
    return tl.sqrt_rn(total) * unit


@triton.jit
def forward(x, y, factors, size, stride, eps, D, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """y = x / max(|x|, eps) row by row, and the factor each row was multiplied with."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < size
    length = _length(x, stride, index, D, inside, BLOCK, ROWS)
    factor = 1.0 / tl.where(length > eps, length, eps)
    tl.store(factors + index, factor, mask=inside)
    for d in range(0, D, BLOCK):
        column = d + tl.arange(0, BLOCK)
        mask = inside[:, None] & (column[None, :] < D)
        v = tl.load(x + index[:, None].to(tl.int64) * stride + column[None, :], mask=mask, other=0)
        at = y + index[:, None].to(tl.int64) * D + column[None, :]
        tl.store(at, v.to(tl.float32) * factor[:, None], mask=mask)


@triton.jit
def backward(
    grad, y, factors, out, size, grad_stride, eps, D,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out = factor * (grad - y <y, grad>); rows shorter than eps were only divided by it."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < size
    factor = tl.load(factors + index, mask=inside, other=0.0)
    radial = tl.zeros([ROWS], tl.float32)
    row = index[:, None].to(tl.int64)
    for d in range(0, D, BLOCK):
        column = d + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < D)
        g = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(y + row * D + column, mask=mask, other=0.0)
        radial += tl.sum(g * u, 1)
    radial = tl.where(factor * eps < 1.0, radial, 0.0)
    for d in range(0, D, BLOCK):
        column = d + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < D)
        g = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(y + row * D + column, mask=mask, other=0.0)
        value = factor[:, None] * (g - u * radial[:, None])
        tl.store(out + row * D + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def pair_forward(
    a, b, y, cosines, factors, size, stride_a, stride_b, eps, D,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Unit rows of a in y[:N] and of b in y[N:], their cosines [N] and factors [2N]."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < size
    length_a = _length(a, stride_a, index, D, inside, BLOCK, ROWS)
    length_b = _length(b, stride_b, index, D, inside, BLOCK, ROWS)
    factor_a = 1.0 / tl.where(length_a > eps, length_a, eps)
    factor_b = 1.0 / tl.where(length_b > eps, length_b, eps)
    tl.store(factors + index, factor_a, mask=inside)
    tl.store(factors + size + index, factor_b, mask=inside)
    cosine = tl.zeros([ROWS], tl.float32)
    row = index[:, None].to(tl.int64)
    for d in range(0, D, BLOCK):
        column = d + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < D)
        u = tl.load(a + row * stride_a + column, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(b + row * stride_b + column, mask=mask, other=0.0).to(tl.float32)
        u = u * factor_a[:, None]
        v = v * factor_b[:, None]
        cosine += tl.sum(u * v, 1)
        tl.store(y + row * D + column, u, mask=mask)
        tl.store(y + (row + size) * D + column, v, mask=mask)
    tl.store(cosines + index, cosine, mask=inside)


@triton.jit
def pair_backward(
    grad, grad_cosines, y, factors, out_a, out_b, size, eps, D,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of both batches from those of the rows [2N, D] and of the cosines [N]."""
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < size
    row = index[:, None].to(tl.int64)
    factor_a = tl.load(factors + index, mask=inside, other=0.0)
    factor_b = tl.load(factors + size + index, mask=inside, other=0.0)
    pull = tl.load(grad_cosines + index, mask=inside, other=0.0).to(tl.float32)
    radial_a = tl.zeros([ROWS], tl.float32)
    radial_b = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK):
        column = d + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < D)
        u = tl.load(y + row * D + column, mask=mask, other=0.0)
        v = tl.load(y + (row + size) * D + column, mask=mask, other=0.0)
        g = v * pull[:, None] + tl.load(grad + row * D + column, mask=mask, other=0.0)
        h = u * pull[:, None] + tl.load(grad + (row + size) * D + column, mask=mask, other=0.0)
        radial_a += tl.sum(g * u, 1)
        radial_b += tl.sum(h * v, 1)
    radial_a = tl.where(factor_a * eps < 1.0, radial_a, 0.0)
    radial_b = tl.where(factor_b * eps < 1.0, radial_b, 0.0)
    for d in range(0, D, BLOCK):
        column = d + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < D)
        u = tl.load(y + row * D + column, mask=mask, other=0.0)
        v = tl.load(y + (row + size) * D + column, mask=mask, other=0.0)
        g = v * pull[:, None] + tl.load(grad + row * D + column, mask=mask, other=0.0)
        h = u * pull[:, None] + tl.load(grad + (row + size) * D + column, mask=mask, other=0.0)
        g = factor_a[:, None] * (g - u * radial_a[:, None])
        h = factor_b[:, None] * (h - v * radial_b[:, None])
        tl.store(out_a + row * D + column, g.to(out_a.dtype.element_ty), mask=mask)
        tl.store(out_b + row * D + column, h.to(out_b.dtype.element_ty), mask=mask)

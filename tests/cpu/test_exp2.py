"""The exponential behind every sum: its stated bound over every exponent fp32 has."""

import torch

BOUND = 1.0e-7  # relative; half a unit in the last place is 6.0e-8


def _every_exponent() -> torch.Tensor:
    """Both signs of every exponent, subnormals included, with mantissas a prime apart."""
    mantissas = torch.arange(0, 2**23, 1021, dtype=torch.int64)
    exponents = torch.arange(0, 127 + 7, dtype=torch.int64)  # up to |x| < 128
    bits = (exponents[:, None] << 23 | mantissas).flatten().to(torch.int32)
    x = bits.view(torch.float32)
    return torch.cat([x, -x])


def test_relative_error_over_every_exponent(isa):
    x = _every_exponent()
    x = x[(x >= -126) & (x <= 127)]
    error = torch.ops.fastcl._cpu_exp2(x).double() / torch.exp2(x.double()) - 1
    assert float(error.abs().max()) < BOUND


def test_integers_are_exact(isa):
    x = torch.arange(-126, 128, dtype=torch.float32)
    assert torch.equal(torch.ops.fastcl._cpu_exp2(x), torch.exp2(x.double()).float())


def test_flushes_below_the_normal_range_and_keeps_nan(isa):
    infinity, nan = float("inf"), float("nan")
    y = torch.ops.fastcl._cpu_exp2(torch.tensor([-126.0001, -1e9, -3e38, -infinity, nan]))
    assert torch.equal(y[:4], torch.zeros(4))
    assert torch.isnan(y[4])

"""The inputs of the known answers, float64."""

import torch

F64 = torch.float64


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


_k, _j = torch.arange(1, 13, dtype=F64), torch.arange(1, 16, dtype=F64)
A0 = torch.sin(_k).reshape(4, 3)
B0 = A0 + 0.5 * torch.cos(_k / 2).reshape(4, 3)
Q0 = torch.cos(_j / 3).reshape(5, 3)
A, B, Q = unit(A0), unit(B0), unit(Q0)
Y = torch.tensor([0, 1, 0, 1])

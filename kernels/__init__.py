"""Triton kernels of fastcl; installed as ``fastcl.kernels``. None exist yet."""

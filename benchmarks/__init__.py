"""fastcl beside plain PyTorch and other libraries, on this machine: ``python -m benchmarks``."""

"""``python -m benchmarks.gpu``: correctness and speed of the Triton backend on a GPU."""

"""``python -m benchmarks.gpu``: correctness and speed of Triton and CUDA kernels on a GPU."""

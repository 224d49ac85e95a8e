from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
for module in ("lightning", "kornia", "sklearn", "jsonargparse", "rich", "matplotlib"):
    pytest.importorskip(module, reason="needs the extra 'train'")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Networks this small gain nothing from threads and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """``auto`` would take a GPU, whose sums need not repeat to the last bit."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts
    gpu = "lightning.pytorch.accelerators.CUDAAccelerator.is_available"
    monkeypatch.setattr(gpu, staticmethod(lambda: False))

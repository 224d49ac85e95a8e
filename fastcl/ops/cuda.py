"""The CUDA C++ backend: ``fastcl/_cuda*.so``, loaded when it is there, and what it is trusted with.

It holds single kernels, for what Triton does not reach; all other calls stay where they were. The
module is built without a GPU and brings its own CUDA runtime, so it runs with any torch that has
CUDA, given a driver as new as that runtime.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from . import native
from .hopper import similarity_logsumexp as similarity_logsumexp
from .hopper import similarity_logsumexp_backward as similarity_logsumexp_backward
from .registry import Backend, Call
from .small_batch import fuses
from .small_batch import pair_softmax as pair_softmax

# The speed rule. A kernel serves a call by itself only on GPUs on which it was measured: correct,
# and at least 10 % faster than Triton in every case of the file named here, which
# ``python -m benchmarks.gpu --stage cuda`` writes and which lies under benchmarks/results.
# Elsewhere it waits for ``use_backend("cuda")``.
#
#     operator: {compute capability: file}
MEASURED: dict[str, dict[tuple[int, int], str]] = {
    "pair_softmax": {},  # not measured yet
    "enqueue": {},  # not measured yet
    "similarity_logsumexp": {},  # not measured yet
}

_library = torch.library.Library("fastcl", "FRAGMENT")
for _schema in (
    "_cuda_versions() -> (int, int)",
    "_cuda_enqueue(Tensor rows, Tensor? ids, float eps, int no_id, Tensor(a!) keys,"
    " Tensor(b!) key_ids, Tensor(c!) pointer, Tensor(d!) fill) -> ()",
):
    _library.define(_schema)

_OPS = torch.ops.fastcl


def enqueue(
    rows: Tensor, ids: Tensor | None, eps: float, no_id: int, keys: Tensor, key_ids: Tensor,
    pointer: Tensor, fill: Tensor, precision: torch.dtype,
) -> None:  # fmt: skip
    _OPS._cuda_enqueue(rows, ids, eps, no_id, keys, key_ids, pointer, fill)


def _unavailable(torch_cuda: str | None, runtime: int, driver: int) -> str:
    """Why kernels cannot be launched here; asked without waking a device, which would keep
    processes that are forked later from using it."""
    if torch_cuda is None:
        return "this torch has no CUDA"
    if driver == 0:
        return "no NVIDIA driver was found"
    if driver // 1000 < runtime // 1000:
        return (
            f"the NVIDIA driver is for CUDA {_version(driver)}; this module needs one for CUDA "
            f"{runtime // 1000}.0 or newer"
        )
    return ""


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _refuses(call: Call) -> str:
    if call.device != "cuda":
        return ""
    capability = torch.cuda.get_device_capability(call.ordinal)
    if call.op == "similarity_logsumexp":  # wgmma is what makes these kernels
        if capability != (9, 0):
            return "its log-sum-exp needs a GPU of compute capability 9.0"
        if call.precision == torch.float32:
            return "its log-sum-exp forms products in bfloat16 and float16"
    return "" if capability >= (8, 0) else "needs a GPU of compute capability 8.0 or newer"


def _withheld(call: Call) -> str:
    measured = MEASURED[call.op]
    asked = measured and call.device == "cuda"
    if asked and torch.cuda.get_device_capability(call.ordinal) in measured:
        return ""
    return (
        "no kept measurement shows it faster than Triton on this GPU; use_backend('cuda') forces it"
    )


def _detail(runtime: int, driver: int) -> str:
    kernels = [
        f"{op} (" + (f"on for {_archs(where)}" if where else "unmeasured: off unless forced") + ")"
        for op, where in MEASURED.items()
    ]
    return f"CUDA {_version(runtime)}, driver {_version(driver)}; {', '.join(kernels)}"


def _archs(where) -> str:
    return ", ".join(f"sm_{major}{minor}" for major, minor in sorted(where))


_reason = native.load("cuda", _OPS._cuda_versions)
_versions = (0, 0) if _reason else _OPS._cuda_versions()
_reason = _reason or _unavailable(torch.version.cuda, *_versions)
BACKEND = Backend(
    "cuda",
    sys.modules[__name__],
    ops=tuple(MEASURED),
    devices=("cuda",),
    precisions=(torch.float32, torch.bfloat16, torch.float16),
    unavailable=_reason,
    detail="" if _reason else _detail(*_versions),
    refuses=_refuses,
    partial=True,
    withheld=_withheld,
    keeps_exponentials=lambda *_: False,
    fuses=fuses,
)

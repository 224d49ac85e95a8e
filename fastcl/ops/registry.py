"""What each backend can do, which one serves a call, and why the others do not.

A backend *declares* its limits (:class:`Backend`). Dispatch, error texts, ``fastcl info`` and the
test matrix are all read off that one declaration. The registry is asked inside the operators, so
a compiled graph stays whole and :func:`use_backend` still switches at run time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

OPS = ("similarity_logsumexp", "similarity_sum", "similarity_topk", "l2_normalize")
# whole losses, and the step of a queue; without them all decompose, into the above and PyTorch
OPTIONAL_OPS = ("pair_softmax", "pair_sigmoid", "enqueue")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulator(precision: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: fp64 for fp64 products, fp32 for all others."""
    return torch.float64 if precision == torch.float64 else torch.float32


def stored_gradient(x: torch.Tensor, precision: torch.dtype) -> torch.dtype:
    """The dtype in which an operator's forward leaves the gradient of ``x`` for the backward.

    bf16 for bf16, which has the range of fp32: multiplying by the upstream gradient rounds it once
    more. That of fp16 stays in fp32: it might vanish before a gradient scaler's factor reaches it.
    """
    return torch.bfloat16 if x.dtype == torch.bfloat16 else accumulator(precision)


class Call(NamedTuple):
    """What a backend must know of a call to say whether it can serve it.

    ``precision`` is the dtype in which products are formed (sums are always fp32 or wider);
    ``ordinal`` tells apart devices of one type, whose capabilities may differ.
    """

    op: str
    device: str
    precision: torch.dtype
    ordinal: int | None = None


@dataclass(frozen=True)
class Backend:
    """A backend's declaration.

    Attributes:
        name: what :func:`use_backend` calls it.
        implementation: module or object with a function per operator and one per backward.
        ops: operators it implements, of :data:`OPS` and :data:`OPTIONAL_OPS`.
        devices: device types it runs on; ``None`` means any.
        precisions: dtypes it forms products in.
        unavailable: why it cannot run on this machine at all; empty when it can.
        detail: version, instruction set and the like, for ``fastcl info``.
        refuses: what only a call can tell (the capability of a device, say): a reason, or empty.
        partial: it holds single kernels rather than a whole set: what it refuses or declines is
            served by the others, also when it is forced. A function of its implementation declines
            arguments (a width, a rule) by returning ``NotImplemented``.
        withheld: why it does not serve a call unless it is forced to; a reason, or empty.
        keeps_exponentials: (N, M, D, precision) -> whether keeping them for the backward, where
            the workspace allows it, is the faster choice.
        fuses: (N, D, precision) -> whether a whole loss of N pairs, of those it implements, is a
            better choice than the primitives.
    """

    name: str
    implementation: Any
    ops: tuple[str, ...] = OPS
    devices: tuple[str, ...] | None = None
    precisions: tuple[torch.dtype, ...] = FLOATS
    unavailable: str = ""
    detail: str = ""
    refuses: Callable[[Call], str] = lambda _: ""
    partial: bool = False
    withheld: Callable[[Call], str] = lambda _: ""
    keeps_exponentials: Callable[[int, int, int, torch.dtype], bool] = lambda *_: True
    fuses: Callable[[int, int, torch.dtype], bool] = lambda *_: False

    def refusals(self, call: Call) -> list[str]:
        """Every reason this backend cannot serve ``call``; empty when it can."""
        if self.unavailable:
            return [self.unavailable]
        reasons = []
        if call.op not in self.ops:
            reasons.append(f"does not implement {call.op}")
        if self.devices is not None and call.device not in self.devices:
            reasons.append(f"runs on {', '.join(self.devices)}, not on {call.device}")
        if call.precision not in self.precisions:
            dtypes = ", ".join(str(p).removeprefix("torch.") for p in self.precisions)
            reasons.append(f"computes in {dtypes}, not in {str(call.precision)[6:]}")
        if not reasons and (reason := self.refuses(call)):
            reasons.append(reason)
        return reasons


@dataclass
class _Registry:
    backends: dict[str, Backend] = field(default_factory=dict)
    forced: str | None = None
    answers: dict[tuple, tuple[Backend, ...]] = field(default_factory=dict)  # of _serving


_REGISTRY = _Registry()

# Kept exponentials may take this much; above it they are recomputed.
_DEFAULT_WORKSPACE = 64 * 2**20
_workspace_bytes = _DEFAULT_WORKSPACE


def register(backend: Backend) -> None:
    """Append ``backend``; earlier ones are preferred."""
    _REGISTRY.backends[backend.name] = backend
    _REGISTRY.answers.clear()


def unregister(name: str) -> None:
    """Forget the backend called ``name``."""
    del _REGISTRY.backends[name]
    _REGISTRY.answers.clear()


def backends() -> dict[str, Backend]:
    """Every backend by name, in order of preference, usable here or not."""
    return dict(_REGISTRY.backends)


def pick(call: Call) -> Backend:
    """The first backend that serves ``call``, or the forced one.

    Raises:
        RuntimeError: the forced backend, or every one, refuses; each reason is given.
    """
    backend = find(call)
    if backend is None:
        raise _refused(call)
    return backend


def find(call: Call) -> Backend | None:
    """The first backend that serves ``call``, or the forced one; ``None`` where it refuses."""
    return next(iter(_serving(call)), None)


def fuses(call: Call, n: int, d: int) -> bool:
    """Whether one that serves ``call`` would rather take a whole loss of N pairs."""
    return any(backend.fuses(n, d, call.precision) for backend in _serving(call))


def run(call: Call, function: str, *arguments):
    """What ``function`` of the first backend that serves ``call``, and does not decline, returns.

    Raises:
        RuntimeError: as :func:`pick`, or each one declines these arguments.
    """
    serving = _serving(call)
    for backend in serving:
        result = getattr(backend.implementation, function)(*arguments)
        if result is not NotImplemented:
            return result
    if not serving:
        raise _refused(call)
    names = ", ".join(backend.name for backend in serving)
    raise RuntimeError(f"no backend serves this {call.op}: {names} declined its arguments")


def _refused(call: Call) -> RuntimeError:
    reasons = [f"{b.name}: {'; '.join(_against(b, call))}" for b in _candidates()]
    dtype = str(call.precision).removeprefix("torch.")
    return RuntimeError(
        f"no backend serves {call.op} in {dtype} on {call.device} ({' | '.join(reasons)})"
    )


def _serving(call: Call) -> tuple[Backend, ...]:
    """Who serves ``call``, in order of preference."""
    if torch.compiler.is_compiling():  # the answer becomes part of the graph's guards
        return tuple(b for b in _candidates() if not _against(b, call))
    key = (call, _REGISTRY.forced)
    if key not in _REGISTRY.answers:
        _REGISTRY.answers[key] = tuple(b for b in _candidates() if not _against(b, call))
    return _REGISTRY.answers[key]


def _candidates() -> list[Backend]:
    forced = _REGISTRY.forced
    if forced is None:
        return list(_REGISTRY.backends.values())
    first = _REGISTRY.backends[forced]
    others = [b for b in _REGISTRY.backends.values() if b is not first]
    return [first, *others] if first.partial else [first]


def _against(backend: Backend, call: Call) -> list[str]:
    """Why ``backend`` does not serve ``call`` now."""
    reasons = backend.refusals(call)
    if not reasons and backend.name != _REGISTRY.forced and (reason := backend.withheld(call)):
        reasons.append(reason)
    return reasons


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every fastcl operator onto one backend inside a ``with`` block.

    ``"cuda"`` holds single kernels: they are used wherever one fits, measured or not, and other
    calls go where they went before.

    Process-wide rather than per thread, because autograd runs backward passes of accelerators in
    threads of its own.

    Args:
        name: a key of :func:`backends`.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot run on this machine; later, from an operator, when it
            cannot serve that call.
    """
    if name not in _REGISTRY.backends:
        raise ValueError(f"backend is {name!r}; expected one of {list(_REGISTRY.backends)}")
    if _REGISTRY.backends[name].unavailable:
        raise RuntimeError(f"backend {name!r}: {_REGISTRY.backends[name].unavailable}")
    previous, _REGISTRY.forced = _REGISTRY.forced, name
    try:
        yield
    finally:
        _REGISTRY.forced = previous


def set_workspace(megabytes: float) -> None:
    """Memory a loss may use to keep exponentials between forward and backward.

    Where N x M numbers fit, keeping them saves the backward its recomputation; above the budget
    (default 64) they are recomputed and memory stays linear in N + M. 0 never keeps them.

    Raises:
        ValueError: a negative budget.
    """
    global _workspace_bytes
    if megabytes < 0:
        raise ValueError(f"megabytes is {megabytes}; expected 0 or more")
    _workspace_bytes = int(megabytes * 2**20)


def workspace_bytes() -> int:
    """The present budget in bytes; see :func:`set_workspace`."""
    return _workspace_bytes

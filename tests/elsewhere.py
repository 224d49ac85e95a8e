"""A device that is not the CPU, for tests on machines without one.

Its tensors hold CPU tensors, say that they are on ``"elsewhere"``, and are as strict as CUDA's: no
operator takes one beside a CPU tensor that has dimensions, none draws from a CPU generator, and
numpy refuses them. Within :class:`Elsewhere` tensors are made there by ``device="elsewhere"`` and
brought there by ``.to("elsewhere")``. It renames PyTorch's reserved backend, which a process can do
once: import this in a process of its own.
"""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Backend:
    """What PyTorch asks of ``torch.elsewhere``; its numbers are drawn by the CPU's generator."""

    device = staticmethod(lambda index: contextlib.nullcontext())
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _setup_privateuseone_for_python_backend("elsewhere", backend_module=_Backend)
DEVICE = torch.device("elsewhere:0")
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) asks the mode, too

_aten = torch.ops.aten
# what CUDA too takes tensors of both devices for
_BOTH = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}


class There(torch.Tensor):
    """A tensor on the second device; ``here`` is the CPU tensor that holds its numbers."""

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        return torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, device=DEVICE,
        )  # fmt: skip

    def __init__(self, here: torch.Tensor):
        self.here = here

    def __repr__(self, **_):
        return f"There({self.here})"

    def __reduce_ex__(self, protocol):  # a checkpoint, read onto the CPU as Lightning does
        return self.here.__reduce_ex__(protocol)

    def numpy(self, *_, **__):
        raise TypeError("can't convert elsewhere:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self):
        return self.here.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


def _call(function, args, kwargs):
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, There)]
    asked = kwargs.get("device")
    to_there = asked is not None and torch.device(asked).type == "elsewhere"
    if there and function not in _BOTH:
        here = [t for t in tensors if not isinstance(t, There) and t.ndim]
        if function in _INDEXED and isinstance(args[0], There):
            here = [t for t in here if t is not args[0] and t.is_floating_point()]
        if here:
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {function} got elsewhere and cpu "
                f"{[list(t.shape) for t in here]}"
            )
    if (there or to_there) and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"Expected a 'elsewhere' device type for generator: {function}")
    held = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, dict(kwargs)))
    if asked is not None:
        held[1]["device"] = "cpu"
        if function is _aten._to_copy.default:
            held[1]["non_blocking"] = False
    result = function(*held[0], **held[1])
    stays = to_there if asked is not None else bool(there)
    if function is _aten.copy_.default:
        return args[0]
    if not stays:
        if there and isinstance(result, torch.Tensor):  # a copy of its own, as from a device
            result = result.clone() if any(result is t.here for t in there) else result
        return result
    wrapped = tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, result)
    return return_and_correct_aliasing(function, args, kwargs, wrapped) if there else wrapped


class Elsewhere(TorchDispatchMode):
    """Within it ``device="elsewhere"`` makes tensors there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})

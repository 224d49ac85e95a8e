"""Registering an operator: schema, implementation, shape function and autograd side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import autocast_enabled, recordable
from .registry import Call, run

_library = torch.library.Library("fastcl", "FRAGMENT")


def define(
    name: str,
    arguments: str,
    returns: str,
    implementation: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Define ``fastcl::name`` for every device; returns the function to call it by.

    Arguments have no defaults and are passed by position. ``setup_context`` and ``backward`` are
    those of ``torch.autograd.Function``. Whoever traces (torch.compile, fake tensors, functorch,
    tensor subclasses) gets the operator; plain eager calls reach the same implementation and the
    same formulas without it, because a small loss is little else than dispatch (see
    ``python -m benchmarks.overhead``).
    """
    _library.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcl::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fastcl, name).default

    def redispatch(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    direct, transformed = implementation, operator
    if setup_context is not None and backward is not None:
        direct = _differentiable(implementation, setup_context, backward)
        transformed = _transformable(operator, setup_context, backward)
        _library.impl(name, _differentiable(redispatch, setup_context, backward), "Autograd")

    def call(*arguments):
        if not traced(arguments[0]):
            return direct(*arguments)
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
            return operator(*arguments)
        return transformed(*arguments)

    return call


def _recordable(arguments) -> list:
    return [recordable(a) if isinstance(a, Tensor) and a.is_inference() else a for a in arguments]


def traced(tensor: Tensor) -> bool:
    """Whether someone records or transforms what is done to ``tensor``."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _refuse_forward_mode(arguments) -> None:
    if forward_ad._current_level < 0:
        return
    for argument in arguments:
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                "fastcl has no forward-mode derivatives; use reverse mode (backward, "
                "torch.autograd.grad, torch.func.grad)"
            )


def _transformable(operator, setup_context: Callable, backward: Callable) -> Callable:
    """``operator`` under torch.func transforms, which want the context set up separately."""
    function: Any = type(
        "FastclTransformable",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(lambda *arguments: operator(*arguments)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "generate_vmap_rule": True,
        },
    )

    def transformable(*arguments):
        _refuse_forward_mode(arguments)
        return function.apply(*arguments)

    return transformable


def _differentiable(compute: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """``compute`` with a gradient: what ``torch.library.register_autograd`` makes, but without
    normalising arguments and defaults on every call, which operators without defaults can spare."""

    def forward(ctx, *arguments):
        outputs = compute(*arguments)
        setup_context(ctx, arguments, outputs)
        return outputs

    function: Any = type(
        "FastclFunction",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def differentiable(*arguments):
        _refuse_forward_mode(arguments)
        if torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return function.apply(*_recordable(arguments))
        return compute(*arguments)

    return differentiable


def dispatch(op: str, function: str, tensor: Tensor, precision: torch.dtype, *arguments):
    """Call ``function`` of the backend that serves ``op`` now, with autocast off while it runs.

    An operator runs below autocast's dispatch, but the products inside a PyTorch implementation
    would meet it again and lose the precision the operator promised.
    """
    device = tensor.device.type
    call = Call(op, device, precision, tensor.device.index)
    if not autocast_enabled(device):
        return run(call, function, *arguments, precision)
    with torch.autocast(device, enabled=False):
        return run(call, function, *arguments, precision)


def cast_gradients(gradients, inputs, needs) -> tuple[Tensor | None, ...]:
    """Gradients in their inputs' dtype; ``None`` for those nobody needs."""
    return tuple(
        g.to(x.dtype) if needed and x is not None else None
        for g, x, needed in zip(gradients, inputs, needs, strict=True)
    )


def differentiate(formula: Callable, needs_at: int | None = None) -> dict[str, Callable]:
    """Autograd of a backward operator: differentiate the reference's ``formula`` once more.

    The formula is dense, so second derivatives take N x M memory; they are exact on every
    backend, and of any order.

    Args:
        formula: takes the operator's first arguments; returns the operator's results (``None``
            where one does not exist).
        needs_at: position of the operator's ``bool[] needs`` argument; ``None`` if it has none.
    """
    count = formula.__code__.co_argcount

    def setup_context(ctx, inputs, output):
        arguments = inputs[:count]
        ctx.is_tensor = [isinstance(a, Tensor) for a in arguments]
        ctx.save_for_backward(*(a for a in arguments if isinstance(a, Tensor)))
        ctx.others = [a for a in arguments if not isinstance(a, Tensor)]
        ctx.needs = None if needs_at is None else inputs[needs_at]
        ctx.total = len(inputs)
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        again = torch.is_grad_enabled()
        saved, others = iter(ctx.saved_tensors), iter(ctx.others)
        arguments, wanted = [], []
        for position, is_tensor in enumerate(ctx.is_tensor):
            argument = next(saved if is_tensor else others)
            if is_tensor and ctx.needs_input_grad[position]:
                # fresh nodes, so that one argument's gradient does not include what reaches it
                # through another that was computed from it
                if again and argument.requires_grad:
                    argument = argument.view_as(argument)
                else:
                    argument = argument.detach().requires_grad_()
                wanted.append((position, argument))
            arguments.append(argument)
        with torch.enable_grad():
            results = formula(*arguments)
        needs = [True] * len(results) if ctx.needs is None else ctx.needs
        pairs = [
            (result, grad.to(result.dtype))
            for result, grad, needed in zip(results, grads, needs, strict=True)
            if needed and grad is not None and result is not None and result.requires_grad
        ]
        gradients: list[Tensor | None] = [None] * ctx.total
        if pairs and wanted:
            outputs, upstream = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outputs, [a for _, a in wanted], upstream, create_graph=again, allow_unused=True
            )
            for (position, _), gradient in zip(wanted, found, strict=True):
                gradients[position] = gradient
        return tuple(gradients)

    return {"setup_context": setup_context, "backward": backward}

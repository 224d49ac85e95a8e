"""Registering an operator: schema, implementation, shape function and autograd side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import Call, pick

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
) -> None:
    """Define ``fastcl::name`` for every device; the implementation asks the registry.

    Arguments have no defaults and are passed by position. ``setup_context`` and ``backward`` are
    those of ``torch.autograd.Function``.
    """
    _library.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastcl::{name}", fake, lib=_library)
    if setup_context is not None and backward is not None:
        operator = getattr(torch.ops.fastcl, name).default
        _library.impl(name, _autograd(operator, setup_context, backward), "Autograd")


def _autograd(operator, setup_context: Callable, backward: Callable) -> Callable:
    """What ``torch.library.register_autograd`` registers, at a third of its cost per call.

    It normalises arguments and defaults on every call (60 microseconds for three operators, of
    the 250 that a small loss takes in plain PyTorch); operators without defaults need neither.
    """

    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            outputs = operator(*arguments)
        setup_context(ctx, arguments, outputs)
        return outputs

    function: Any = type(
        f"{operator.name().replace('::', '_')}_autograd",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def implementation(*arguments):
        if torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in arguments
        ):
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return implementation


def dispatch(op: str, function: str, tensor: Tensor, precision: torch.dtype, *arguments):
    """Call ``function`` of the backend that serves ``op`` now, with autocast off while it runs.

    An operator runs below autocast's dispatch, but the products inside a PyTorch implementation
    would meet it again and lose the precision the operator promised.
    """
    device = tensor.device.type
    implementation = getattr(pick(Call(op, device, precision)).implementation, function)
    if not torch.is_autocast_enabled(device):
        return implementation(*arguments, precision)
    with torch.autocast(device, enabled=False):
        return implementation(*arguments, precision)


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
                if not (again and argument.requires_grad):
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

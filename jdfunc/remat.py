"""Rematerialisation: recompute a block in the backward pass instead of keeping what is inside."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jdfunc import pytrees


def remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a pure function forget its intermediates, and compute them again when differentiated.

    In place of `torch.utils.checkpoint`, which `torch.func` refuses, and which after
    `functional_call` would recompute with the module's own parameters instead of those it was
    given. Everything that is differentiated must come in as an argument: nothing in a closure gets
    a gradient.

    Args:
        function: pure; pytrees of tensors, and other values, in; a tensor or a tuple of tensors
            out. No random draws inside.

    Returns:
        A function with the same values and derivatives. Parameters that go in have dense rows,
        since their uses are out of sight.

    Cost: one more forward pass of the function; memory for its arguments only. A compiled step
    leaves rematerialisation to the compiler and calls the function as it is.

    References:
        Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016, arXiv:1604.06174.

    Example:
        >>> block = remat(lambda params, x: torch.tanh(x @ params["w"]))
        >>> w = torch.eye(2)
        >>> torch.func.grad(lambda w: block({"w": w}, torch.ones(2)).sum())(w)
        tensor([[0.4200, 0.4200],
                [0.4200, 0.4200]])
    """

    def rematerialised(*args: Any) -> Any:
        # In a backward pass this is a block inside a block, which is being recomputed already.
        if torch.compiler.is_compiling() or torch._C._current_autograd_node() is not None:
            return function(*args)
        tensors, restore = pytrees.partition(args, lambda leaf: isinstance(leaf, Tensor))
        single: list[bool] = []

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            out = function(*restore(tensors))
            single.append(isinstance(out, Tensor))
            return (out,) if isinstance(out, Tensor) else tuple(out)

        out = _Remat.apply(flat, *tensors)
        return out[0] if single[0] else out

    return rematerialised


class _Remat(torch.autograd.Function):
    """Saves the inputs only; its backward rule is the pullback of the function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Any:
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        inputs = ctx.saved_tensors
        floating = [k for k, x in enumerate(inputs) if x.is_floating_point()]

        def of_floating(*values: Tensor) -> tuple[Tensor, ...]:
            full = list(inputs)
            for k, value in zip(floating, values, strict=True):
                full[k] = value
            return ctx.function(*full)

        pullback: Any = torch.func.vjp(of_floating, *(inputs[k] for k in floating))[1]
        grads: list[Tensor | None] = [None] * len(inputs)
        for k, grad in zip(floating, pullback(cotangents), strict=True):
            grads[k] = grad
        return None, *grads

"""Checks of the arguments that every linearization shares, and the words of their errors."""

from typing import Any

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.types import Batch, Buffers, ModelFn, Params


def check_model(model_fn: ModelFn, params: Params) -> None:
    """Check that the model is a function and that the params are floating-point tensors."""
    if not callable(model_fn):
        raise TypeError(
            "expected model_fn to be a function (params, buffers, batch) -> losses, "
            f"got {type(model_fn).__name__}"
        )
    if isinstance(model_fn, torch.nn.Module):
        raise TypeError(
            "expected model_fn to be a pure function (params, buffers, batch) -> losses, got the "
            f"module {type(model_fn).__name__}; wrap it: see jdfunc.model_to_function"
        )
    check_params(params)


def check_params(params: Params) -> None:
    """Check that the params are floating-point tensors."""
    named = zip(pytrees.names(params), pytrees.leaves(params), strict=True)
    if pytrees.holds_none(params):
        raise TypeError("expected every leaf of params to be a tensor, got None")
    for name, leaf in named:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"expected every leaf of params to be a tensor, got {type(leaf).__name__} at "
                f"{name!r}"
            )
        if not leaf.is_floating_point():
            raise ValueError(
                f"expected floating-point params, got {leaf.dtype} at {name!r}; pass tensors that "
                "are not trained in buffers or in the batch"
            )


def check_losses(losses: Any) -> None:
    """Check that losses are one floating-point tensor."""
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"expected model_fn to return a tensor of losses, got {type(losses).__name__}; stack "
            "the losses of several tasks, or pass has_aux=True if the model returns (losses, aux)"
        )
    if not losses.is_floating_point():
        raise ValueError(f"expected floating-point losses, got {losses.dtype}")


def run_model(
    model_fn: ModelFn, params: Params, buffers: Buffers, batch: Batch, has_aux: bool
) -> tuple[Tensor, Any]:
    """Run the model on copies of the buffers: losses and aux, checked.

    A model that writes to its buffers (BatchNorm in training mode) writes to the copies; it hands
    new values out through aux.

    Args:
        model_fn: the model.
        params: its parameters.
        buffers: its buffers.
        batch: its batch.
        has_aux: whether it returns (losses, aux).

    Returns:
        ``(losses, aux)``; aux is ``()`` without ``has_aux``.

    Raises:
        TypeError: the model does not return a tensor, or (tensor, aux).
        ValueError: losses are not floating point.
    """
    copies = pytrees.map(Tensor.clone, buffers) if buffers else buffers
    output = model_fn(params, copies, batch)
    if has_aux:
        if not isinstance(output, tuple) or len(output) != 2:
            raise TypeError(
                "expected model_fn to return (losses, aux) because has_aux=True, got "
                f"{type(output).__name__}"
            )
        losses, aux = output
    else:
        losses, aux = output, ()
    check_losses(losses)
    return losses, aux


def check_depends(losses: Tensor, params: Params) -> None:
    """Check that losses carry a gradient to some parameter."""
    # A model that reads its own tensors, not the params it is given, is the usual reason.
    if pytrees.leaves(params) and not losses.requires_grad:
        raise ValueError(
            "expected losses that depend on params, got losses that depend on none of them; call "
            "the model with the params it is given (torch.func.functional_call, or the apply_fn of "
            "jdfunc.model_to_function), outside torch.no_grad() and without .detach()"
        )


def check_buffers(buffers: Buffers | None) -> Buffers:
    """Return the buffers, checked to hold tensors; an empty dict for None."""
    if not buffers:
        return {} if buffers is None else buffers
    for name, leaf in zip(pytrees.names(buffers), pytrees.leaves(buffers), strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"expected every leaf of buffers to be a tensor, got {type(leaf).__name__} at "
                f"{name!r}"
            )
    return buffers


def check_positive(**sizes: int | None) -> None:
    """Check that sizes are positive where they are given."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"expected {name} to be positive, got {size}")

"""Between `nn.Module`, which holds its tensors, and pure functions, which are given them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jdfunc import pytrees
from jdfunc.types import Params

ApplyFn = Callable[..., tuple[Any, dict[str, Tensor]]]


def model_to_function(
    module: nn.Module,
) -> tuple[ApplyFn, dict[str, Tensor], dict[str, Tensor]]:
    """Turn a module into a pure function of its parameters and buffers.

    Buffers are never written in place: the function works on copies and returns them, so a
    BatchNorm in training mode hands back its new running statistics. Tied parameters appear once,
    under their first name.

    Args:
        module: any `nn.Module`. Its mode (``train()``/``eval()``) is read at each call.

    Returns:
        ``(apply_fn, params, buffers)`` with ``apply_fn(params, buffers, *args, **kwargs) ->
        (outputs, new_buffers)``, and flat dicts of detached tensors by dotted name (they share
        memory with the module; nothing here writes to them). ``apply_fn`` raises ValueError for a
        name or a shape that the module does not have; parameters left out keep its own values.

    Raises:
        TypeError: ``module`` is not an `nn.Module`.

    Example:
        >>> apply_fn, params, buffers = model_to_function(torch.nn.BatchNorm1d(2, affine=False))
        >>> _, new_buffers = apply_fn(params, buffers, torch.ones(4, 2))
        >>> int(buffers["num_batches_tracked"]), int(new_buffers["num_batches_tracked"])
        (0, 1)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(module).__name__}")

    def apply_fn(
        params: dict[str, Tensor], buffers: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        _check_names("param", params, own_params, partial=True)
        _check_names("buffer", buffers, own_buffers, partial=False)
        new_buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        outputs = torch.func.functional_call(module, (params, new_buffers), args, kwargs)
        return outputs, new_buffers

    own_params = {name: p.shape for name, p in module.named_parameters(remove_duplicate=False)}
    own_buffers = {name: b.shape for name, b in module.named_buffers()}
    params = {name: param.detach() for name, param in module.named_parameters()}
    buffers = {name: buffer.detach() for name, buffer in module.named_buffers()}
    return apply_fn, params, buffers


def _check_names(
    kind: str, given: dict[str, Tensor], own: dict[str, torch.Size], *, partial: bool
) -> None:
    """Check names and shapes of tensors against those of the module."""
    unknown = [name for name in given if name not in own]
    missing = [] if partial else [name for name in own if name not in given]
    if unknown or missing:
        raise ValueError(
            f"expected the {kind}s of the module by name, got unknown names {unknown} and missing "
            f"names {missing}; start from what model_to_function returned"
        )
    for name, tensor in given.items():
        if tensor.shape != own[name]:
            raise ValueError(
                f"expected {kind} {name!r} of shape {tuple(own[name])}, got {tuple(tensor.shape)}"
            )


def assign_grads(target: nn.Module | Params, grads: Params) -> None:
    """Put a direction where `torch.optim` looks for it: ``assign_grads(module, grads)``.

    This is the one function of the package that writes to its argument: it replaces the ``.grad``
    of the parameters named in ``grads`` and leaves every other parameter as it is.

    Args:
        target: a module, with ``grads`` a dict by dotted parameter name; or a pytree of parameters,
            with ``grads`` of the same structure.
        grads: what `jd_step` returned.

    Raises:
        ValueError: a name the module does not have, another structure, or another shape.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> assign_grads(model, {"weight": torch.ones(1, 2)})
        >>> model.weight.grad
        tensor([[1., 1.]])
    """
    if isinstance(target, nn.Module):
        if not isinstance(grads, dict):
            raise ValueError(
                f"expected grads as a dict by parameter name, got {type(grads).__name__}"
            )
        named = dict(target.named_parameters(remove_duplicate=False))
        unknown = [name for name in grads if name not in named]
        if unknown:
            raise ValueError(
                f"expected names of parameters of {type(target).__name__}, got {unknown}; "
                f"it has {sorted(named)}"
            )
        pairs = [(name, named[name], grad) for name, grad in grads.items()]
    else:
        if not pytrees.same_structure(target, grads):
            raise ValueError("expected grads of the structure of the params they belong to")
        pairs = list(
            zip(pytrees.names(target), pytrees.leaves(target), pytrees.leaves(grads), strict=True)
        )
    for name, param, grad in pairs:
        if param.shape != grad.shape:
            raise ValueError(
                f"expected a gradient of shape {tuple(param.shape)} for {name}, "
                f"got {tuple(grad.shape)}"
            )
    for _, param, grad in pairs:
        param.grad = grad.to(param.dtype)

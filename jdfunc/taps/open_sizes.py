"""Rules that leave the number of examples open in a compiled function.

Where torch's own batching rule, or that of the derivative, reads the number of examples as a fixed
int, a compiled function would be compiled anew for every batch size. Here the same functions are
written in operations that do not. Eager code calls the functions themselves. Of what is left to
torch, these fix the number: convolutions and pooling, group and batch norms, cat, gather, and the
derivatives of slices, of max along an axis and of sort.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.taps.batching import norm
from jdfunc.taps.tap import Rule, Tap


def cross_entropy(
    tap: Tap,
    func: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Rule of `F.cross_entropy` and `F.nll_loss` of classes: a sum over classes, not a gather."""
    plain = torch.compiler.is_compiling() and weight is None and label_smoothing == 0
    if not plain or target.is_floating_point() or size_average is not None or reduce is not None:
        given = (input, target, weight, size_average, ignore_index, reduce, reduction)
        smoothing = (label_smoothing,) if func is F.cross_entropy else ()
        return tap.call(func, *given, *smoothing)
    tap.note(func, (input,), {})
    dim = 0 if input.ndim == 1 else 1
    values = input.log_softmax(dim) if func is F.cross_entropy else input
    classes = torch.arange(input.shape[dim], device=input.device)
    classes = classes.reshape(-1, *(1,) * (input.ndim - dim - 1))
    hit, kept = classes == target.unsqueeze(dim), target != ignore_index
    losses = -torch.where(hit & kept.unsqueeze(dim), values, 0).sum(dim)
    losses = torch.where(hit.any(dim) | ~kept, losses, torch.nan)  # no such class
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()


def layer_norm(
    tap: Tap,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Rule of `F.layer_norm`: (x − mean) / √(var + eps), scaled and shifted."""
    if not torch.compiler.is_compiling():
        return norm(tap, func, input, normalized_shape, weight, bias, eps)
    tap.note(func, (input, weight, bias), {})
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(input.dtype)


def gelu(tap: Tap, func: Any, input: Tensor, approximate: str = "none") -> Tensor:
    """Rule of `F.gelu`: x Φ(x)."""
    if not torch.compiler.is_compiling():
        return tap.call(func, input, approximate=approximate)
    tap.note(func, (input,), {})
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    if approximate == "none":
        odd = torch.erf(x * math.sqrt(0.5))
    else:
        odd = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return (0.5 * x * (1 + odd)).to(input.dtype)


def mse_loss(
    tap: Tap, func: Any, input: Tensor, target: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Rule of `F.mse_loss`: (x − y)²."""
    if not torch.compiler.is_compiling() or args or set(kwargs) - {"reduction"}:
        return tap.call(func, input, target, *args, **kwargs)
    tap.note(func, (input, target), {})
    squares = (input - target).square()
    reduction = kwargs.get("reduction", "mean")
    if reduction == "none":
        return squares
    return squares.mean() if reduction == "mean" else squares.sum()


RULES: dict[Any, Rule] = {
    F.cross_entropy: cross_entropy,
    F.nll_loss: cross_entropy,
    F.layer_norm: layer_norm,
    F.gelu: gelu,
    F.mse_loss: mse_loss,
}

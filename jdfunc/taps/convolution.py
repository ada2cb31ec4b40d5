"""Rule for convolutions: a product of the kernel with the patches of the input.

With groups h, output positions s and patches i = channels × kernel, the cotangent of the kernel is
Σ_s cotangent[h, s, j] ⊗ patch[h, s, i], for any number of spatial axes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.taps.tap import Rule, Tap


def convolution(
    tap: Tap,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Rule of conv1d, conv2d and conv3d."""
    found = tap.find(weight)

    def call(w: Tensor) -> Tensor:
        return func(input, w, bias, stride, padding, dilation, groups)

    if bias is not None:
        tap.note(func, (bias,), {})
    if found is None or found.transposed:
        tap.note(func, (weight,), {})
        return call(weight)
    kernel = weight.shape[2:]
    n = len(kernel)
    steps, dilations = _each(stride, n), _each(dilation, n)

    def activations(x: Tensor) -> Tensor:
        x = x if x.ndim == n + 2 else x[None]
        return patches(x, kernel, steps, _pads(padding, kernel, dilations), dilations, groups)

    def cotangents(cotangent: Tensor) -> Tensor:
        c = cotangent if cotangent.ndim == n + 2 else cotangent[None]
        c = c.reshape(c.shape[0], groups, c.shape[1] // groups, -1)  # [n, h, j, positions]
        return c.permute(1, 2, 0, 3).flatten(2).mT

    return tap.use(
        found, func, call, weight, input, activations, cotangents, activations_first=False
    )


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pads: list[tuple[int, int]],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return the patches that a kernel sees, [groups, n·positions, channels/groups·kernel]."""
    n = len(kernel)
    x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])  # [n, h, c, *positions, *kernel]
    # Positions are laid out last, since runs of a row of pixels copy far faster than of a kernel.
    x = x.permute(1, 2, *range(3 + n, 3 + 2 * n), 0, *range(3, 3 + n))
    return x.flatten(2 + n).flatten(1, 1 + n).mT


def _each(value: Any, n: int) -> tuple[int, ...]:
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * n if len(given) == 1 else given


def _pads(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Return what is padded before and after each spatial axis."""
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _each(padding, len(kernel))]


RULES: dict[Any, Rule] = dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], convolution)

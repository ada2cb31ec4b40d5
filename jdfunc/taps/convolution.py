"""Rule for convolutions: a product of the kernel with the patches of the input.

With groups h, output positions s and patches i = channels × kernel, the cotangent of the kernel is
Σ_s cotangent[h, s, j] ⊗ patch[h, s, i], for any number of spatial axes.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.taps.tap import Direct, Rule, Tap


class Geometry(NamedTuple):
    """How a kernel moves over its input: a number, or a pair of pads, for each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


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
    kernel, n = tuple(weight.shape[2:]), weight.ndim - 2
    dilations = _each(dilation, n)
    pads = _pads(padding, kernel, dilations)
    geometry = Geometry(kernel, _each(stride, n), pads, dilations, groups)

    def batched(x: Tensor) -> Tensor:
        return x if x.ndim == n + 2 else x[None]

    def activations(x: Tensor) -> Tensor:
        return patches(batched(x), geometry)

    def cotangents(cotangent: Tensor) -> Tensor:
        c = batched(cotangent)
        c = c.reshape(c.shape[0], groups, c.shape[1] // groups, -1)  # [n, h, j, positions]
        return c.permute(1, 2, 0, 3).flatten(2).mT

    def rows(x: Tensor, cotangent: Tensor) -> Tensor:
        return kernel_cotangent(batched(x), batched(cotangent), geometry)

    def elements(output: torch.Size) -> int:
        channels = input.numel() // math.prod(input.shape[-n:])
        return channels * math.prod(kernel) * math.prod(output[-n:])

    return tap.use(
        found,
        func,
        call,
        weight,
        input,
        activations,
        cotangents,
        activations_first=False,
        direct=Direct(elements, rows),
        bias=bias,
    )


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """Return the patches that a kernel sees, [groups, n·positions, channels/groups·kernel]."""
    kernel, stride, pads, dilation, groups = geometry
    n = len(kernel)
    x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])  # [n, h, c, *positions, *kernel]
    # Positions are laid out last, since runs of a row of pixels copy far faster than of a kernel.
    x = x.permute(1, 2, *range(3 + n, 3 + 2 * n), 0, *range(3, 3 + n))
    return x.flatten(2 + n).flatten(1, 1 + n).mT


def kernel_cotangent(x: Tensor, cotangent: Tensor, geometry: Geometry) -> Tensor:
    """Return Σ_s cotangent[h, s, j] ⊗ patch[h, s, i] in the shape of the kernel, without patches.

    Only the last axis is unfolded; along the others each offset of the kernel is a view.

    Args:
        x: [n, channels, *spatial].
        cotangent: of the output, [n, out, *positions].
        geometry: of the convolution.

    Returns:
        [out, channels/groups, *kernel].
    """
    kernel, stride, pads, dilation, groups = geometry
    x = F.pad(x, [p for pair in reversed(pads) for p in pair])
    x = x.unfold(-1, dilation[-1] * (kernel[-1] - 1) + 1, stride[-1])[..., :: dilation[-1]]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])  # [n, h, c, *rest, positions, k]
    x = x.movedim(-1, 3).contiguous()  # [n, h, c, k, *rest, positions]
    c = cotangent.reshape(cotangent.shape[0], groups, cotangent.shape[1] // groups, -1)
    products = []
    for offset in itertools.product(*(range(k) for k in kernel[:-1])):
        seen = x
        for axis, start in enumerate(offset):
            length = stride[axis] * (cotangent.shape[2 + axis] - 1) + 1
            seen = seen.narrow(4 + axis, start * dilation[axis], length)
            seen = seen[(slice(None),) * (4 + axis) + (slice(None, None, stride[axis]),)]
        products.append(c @ seen.flatten(4).flatten(2, 3).mT)  # [n, h, j, c·k]
    out = torch.stack(products, -1).sum(0)  # [h, j, c·k, offsets]
    out = out.unflatten(2, (-1, kernel[-1])).transpose(-1, -2)  # [h, j, c, offsets, k]
    return out.reshape(out.shape[0] * out.shape[1], out.shape[2], *kernel)


def _each(value: Any, n: int) -> tuple[int, ...]:
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * n if len(given) == 1 else given


def _pads(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return what is padded before and after each spatial axis."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _each(padding, len(kernel)))


RULES: dict[Any, Rule] = dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], convolution)

"""The state of an estimator: sums over everything that streamed by, and what divides them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.curvature.blocks import Factors
from jdfunc.curvature.estimate.basis import Basis
from jdfunc.curvature.estimate.factors import Moments
from jdfunc.curvature.layouts.layout import Layer, Layout


class Counters(NamedTuple):
    """What the sums of a state are divided by, float64 [] (float32 on MPS).

    Attributes:
        batches: how many batches went in.
        examples: how many examples.
        denominator: what the likelihood divides a mean by; of several heads [3 K].
    """

    batches: Tensor
    examples: Tensor
    denominator: Tensor


class State(NamedTuple):
    """What an estimator carries: tensors only, sums that are not yet divided.

    Attributes:
        step: how many batches were seen, int64 [].
        factors: by block: `Moments` of a layer, a matrix or a diagonal of the rest.
        basis: by block; empty until the first refresh.
        eigenvalues: by block, [h, r, q]; empty until the first refresh.
        counters: of the factors.
        eigen_counters: of the eigenvalues.
    """

    step: Tensor
    factors: dict[str, Moments | Tensor]
    basis: dict[str, Basis]
    eigenvalues: dict[str, Tensor]
    counters: Counters
    eigen_counters: Counters


def init_state(
    layout: Layout,
    params: Any,
    *,
    joint_bias: bool,
    forward_only: bool,
    expanded: bool,
    dtype: torch.dtype | None,
) -> State:
    """Return the state before any data: zeros.

    Args:
        layout: of the model.
        params: gives dtypes and the device.
        joint_bias: whether a bias shares the block of its weight.
        forward_only: whether the factors of the cotangents are the identity.
        expanded: whether the factors of every position on its own are kept too.
        dtype: of the factors; that of the parameters, float32 at least, if None.

    Returns:
        The state.

    Raises:
        ValueError: the parameters are not those of the layout.
    """
    named = dict(zip(pytrees.names(params), pytrees.leaves(params), strict=True))
    _check_fits(layout, named)
    factors: dict[str, Moments | Tensor] = {}
    for layer in layout.layers:
        like = named[layer.name]
        roles, each = (
            tuple(
                _zeros(layer, role, like, joint_bias, forward_only, dtype) for role in layer.roles
            )
            for _ in range(2)  # two, not one twice: they are added to in place
        )
        counts = tuple(_zero(like).expand(layer.matrix[0]).clone() for _ in layer.roles)
        factors[layer.name] = Moments(roles, counts, each if expanded else ())
    for rest in layout.rests:
        if rest.rule.covered:
            like, size = named[rest.params[0]], rest.block().shape[-1]
            shape = (1, size, size) if rest.rule.full else (1, size)
            factors[rest.params[0]] = like.new_zeros(shape, dtype=_wide(like, dtype))
    like = next(iter(named.values()), torch.zeros(()))
    first, second = (Counters(_zero(like), _zero(like), _zero(like)) for _ in range(2))
    step = torch.zeros((), dtype=torch.int64, device=like.device)
    return State(step, factors, {}, {}, first, second)


def _check_fits(layout: Layout, named: Mapping[str, Tensor]) -> None:
    """Check that parameters have the names and shapes of the layout."""
    wanted: dict[str, Any] = {layer.name: layer.shape for layer in layout.layers}
    wanted |= {x.bias: x.bias_shape for x in layout.layers if x.bias is not None}
    for rest in layout.rests:
        wanted |= dict(zip(rest.params, rest.shapes, strict=True))
    got = {name: tuple(param.shape) for name, param in named.items()}
    odd = [n for n in {**wanted, **got} if wanted.get(n) != got.get(n)]
    if odd:
        raise ValueError(
            f"expected the parameters of the layout, { ({n: wanted.get(n) for n in odd}) } among "
            f"them, got { ({n: got.get(n) for n in odd}) }; make the layout from these parameters"
        )


def zero_eigenvalues(
    layout: Layout, basis: Mapping[str, Basis], joint_bias: bool, like: Tensor
) -> dict[str, Tensor]:
    """Return eigenvalues of zero for every block, in the given bases.

    Args:
        layout: of the model.
        basis: of every block.
        joint_bias: whether a bias shares the block of its weight.
        like: gives their dtype and device.

    Returns:
        By block: zeros [h, r, q].
    """

    def zeros(name: str, h: int, i: int, j: int) -> Tensor:
        left, right = basis[name]
        r = i if isinstance(left, tuple) else left.shape[-1]
        q = j if isinstance(right, tuple) else right.shape[-1]
        return like.new_zeros((h, r, q))

    eigenvalues: dict[str, Tensor] = {}
    for layer in layout.layers:
        own = zeros(layer.name, *layer.block(joint_bias).shape)
        eigenvalues[layer.name] = own
        if layer.bias is not None and not layer.joint(joint_bias):
            left = layer.bias_activations() == 1
            eigenvalues[layer.bias] = torch.zeros_like(own[:, :, :1] if left else own[:, :1])
    for rest in layout.rests:
        if rest.rule.covered:
            eigenvalues[rest.params[0]] = zeros(rest.params[0], *rest.block().shape)
    return eigenvalues


def _zeros(
    layer: Layer,
    role: int,
    like: Tensor,
    joint_bias: bool,
    forward_only: bool,
    dtype: torch.dtype | None,
) -> Factors:
    h, *sizes = layer.block(joint_bias).shape
    sides = []
    for side, size in enumerate(sizes):
        flat = layer.diagonal[side] or (forward_only and side != role)
        shape = (h, size) if flat else (h, size, size)
        sides.append(like.new_zeros(shape, dtype=_wide(like, dtype)))
    return Factors(*sides)


def _zero(like: Tensor) -> Tensor:
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    return torch.zeros((), dtype=dtype, device=like.device)


def _wide(like: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32) if dtype is None else dtype

"""Rows of a Jacobian that are kept factored, one parameter at a time.

A parameter used as a matrix (a linear layer, a convolution on its patches, an embedding on the
one-hot vectors of its indices) has rows that are short sums of outer products,

    row_r[h, i, j] = Σ_s left_r[h, s, i] · right_r[h, s, j],

over the shared positions s (tokens, pixels, repeated uses) and, block by block, over groups h.
Activations and cotangents are the two sides. Sides broadcast over the row axes, so activations
that all rows share are held once.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class OneHot(NamedTuple):
    """One-hot vectors over i, kept as their indices; stands for a side [*rows, h, s, i], h = 1."""

    indices: Int[Tensor, "*rows h s"]


Side = Tensor | OneHot


class Outer(NamedTuple):
    """Rows of one parameter, row_r[h, i, j] = Σ_s left_r[h, s, i] right_r[h, s, j].

    Attributes:
        left: [*rows, h, s, i], or one-hot vectors.
        right: [*rows, h, s, j]; row axes of size one broadcast against those of ``left``.
        param: the parameter, whose shape is [h, i, j] reshaped.
    """

    left: Side
    right: Tensor
    param: Tensor


class Tied(NamedTuple):
    """Rows of one parameter used in several roles: the sum of the rows of each use."""

    uses: tuple[Outer, ...]


Factored = Outer | Tied


def uses_of(leaf: Factored) -> tuple[Outer, ...]:
    """Return the uses of the parameter, whose rows sum to those of the leaf."""
    return leaf.uses if isinstance(leaf, Tied) else (leaf,)


def param_of(leaf: Factored) -> Tensor:
    """Return the parameter that the rows belong to."""
    return uses_of(leaf)[0].param


def row_axes(side: Side) -> torch.Size:
    """Return the sizes of the row axes of a side."""
    return side.indices.shape[:-2] if isinstance(side, OneHot) else side.shape[:-3]


def positions(side: Side) -> int:
    """Return the number s of shared positions."""
    return side.indices.shape[-1] if isinstance(side, OneHot) else side.shape[-2]


def rows_shape(leaf: Factored) -> torch.Size:
    """Return the shape of the rows, [*rows]."""
    use = uses_of(leaf)[0]
    return torch.broadcast_shapes(row_axes(use.left), row_axes(use.right))


def widened(leaf: Factored) -> tuple[Outer, ...]:
    """Return the uses with sides in the dtype that products accumulate in, float32 at least."""
    uses = []
    for use in uses_of(leaf):
        dtype = torch.promote_types(use.right.dtype, torch.float32)
        left = use.left if isinstance(use.left, OneHot) else use.left.to(dtype)
        uses.append(use._replace(left=left, right=use.right.to(dtype)))
    return tuple(uses)


def elements(leaf: Factored) -> int:
    """Return how many elements the two sides hold."""
    return sum(
        (u.left.indices if isinstance(u.left, OneHot) else u.left).numel() + u.right.numel()
        for u in uses_of(leaf)
    )


# -------------------------------------------------------------------------------- J, and Jᵀ w


def materialise(leaf: Factored) -> Tensor:
    """Return the rows themselves, [*rows, *param.shape], in the dtype of the parameter."""
    rows = sum_of_outer(widened(leaf)).reshape((*rows_shape(leaf), *param_of(leaf).shape))
    return rows.to(param_of(leaf).dtype)


def sum_of_outer(uses: tuple[Outer, ...]) -> Tensor:
    """Return the rows Σ_uses Σ_s left ⊗ right, [*rows, h, i, j]."""
    rows = [_scattered(use) if isinstance(use.left, OneHot) else _outer(use) for use in uses]
    return sum(rows[1:], rows[0])


def _outer(use: Outer) -> Tensor:
    assert isinstance(use.left, Tensor)
    axes = range(use.right.ndim - 3)
    letters = "abcdefg"
    # A row axis that one side shares is left out of its equation: one GEMM, nothing expanded.
    sides, terms = [], []
    for side, other, column in ((use.left, use.right, "i"), (use.right, use.left, "j")):
        own = [k for k in axes if side.shape[k] != 1 or other.shape[k] == 1]
        sides.append(side.reshape(*(side.shape[k] for k in own), *side.shape[-3:]))
        terms.append("".join(letters[k] for k in own) + "hs" + column)
    rows = "".join(letters[k] for k in axes)
    return torch.einsum(f"{terms[0]},{terms[1]}->{rows}hij", *sides)


def _scattered(use: Outer) -> Tensor:
    assert isinstance(use.left, OneHot)
    shape, (size, width) = rows_shape(use), (use.param.shape[0], use.right.shape[-1])
    m = math.prod(shape)
    indices = use.left.indices.expand(*shape, *use.left.indices.shape[-2:]).reshape(m, -1)
    first = size * torch.arange(m, device=indices.device)[:, None]
    values = use.right.expand(*shape, *use.right.shape[-3:]).reshape(-1, width)
    rows = use.right.new_zeros(m * size, width).index_add(0, (first + indices).flatten(), values)
    return rows.reshape(*shape, 1, size, width)


def combine(leaf: Factored, weights: Tensor) -> Tensor:
    """Return Σ_r w_r row_r, [*param.shape], for weights [*rows]."""
    sums = [_weighted_sum(use, weights.to(use.right.dtype)) for use in widened(leaf)]
    total = sum(sums[1:], sums[0])  # not from 0, which would copy
    return total.reshape(param_of(leaf).shape).to(param_of(leaf).dtype)


def _weighted_sum(use: Outer, weights: Tensor) -> Tensor:
    # Weights go into the side that has every row; rows that the other side shares are summed.
    left, right, weights = use.left, use.right, weights[..., None, None, None]
    if row_axes(right) == rows_shape(use):
        right = _summed_to(weights * right, row_axes(left))
    else:
        assert isinstance(left, Tensor)
        left = _summed_to(weights * left, row_axes(right))
    if isinstance(left, OneHot):
        out = right.new_zeros(use.param.shape[0], right.shape[-1])
        return out.index_add(0, left.indices.flatten(), right.flatten(0, -2))[None]
    x, y = stacked(left), stacked(right)
    return (x[0].mT @ y[0])[None] if x.shape[0] == 1 else x.mT @ y


def _summed_to(side: Tensor, rows: torch.Size) -> Tensor:
    shared = [k for k, size in enumerate(rows) if size == 1 and side.shape[k] != 1]
    return side.sum(shared, keepdim=True) if shared else side


def stacked(side: Tensor) -> Tensor:
    """Stack rows and positions of a side: [h, rows·s, i]."""
    side = side.movedim(-3, 0)
    return side.reshape(side.shape[0], -1, side.shape[-1])


def concatenate(first: Outer, second: Outer) -> Outer | None:
    """Join two uses of one parameter along s; None where their sides do not line up."""
    pairs = ((first.left, second.left), (first.right, second.right))
    joined: list[Side] = []
    for a, b in pairs:
        if isinstance(a, OneHot) != isinstance(b, OneHot):
            return None
        x, y = [t.indices[..., None] if isinstance(t, OneHot) else t for t in (a, b)]
        if x.ndim != y.ndim or x.shape[-3] != y.shape[-3] or x.shape[-1] != y.shape[-1]:
            return None
        rows = torch.broadcast_shapes(x.shape[:-3], y.shape[:-3])
        both = torch.cat([t.expand(*rows, *t.shape[-3:]) for t in (x, y)], dim=-2)
        joined.append(OneHot(both[..., 0]) if isinstance(a, OneHot) else both)
    left, right = joined
    assert isinstance(right, Tensor)
    return Outer(left, right, first.param)

"""A function of F, block by block, ready to be applied: λ^p is computed once.

    Product       M ↦ L M R, where a power of a damped product is one again
    Elementwise   M ↦ Q_L ((Q_Lᵀ M Q_R) ∘ (f − f₀)) Q_Rᵀ + f₀ M

with f = f(λ), and f₀ = f(0) outside a thin basis.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.curvature.blocks import Block, Factors, Spectrum
from jdfunc.curvature.operate.damping import Damped, Damping


class Side(NamedTuple):
    """One side of a product, S = Q diag(f − f₀) Qᵀ + f₀.

    Attributes:
        basis: Q [h, d, r], or None for the identity.
        values: f [h, r].
        outside: f₀ [h] or []; None where it is zero or the basis is full.
        matrix: S [h, d, d] where it is kept, which halves the work.
    """

    basis: Tensor | None
    values: Tensor
    outside: Tensor | None
    matrix: Tensor | None


class Product(NamedTuple):
    """M ↦ L M R."""

    left: Side
    right: Side


class Elementwise(NamedTuple):
    """M ↦ Q_L ((Q_Lᵀ M Q_R) ∘ (f − f₀)) Q_Rᵀ + f₀ M.

    Attributes:
        left: Q_L [h, i, r], or None for the identity.
        right: Q_R [h, j, q], or None for the identity.
        values: f [h, r, q].
        outside: f₀ [h] or []; None where it is zero or both bases are full.
    """

    left: Tensor | None
    right: Tensor | None
    values: Tensor
    outside: Tensor | None


Part = Product | Elementwise


def part_of(block: Block, spectrum: Spectrum, damping: Damping, p: float) -> Part:
    """The p-th power of a damped block.

    Args:
        block: the block.
        spectrum: its eigenvalues and bases.
        damping: a rule of `jdfunc.curvature.damping`.
        p: the power.

    Returns:
        The part of the block.
    """
    damped = damping(block, spectrum)
    _, i, j = block.shape
    if isinstance(damped, Damped):
        thin = is_thin(spectrum.left, i) or is_thin(spectrum.right, j)
        outside = _raised_outside(damped, p) if thin else None
        return Elementwise(spectrum.left, spectrum.right, raised(damped.values, p), outside)
    left, right = damped
    return Product(_side(spectrum.left, left, i, p), _side(spectrum.right, right, j, p))


def identity_power(block: Block, held: Factors | Spectrum) -> Part:
    """F itself, without damping and without an eigenvalue problem."""
    held = widened(held)
    if isinstance(held, Spectrum):
        return Elementwise(held.left, held.right, held.eigenvalues, None)
    sides = [
        Side(None, s, None, None) if s.ndim == 2 else Side(None, s.diagonal(0, -2, -1), None, s)
        for s in (held.left, held.right)
    ]
    return Product(*sides)


def widened(held: Factors | Spectrum) -> Any:
    """What is known of a block, in one dtype, float32 at least."""
    dtype = torch.float32
    for tensor in pytrees.leaves(held):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return pytrees.map(lambda tensor: tensor.to(dtype), held)


def raised(values: Tensor, p: float) -> Tensor:
    """Values to the power p; zero where p < 0 and they are less than the smallest normal number."""
    if p >= 0:
        return values**p
    nothing = values < torch.finfo(values.dtype).tiny
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, values) ** p)


def is_thin(basis: Tensor | None, size: int) -> bool:
    """Tell whether a basis [h, size, r] spans less than the space."""
    return basis is not None and basis.shape[-1] < size


def values_of(part: Part) -> Tensor:
    """Some values of a part, which tell its dtype and device."""
    return part.right.values if isinstance(part, Product) else part.values


def dtype_of(part: Part) -> torch.dtype:
    """The dtype to compute in."""
    return values_of(part).dtype


def applied(part: Part, matrix: Tensor) -> Tensor:
    """Apply a part.

    Args:
        part: the part of a block.
        matrix: M [*columns, h, i, j].

    Returns:
        f(F) M, of the same shape.
    """
    if isinstance(part, Product):
        return _times(part.right, _times(part.left, matrix).mT).mT
    values, outside = part.values, None
    if part.outside is not None:
        outside = part.outside[..., None, None]
        values = values - outside
    rotated = values * _rotated(part.left, _rotated(part.right, matrix.mT).mT)
    back = rotated if part.left is None else part.left @ rotated
    back = back if part.right is None else back @ part.right.mT
    return back if outside is None else back + outside * matrix


def diagonal(part: Part) -> Tensor:
    """The diagonal of f(F) as a matrix [h, i, j]."""
    if isinstance(part, Product):
        left, right = _side_diagonal(part.left), _side_diagonal(part.right)
        return left[..., :, None] * right[..., None, :]
    values, outside = part.values, None
    if part.outside is not None:
        outside = part.outside[..., None, None]
        values = values - outside
    values = values if part.left is None else part.left.square() @ values
    values = values if part.right is None else values @ part.right.square().mT
    return values if outside is None else values + outside


def logdet(block: Block, damped: Damped | tuple[Damped, Damped]) -> Tensor:
    """The logarithm of the determinant of a damped block."""
    h, i, j = block.shape
    if isinstance(damped, Damped):
        inside = math.prod(damped.values.shape[1:])
        return _log_sum(damped, h, i * j - inside).sum()
    left, right = damped
    both = [(left, i, j), (right, j, i)]
    logs = [n * _log_sum(side, h, d - side.values.shape[-1]) for side, d, n in both if n * d]
    return sum(logs[1:], logs[0]).sum() if logs else left.values.sum()


def _log_sum(damped: Damped, h: int, missing: int) -> Tensor:
    """Σ log of all eigenvalues of each group, [h]."""
    logs = damped.values.log().flatten(1).sum(-1)
    if not missing:
        return logs
    outside = damped.values.new_zeros(h) if damped.outside is None else damped.outside
    return logs + missing * outside.log()


def _side(basis: Tensor | None, damped: Damped, size: int, p: float) -> Side:
    values = raised(damped.values, p)
    if basis is None:
        return Side(None, values, None, None)
    if is_thin(basis, size):
        return Side(basis, values, _raised_outside(damped, p), None)
    return Side(basis, values, None, (basis * values[..., None, :]) @ basis.mT)


def _raised_outside(damped: Damped, p: float) -> Tensor | None:
    if damped.outside is None:
        return damped.values.new_ones(()) if p == 0 else None
    return raised(damped.outside, p)


def _times(side: Side, matrix: Tensor) -> Tensor:
    """S M."""
    if side.matrix is not None:
        return side.matrix @ matrix
    values = side.values[..., None]
    if side.basis is None:
        return values * matrix
    inside = side.basis.mT @ matrix
    if side.outside is None:
        return side.basis @ (values * inside)
    outside = side.outside[..., None, None]
    return side.basis @ ((values - outside) * inside) + outside * matrix


def _rotated(basis: Tensor | None, matrix: Tensor) -> Tensor:
    return matrix if basis is None else basis.mT @ matrix


def _side_diagonal(side: Side) -> Tensor:
    if side.matrix is not None:
        return side.matrix.diagonal(0, -2, -1)
    if side.basis is None:
        return side.values
    outside = 0.0 if side.outside is None else side.outside[..., None]
    squares = side.basis.square()
    return (squares @ (side.values - outside)[..., None])[..., 0] + outside

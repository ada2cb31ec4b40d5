"""Bases: the eigenvectors of the factors, of all blocks in few calls."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from jdfunc.curvature.blocks import Factors
from jdfunc.curvature.eigen import check_finite, completed, eigh_all
from jdfunc.curvature.layouts.layout import Layout


class Basis(NamedTuple):
    """The bases of the two sides of a block; () for the identity."""

    left: Tensor | tuple[()]
    right: Tensor | tuple[()]


Normalised = tuple[Factors, ...] | Tensor


def basis_of(
    layout: Layout,
    factors: Mapping[str, Normalised],
    expanded: Mapping[str, tuple[Factors, ...]],
    dtype: torch.dtype | None = None,
) -> dict[str, Basis]:
    """Diagonalise the factors of every block.

    Args:
        layout: of the model.
        factors: by block: the factors of a layer, one pair for each role, or a matrix, or a
            diagonal.
        expanded: by layer: the factors of every position on its own, where sharing sums positions;
            they decide in the null space of the others.
        dtype: to compute in.

    Returns:
        By block: its bases.

    Raises:
        ValueError: a factor holds NaN or inf.
    """
    matrices: dict[str, Tensor] = {}
    bases: dict[str, Tensor | tuple[()]] = {}
    for layer in layout.layers:
        sides = joined(_roles(factors[layer.name]))
        rest = joined(expanded[layer.name]) if layer.name in expanded else (None, None)
        for side, full, place in zip(sides, rest, ("left", "right"), strict=True):
            name = f"{layer.name}, {place}"
            check_finite(name, side)
            if side.ndim == 2:
                bases[name] = ()
            elif full is None:
                matrices[name] = side
            else:
                bases[name] = completed(side, full)
    for block in layout.rests:
        if block.rule.covered:
            name, matrix = block.params[0], factors[block.params[0]]
            assert isinstance(matrix, Tensor)
            bases[f"{name}, left"] = ()
            check_finite(name, matrix)
            if block.rule.full:
                matrices[f"{name}, right"] = matrix
            else:
                bases[f"{name}, right"] = ()
    bases |= {name: vectors for name, (_, vectors) in eigh_all(matrices, dtype).items()}
    return {name: Basis(bases[f"{name}, left"], bases[f"{name}, right"]) for name in factors}


def _roles(factors: Normalised) -> tuple[Factors, ...]:
    assert not isinstance(factors, Tensor)
    return factors


def joined(roles: tuple[Factors, ...]) -> Factors:
    """Return one pair of factors for uses in several roles: Σ L, Σ R, with their trace.

    Scaled so that tr L tr R = Σ_u tr L_u tr R_u.
    """
    if len(roles) == 1:
        return roles[0]
    left = roles[0].left + roles[1].left
    right = roles[0].right + roles[1].right
    products = [trace(f.left) * trace(f.right) for f in roles]
    wanted = sum(products[1:], products[0])
    total = trace(left) * trace(right)
    scale = torch.where(total > 0, wanted / torch.where(total > 0, total, 1), 0).sqrt()
    return Factors(_times(left, scale), _times(right, scale))


def trace(factor: Tensor) -> Tensor:
    """Return the trace of a factor [h, d, d], or of a diagonal one [h, d]: [h]."""
    return factor.sum(-1) if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def _times(factor: Tensor, scale: Tensor) -> Tensor:
    return factor * scale.reshape(-1, *(1,) * (factor.ndim - 1))

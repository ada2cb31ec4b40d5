"""Bases of few vectors: the eigenvectors of X Xᵀ that X spans, found in the smaller dimension.

With fewer vectors than their length, XᵀX has rank n < d. From X̂ᵀ = Q̂ R (orthonormal columns) and
R Rᵀ = W e Wᵀ, the eigenvectors of XᵀX with eigenvalues e are Q̂ W; on the complement it is zero.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from jdfunc.curvature.eigen import check_finite, eigh, eigh_all
from jdfunc.curvature.estimate.basis import Basis
from jdfunc.curvature.estimate.factors import rows_of
from jdfunc.curvature.estimate.pairs import Pair, activation_moment, pairs_of, second_moment
from jdfunc.curvature.estimate.passes import Chunk, Setup
from jdfunc.curvature.layouts.layout import Layer
from jdfunc.factored.leaves import positions, row_axes, stacked


def thin_basis(vectors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Orthonormal eigenvectors of the second moment of few vectors, within their span.

    Args:
        vectors: [h, n, d], n ≤ d.
        dtype: to compute in.

    Returns:
        [h, d, n].
    """
    wide = vectors if dtype is None else vectors.to(dtype)
    q, r = torch.linalg.qr(wide.mT)
    return (q @ eigh(r @ r.mT, dtype)[1]).to(vectors.dtype)


def spanned_basis(setup: Setup, chunks: Sequence[Chunk]) -> dict[str, Basis]:
    """Return bases from all activations and cotangents: thin ones where these are few.

    Args:
        setup: of the estimator; its sharing is `expand`, and every layer has one role.
        chunks: all of the data.

    Returns:
        By block: its bases.

    Raises:
        ValueError: activations or cotangents hold NaN or inf.
    """
    thin: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    dtype = setup.precision.eigh
    for layer in setup.layout.layers:
        sizes = layer.block(setup.joint_bias).shape[1:]
        for side, place in enumerate(("left", "right")):
            if layer.diagonal[side]:
                continue
            role = layer.roles[0] == side
            parts = _sides(setup, layer, chunks, activations=role)
            number = sum(math.prod(row_axes(p.activation)) * positions(p.activation) for p in parts)
            name, width = f"{layer.name}, {place}", sizes[side]
            sides = [pair.augmented() for pair in parts] if number < width else []
            few = [stacked(side) for side in sides if isinstance(side, Tensor)]
            if few and len(few) == len(sides):
                joined = torch.cat(few, 1)
                check_finite(name, joined)
                thin[name] = thin_basis(joined, dtype)
            else:
                moments[name] = activation_moment(parts[0], width, diagonal=False)
                for pair in parts[1:]:
                    moments[name] += activation_moment(pair, width, diagonal=False)
    for rest in setup.layout.rests:
        if rest.rule.covered and rest.rule.full:
            name = f"{rest.params[0]}, right"
            rows = torch.cat([rows_of(rest, c.cap, setup.precision.factors) for c in chunks])[None]
            if rows.shape[1] < rows.shape[2]:
                check_finite(name, rows)
                thin[name] = thin_basis(rows, dtype)
            else:
                moments[name] = second_moment(rows, diagonal=False)
    bases = thin | {name: vectors for name, (_, vectors) in eigh_all(moments, dtype).items()}
    names = [layer.name for layer in setup.layout.layers]
    names += [rest.params[0] for rest in setup.layout.rests if rest.rule.covered]
    return {n: Basis(bases.get(f"{n}, left", ()), bases.get(f"{n}, right", ())) for n in names}


def _sides(setup: Setup, layer: Layer, chunks: Sequence[Chunk], *, activations: bool) -> list[Pair]:
    """Return the activations of a layer, with what stands behind them, or its cotangents so."""
    sides: list[Pair] = []
    for chunk in chunks:
        pairs = pairs_of(layer, chunk.cap, chunk.uses, setup.joint_bias, setup.precision.factors)
        if not activations:
            sides += [Pair(pair.cotangent, (), None) for pair in pairs]
        elif chunk.first:
            sides += pairs
    return sides

"""Bases of few vectors: the eigenvectors of X Xᵀ that X spans, found in the smaller dimension.

With fewer vectors than their length, XᵀX has rank n < d. From X̂ᵀ = Q̂ R (orthonormal columns) and
R Rᵀ = W e Wᵀ, the eigenvectors of XᵀX with eigenvalues e are Q̂ W; on the complement it is zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jdfunc.curvature.basis import Basis
from jdfunc.curvature.eigen import eigh, eigh_all
from jdfunc.curvature.factors import rows_of
from jdfunc.curvature.layout import Layer
from jdfunc.curvature.pairs import pairs_of, second_moment, with_ones
from jdfunc.curvature.passes import Chunk, Setup
from jdfunc.factored.leaves import stacked


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
    vectors: dict[str, Tensor] = {}
    for layer in setup.layout.layers:
        for side, place in enumerate(("left", "right")):
            if not layer.diagonal[side]:
                vectors[f"{layer.name}, {place}"] = _vectors(setup, layer, chunks, side)
    for rest in setup.layout.rests:
        if rest.rule.covered and rest.rule.full:
            rows = [rows_of(rest, c.cap, setup.precision.factors) for c in chunks]
            vectors[f"{rest.params[0]}, right"] = torch.cat(rows)[None]
    few = {name: x for name, x in vectors.items() if x.shape[1] < x.shape[2]}
    moments = {n: second_moment(x, diagonal=False) for n, x in vectors.items() if n not in few}
    dtype = setup.precision.eigh
    bases = {name: thin_basis(x, dtype) for name, x in few.items()}
    bases |= {name: vectors for name, (_, vectors) in eigh_all(moments, dtype).items()}
    names = [layer.name for layer in setup.layout.layers]
    names += [rest.params[0] for rest in setup.layout.rests if rest.rule.covered]
    return {n: Basis(bases.get(f"{n}, left", ()), bases.get(f"{n}, right", ())) for n in names}


def _vectors(setup: Setup, layer: Layer, chunks: Sequence[Chunk], side: int) -> Tensor:
    """Return all activations, or all cotangents, of a layer: [h, N, d]."""
    activations = layer.roles[0] == side
    parts = []
    for chunk in chunks:
        if activations and not chunk.first:
            continue
        pairs = pairs_of(layer, chunk.cap, chunk.uses, setup.joint_bias, setup.precision.factors)
        parts += [stacked(with_ones(p) if activations else p.cotangent) for p in pairs]
    return torch.cat(parts, 1)

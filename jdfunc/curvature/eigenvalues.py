"""Eigenvalues in a given basis: squares of the rotated gradients of examples.

    λ = Σ_v Σ_n (Q_Lᵀ G_vn Q_R)²,    G_vn = Σ_s left_vns ⊗ right_vns,

the diagonal of Qᵀ F Q, so that the trace is that of the exact block whatever the basis. George et
al., Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis, 2018,
arXiv:1806.03884.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jdfunc.curvature.basis import Basis
from jdfunc.curvature.capture import Captured, UseOf
from jdfunc.curvature.factors import rows_of
from jdfunc.curvature.layout import Layer, Layout
from jdfunc.curvature.pairs import Pair, pairs_of, positions_innermost, turned, with_ones
from jdfunc.factored.leaves import OneHot, Outer, Side, sum_of_outer

#: Memory of the rotated gradients that are squared at a time, in bytes: it should stay in a cache.
BLOCK_BYTES = 2**21


def eigenvalue_sums(
    layout: Layout,
    cap: Captured,
    uses: Sequence[UseOf],
    basis: Mapping[str, Basis],
    *,
    joint_bias: bool,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Sum the squared rotated gradients of every block over a chunk of examples.

    Args:
        layout: of the model.
        cap: what was captured.
        uses: what its uses are.
        basis: of every block.
        joint_bias: whether a bias shares the block of its weight.
        dtype: of the sums; that of the cotangents, float32 at least, if None.

    Returns:
        By block: λ [h, r, q].
    """
    sums: dict[str, Tensor] = {}
    for layer in layout.layers:
        pairs = pairs_of(layer, cap, uses, joint_bias, dtype)
        rotated = [
            _rotated(pair, use, basis[layer.name])
            for pair, use in zip(pairs, layer.uses, strict=True)
        ]
        sums[layer.name] = _layer_sums(layer, rotated, basis[layer.name], joint_bias)
        if layer.bias is not None and not layer.joint(joint_bias):
            added = [p.cotangent.sum(-2) for p, u in zip(rotated, layer.uses, strict=True) if u.bias]
            squares = sum(added[1:], added[0]).square().sum((0, 1))  # [h, e]
            left = layer.bias_activations() == 1
            sums[layer.bias] = squares[..., None] if left else squares[:, None]
    for rest in layout.rests:
        if rest.rule.covered:
            rows = rows_of(rest, cap, dtype)
            right = basis[rest.params[0]].right
            turned = rows if isinstance(right, tuple) else rows @ right[0].to(rows.dtype)
            sums[rest.params[0]] = turned.square().sum(0)[None, None]
    return sums


def _rotated(pair: Pair, use: UseOf, basis: Basis) -> Pair:
    """Return activations and cotangents in the bases of their sides."""
    own, other = basis[use.activations], basis[1 - use.activations]
    (a, g, one), none = pair, None
    if isinstance(other, Tensor):
        g = turned(g, other)
    if not isinstance(own, Tensor):
        return Pair(with_ones(pair), g, none)
    if isinstance(a, OneHot):
        return Pair(own.to(g.dtype)[0][a.indices], g, none)
    return Pair(turned(a, own, one), g, none)


def _layer_sums(layer: Layer, rotated: Sequence[Pair], basis: Basis, joint_bias: bool) -> Tensor:
    """Σ over examples and vectors of the squares of one layer's rotated gradient, [h, r, q]."""
    activations = [pair.activation for pair in rotated]
    if len(layer.roles) == 1 and not any(isinstance(a, OneHot) for a in activations):
        a = _joined([a for a in activations if isinstance(a, Tensor)])
        g = _joined([pair.cotangent for pair in rotated])
        squares = _squares(a, g)
        return squares if layer.roles[0] == 0 else squares.mT
    if len(layer.roles) == 1 and all(isinstance(a, OneHot) for a in activations):
        indices = torch.cat([a.indices for a in activations if isinstance(a, OneHot)], -1)
        g = _joined([pair.cotangent for pair in rotated])
        return _token_squares(indices[:, 0, 0], g, layer.matrix[1])
    return _materialised_squares(layer, rotated, basis, joint_bias)


def _squares(a: Tensor, g: Tensor) -> Tensor:
    """Return Σ_vn (Σ_s a_ns ⊗ g_vns)², [h, d, e], of [n, 1, h, s, d] and [n, V, h, s, e].

    The cheaper of three: one position; pairs of positions, Σ_st (a_s a_t) Σ_v (g_s g_t); or the
    gradients themselves, block by block.
    """
    s, vectors = a.shape[-2], g.shape[1]
    if s == 1:
        return _product(a[:, 0].square(), g.square().sum(1))
    if s * (s + 1) // 2 < vectors * (s + 8):
        first, second = torch.tril_indices(s, s, device=a.device)
        twice = torch.where(first == second, 1.0, 2.0).to(a.dtype)[:, None]
        aa = a[:, 0, :, first] * a[:, 0, :, second] * twice
        gg = g[..., first, :] * g[..., second, :]
        return _product(aa, gg.sum(1))
    return _gradient_squares(a[:, 0], g)


def _gradient_squares(a: Tensor, g: Tensor) -> Tensor:
    """Return Σ_vn (Σ_s a_ns ⊗ g_vns)² from the gradients themselves, few at a time."""
    n, vectors, h, _, e = g.shape
    size, total = h * a.shape[-1] * e * a.element_size(), None
    together = positions_innermost(g) and h == 1  # [n, V e, s] is a view: one product for all v
    step = max(1, BLOCK_BYTES // max(1, size * (vectors if together else 1)))
    for start in range(0, n, step):
        x, y = a[start : start + step], g[start : start + step]
        if together:
            rows = y.mT.flatten(1, 3)[:, None] @ x  # [n, 1, V e, d]
            squares = [rows.square().sum(0).unflatten(1, (vectors, e)).sum(1)]
        else:
            squares = [(y[:, v].mT @ x).square().sum(0) for v in range(vectors)]
        for square in squares:
            total = square if total is None else total + square
    assert total is not None
    return total.mT


def _joined(sides: list[Tensor]) -> Tensor:
    """Join the uses of a tied weight along their positions."""
    return sides[0] if len(sides) == 1 else torch.cat(sides, -2)


def _product(a: Tensor, g: Tensor) -> Tensor:
    """Return Σ_n Σ_s a_ns ⊗ g_ns, [h, d, e], of [n, h, s, d] and [n, h, s, e]."""
    x, y = (t.movedim(1, 0).flatten(1, 2) for t in (a, g))
    return x.mT @ y


def _token_squares(indices: Tensor, g: Tensor, size: int) -> Tensor:
    """Return Σ_vn (Σ_{s: tok = j} g_vns)², [1, size, e], of tokens [n, s]."""
    same = (indices[:, :, None] == indices[:, None, :]).to(g.dtype)
    squares = (g[:, :, 0] * (same[:, None] @ g[:, :, 0])).sum(1)  # [n, s, e]
    zeros = squares.new_zeros(size, squares.shape[-1])
    return zeros.index_add(0, indices.flatten(), squares.flatten(0, 1))[None]


def _materialised_squares(
    layer: Layer, rotated: Sequence[Pair], basis: Basis, joint_bias: bool
) -> Tensor:
    """Return the squares of the sum of uses in several roles, some examples at a time."""
    h, i, j = layer.block(joint_bias).shape
    r = i if isinstance(basis.left, tuple) else basis.left.shape[-1]
    q = j if isinstance(basis.right, tuple) else basis.right.shape[-1]
    like = rotated[0].cotangent
    n, vectors = like.shape[:2]
    param = like.new_zeros(()).expand(h * r, q)
    step = max(1, BLOCK_BYTES // max(1, vectors * h * r * q * like.element_size()))
    total = like.new_zeros((h, r, q))
    for start in range(0, n, step):
        outers = []
        for (a, g, _), use in zip(rotated, layer.uses, strict=True):
            a, g = _take(a, start, step), g[start : start + step]
            outers.append(Outer(a, g, param) if use.activations == 0 else Outer(g, a, param))
        total = total + sum_of_outer(tuple(outers)).square().sum((0, 1))
    return total


def _take(side: Side, start: int, step: int) -> Side:
    if isinstance(side, OneHot):
        return OneHot(side.indices[start : start + step])
    return side[start : start + step]

"""Eigenvalues in a given basis: squares of the rotated gradients of examples.

    λ = Σ_v Σ_n (Q_Lᵀ G_vn Q_R)²,    G_vn = Σ_s left_vns ⊗ right_vns,

the diagonal of Qᵀ F Q, so that the trace is that of the exact block whatever the basis. George et
al., Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis, 2018,
arXiv:1806.03884.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from jdfunc.curvature.estimate.basis import Basis
from jdfunc.curvature.estimate.capture import Captured, UseOf, outer
from jdfunc.curvature.estimate.factors import rows_of
from jdfunc.curvature.estimate.pairs import Pair, pairs_of, positions_innermost, turned, with_ones
from jdfunc.curvature.layouts.layout import Layer, Layout
from jdfunc.factored.leaves import OneHot, Side, sum_of_outer

Vectors = Tensor | tuple[()]

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
        sums[layer.name] = _layer_sums(layer, pairs, basis[layer.name], joint_bias)
        if layer.bias is not None and not layer.joint(joint_bias):
            sums[layer.bias] = _bias_sums(layer, pairs, basis[layer.name])
    for rest in layout.rests:
        if rest.rule.covered:
            rows, right = rows_of(rest, cap, dtype), basis[rest.params[0]].right
            rows = rows @ right[0].to(rows.dtype) if isinstance(right, Tensor) else rows
            sums[rest.params[0]] = rows.square().sum(0)[None, None]
    return sums


def _bias_sums(layer: Layer, pairs: Sequence[Pair], basis: Basis) -> Tensor:
    """Return λ of a bias alone, Σ_vn (Qᵀ Σ_s g)²: [h, r, 1] or [h, 1, q]."""
    added = [p.cotangent for p, added in zip(pairs, layer.biased, strict=True) if added]
    total = _joined(added).sum(-2, keepdim=True)
    on_left = layer.bias_activations() == 1
    vectors = basis.left if on_left else basis.right
    turn = turned(total, vectors) if isinstance(vectors, Tensor) else total
    squares = turn.square().sum((0, 1))  # [h, 1, r]
    return squares.mT if on_left else squares


def _layer_sums(layer: Layer, pairs: Sequence[Pair], basis: Basis, joint_bias: bool) -> Tensor:
    """Return Σ over examples and vectors of the squares of one layer's rotated gradient."""
    if len(layer.roles) == 1:
        role, activations = layer.roles[0], [pair.activation for pair in pairs]
        own, other = basis[role], basis[1 - role]
        g = _joined([pair.cotangent for pair in pairs])
        if all(isinstance(a, OneHot) for a in activations) and not isinstance(own, Tensor):
            indices = torch.cat([a.indices for a in activations if isinstance(a, OneHot)], -1)
            g = turned(g, other) if isinstance(other, Tensor) else g
            squares = _token_squares(indices[:, 0, 0], g, layer.matrix[1 + role])
            return squares if role == 0 else squares.mT
        if not any(isinstance(a, OneHot) for a in activations):
            one = pairs[0].one
            if len(pairs) > 1:
                activations, one = [with_ones(pair.activation, pair.one) for pair in pairs], None
            a = _joined([a for a in activations if isinstance(a, Tensor)])
            squares = _squares(a, g, own, other, one)
            return squares if role == 0 else squares.mT
    return _materialised_squares(
        layer,
        [_rotated(*pu, basis) for pu in zip(pairs, layer.uses, strict=True)],
        basis,
        joint_bias,
    )


def _rotated(pair: Pair, use: UseOf, basis: Basis) -> Pair:
    """Return activations and cotangents in the bases of their sides."""
    own, other = basis[use.activations], basis[1 - use.activations]
    g = turned(pair.cotangent, other) if isinstance(other, Tensor) else pair.cotangent
    a = with_ones(pair.activation, pair.one)
    if isinstance(own, Tensor):
        own = own.to(g.dtype)
        a = own[0][a.indices] if isinstance(a, OneHot) else turned(a, own)
    return Pair(a, g, None)


def _squares(a: Tensor, g: Tensor, own: Vectors, other: Vectors, one: float | None) -> Tensor:
    """Return Σ_vn (Σ_s [a_ns, 1] Q_a ⊗ g_vns Q_g)², [h, d, e], in the cheapest of three ways.

    One position: a product of squares. Few: pairs of positions, Σ_st (a_s a_t) Σ_v (g_s g_t).
    Many: the gradients themselves, where a side is rotated before or after the sum over s.

    Args:
        a: activations [n, 1, h, s, d].
        g: cotangents [n, V, h, s, e].
        own: Q_a [h, d, r], or () for the identity.
        other: Q_g [h, e, q], likewise.
        one: what stands behind every activation.

    Returns:
        The squares.
    """
    s, vectors = a.shape[-2], g.shape[1]
    few = s * (s + 1) // 2 < vectors * (s + 8)
    late_a = not few and isinstance(own, Tensor) and vectors * g.shape[-1] < s
    late_g = not few and isinstance(other, Tensor) and a.shape[-1] < s
    if not late_a and isinstance(own, Tensor):
        a, one = turned(a, own, one), None
    if not late_g and isinstance(other, Tensor):
        g = turned(g, other)
    if one is not None:
        a = torch.cat([a, torch.full_like(a[..., :1], one)], -1)
    if s == 1:
        return _product(a[:, 0].square(), g.square().sum(1))
    if few:
        first, second = torch.tril_indices(s, s, device=a.device)
        twice = torch.where(first == second, 1.0, 2.0).to(a.dtype)[:, None]
        aa = a[:, 0, :, first] * a[:, 0, :, second] * twice
        gg = g[:, 0, :, first] * g[:, 0, :, second]
        for v in range(1, vectors):  # one at a time: pairs take s / 2 times the memory of positions
            gg = gg + g[:, v, :, first] * g[:, v, :, second]
        return _product(aa, gg)

    def finish(rows: Tensor) -> Tensor:  # [n, h, e, d]
        rows = rows @ own.to(rows.dtype) if late_a and isinstance(own, Tensor) else rows
        return other.mT.to(rows.dtype) @ rows if late_g and isinstance(other, Tensor) else rows

    return _gradient_squares(a[:, 0], g, finish)


def _gradient_squares(a: Tensor, g: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
    """Return Σ_vn of the squares of ``finish(Σ_s g ⊗ a)``, some gradients at a time."""
    n, vectors, h, _, e = g.shape
    size = h * a.shape[-1] * e * a.element_size()
    together = positions_innermost(g) and h == 1  # [n, V e, s] is a view: one product for all v
    step = max(1, BLOCK_BYTES // max(1, size * (vectors if together else 1)))
    total: Tensor | None = None
    for start in range(0, n, step):
        x, y = a[start : start + step], g[start : start + step]
        if together:
            rows = [(y.mT.flatten(1, 3) @ x[:, 0]).unflatten(1, (vectors, 1, e)).flatten(0, 1)]
        else:
            rows = (y[:, v].mT @ x for v in range(vectors))
        for row in rows:
            square = finish(row).square().sum(0)
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
        outers = [
            outer((_take(a, start, step), g[start : start + step]), use, param)
            for (a, g, *_), use in zip(rotated, layer.uses, strict=True)
        ]
        total = total + sum_of_outer(tuple(outers)).square().sum((0, 1))
    return total


def _take(side: Side, start: int, step: int) -> Side:
    if isinstance(side, OneHot):
        return OneHot(side.indices[start : start + step])
    return side[start : start + step]

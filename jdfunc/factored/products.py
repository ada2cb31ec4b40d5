"""The Gramian of factored rows, in the cheaper of its two exact forms, and their row norms.

    pairwise       G_rq = Σ_hst (left_r[h,s] · left_q[h,t]) (right_r[h,s] · right_q[h,t])
    materialised   G_rq = Σ_hij row_r[h,i,j] row_q[h,i,j],  some columns j at a time

Both work in blocks of bounded memory; of a symmetric Gramian only half the blocks are computed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jdfunc.factored.leaves import (
    Factored,
    OneHot,
    Outer,
    Side,
    param_of,
    positions,
    row_axes,
    rows_shape,
    stacked,
    sum_of_outer,
    uses_of,
    widened,
)

Uses = tuple[Outer, ...]

SMALLEST_BLOCK = 64  # rows; below this, saving half of a block costs more calls than it saves


class GramCost(NamedTuple):
    """What the two forms of a Gramian cost: multiply-adds, and elements of a full temporary."""

    pairwise: int
    pairwise_elements: int
    materialised: int
    materialised_elements: int


def gram_cost(leaf: Factored, other: Factored | None = None) -> GramCost:
    """Count what each form of one parameter's Gramian costs, from static shapes alone.

    With n_l and n_r rows held on the two sides (1 where all rows share a side), m rows in all and
    s positions: pairwise takes h s² (n_l² i + n_r² j + m²) multiply-adds, materialised takes
    m s h i j to make the rows and m² h i j to multiply them. Where ``other`` is not given the
    Gramian is symmetric, and half of the products of rows with rows is saved.

    Args:
        leaf: rows of one parameter.
        other: rows of the same parameter from another batch; the same rows if not given.

    Returns:
        The count for each form.
    """
    us, vs = uses_of(leaf), uses_of(leaf if other is None else other)
    m, q, numel = math.prod(rows_shape(us[0])), math.prod(rows_shape(vs[0])), param_of(leaf).numel()
    half = 2 if other is None else 1
    pairwise = pairwise_elements = 0
    for u in us:
        for v in vs:
            h, st = u.right.shape[-3], positions(u.left) * positions(v.left)
            left, right = (
                h * st * math.prod(row_axes(x)) * math.prod(row_axes(y))
                for x, y in ((u.left, v.left), (u.right, v.right))
            )
            both = h * st * m * q
            pairwise += left * _width(u.left, v.left) + right * u.right.shape[-1] + both
            pairwise_elements += left + right + both
    made = m * sum(positions(u.left) for u in us)
    made += 0 if other is None else q * sum(positions(v.left) for v in vs)
    return GramCost(
        pairwise // half, pairwise_elements, made * numel + m * q * numel // half, (m + q) * numel
    )


def _width(x: Side, y: Side) -> int:
    return 1 if isinstance(x, OneHot) or isinstance(y, OneHot) else x.shape[-1]


def pairwise_is_cheaper(cost: GramCost) -> bool:
    """Tell which form to use."""
    return cost.pairwise <= cost.materialised


def gram(leaf: Factored, other: Factored | None, max_block_bytes: int) -> Tensor:
    """Return one parameter's Gramian of rows with rows, [m, q], in float32 at least."""
    cost = gram_cost(leaf, other)
    us, vs = widened(leaf), widened(leaf if other is None else other)
    itemsize = us[0].right.element_size()
    first = _length(us), _length(vs)
    if pairwise_is_cheaper(cost):
        per_pair = max(1, cost.pairwise_elements * itemsize // max(1, first[0] * first[1]))
        block = max(1, math.isqrt(max_block_bytes // per_pair))

        def products(a: slice, b: slice) -> Tensor:
            return _pairwise(_take(us, a, first[0]), _take(vs, b, first[1]))

        return by_blocks(products, *first, block, symmetric=other is None)
    width = us[0].right.shape[-1]
    step = max(1, max_block_bytes * width // max(1, cost.materialised_elements * itemsize))
    total = us[0].right.new_zeros(())
    for start in range(0, width, step):
        columns = slice(start, start + step)
        x = _materialised(us, columns)
        y = x if other is None else _materialised(vs, columns)
        total = total + product(x, y, symmetric=other is None)
    return total


def product(x: Tensor, y: Tensor, *, symmetric: bool) -> Tensor:
    """Return x yᵀ for [m, n] and [q, n]; if symmetric, from half of its blocks."""
    return by_blocks(
        lambda a, b: x[a] @ y[b].mT, x.shape[0], y.shape[0], x.shape[0], symmetric=symmetric
    )


def by_blocks(
    products: Callable[[slice, slice], Tensor], m: int, q: int, block: int, *, symmetric: bool
) -> Tensor:
    """Assemble a matrix from blocks of at most ``block`` rows and columns of its index.

    A symmetric matrix is cut in four at least, where that leaves `SMALLEST_BLOCK` rows, so that
    the blocks above its diagonal, copied from those below, save work.
    """
    if symmetric:
        block = min(block, max(SMALLEST_BLOCK, -(-m // 4)))
    down = [slice(k, min(k + block, m)) for k in range(0, m, block)]
    if not symmetric:
        across = [slice(k, min(k + block, q)) for k in range(0, q, block)]
        return torch.cat([torch.cat([products(a, b) for b in across], 1) for a in down])
    if len(down) == 1:
        return products(down[0], down[0])
    half = [[products(a, b) for b in down[: k + 1]] for k, a in enumerate(down)]
    rows = [
        [half[k][n] if n <= k else half[n][k].mT for n in range(len(down))]
        for k in range(len(down))
    ]
    return torch.cat([torch.cat(row, 1) for row in rows])


def _length(uses: Uses) -> int:
    shape = rows_shape(uses[0])
    return shape[0] if shape else 1


def _take(uses: Uses, block: slice, length: int) -> Uses:
    """Return the uses for a block of the first row axis."""

    def take(side: Side) -> Side:
        if not row_axes(side) or row_axes(side)[0] != length:
            return side
        return OneHot(side.indices[block]) if isinstance(side, OneHot) else side[block]

    if block == slice(0, length):
        return uses
    return tuple(u._replace(left=take(u.left), right=take(u.right)) for u in uses)


def _materialised(uses: Uses, columns: slice) -> Tensor:
    """Return some columns j of the rows as a matrix, [m, h·i·columns]."""
    rows = sum_of_outer(tuple(u._replace(right=u.right[..., columns]) for u in uses))
    return rows.reshape(math.prod(rows_shape(uses[0])), -1)


def _pairwise(us: Uses, vs: Uses) -> Tensor:
    """Σ over pairs of uses of Σ_hst (left · left)(right · right), [m, q]."""
    m, q = math.prod(rows_shape(us[0])), math.prod(rows_shape(vs[0]))
    total = us[0].right.new_zeros(())
    for u in us:
        for v in vs:
            products = _inner(u.left, v.left) * _inner(u.right, v.right)
            total = total + products.sum((0, u.right.ndim - 2, -1)).reshape(m, q)
    return total


def _inner(x: Side, y: Side) -> Tensor:
    """Return inner products of the vectors of two sides, [h, *rows of x, s, *rows of y, t]."""
    match x, y:
        case OneHot(), OneHot():
            products = x.indices.flatten()[:, None] == y.indices.flatten()
        case OneHot(), Tensor():
            products = stacked(y)[0].mT[x.indices.flatten()]
        case Tensor(), OneHot():
            products = stacked(x)[0].mT[y.indices.flatten()].mT
        case _:
            assert isinstance(x, Tensor)
            assert isinstance(y, Tensor)
            products = stacked(x) @ stacked(y).mT
    shape = (-1, *row_axes(x), positions(x), *row_axes(y), positions(y))
    if products.numel() == 0:
        return products.reshape(1, *shape[1:])
    return products.reshape(shape)


def squared_norms(leaf: Factored) -> Tensor:
    """Return |row_r|² for every row, [*rows]: the diagonal of the Gramian without the rest."""
    uses = widened(leaf)
    total = uses[0].right.new_zeros(())
    for u in uses:
        for v in uses:
            products = _own_inner(u.left, v.left) * _own_inner(u.right, v.right)
            total = total + products.sum((-3, -2, -1))
    return total.expand(rows_shape(leaf))


def _own_inner(x: Side, y: Side) -> Tensor:
    """Return inner products of the vectors of each row with its own, [*rows, h, s, t]."""
    match x, y:
        case OneHot(), OneHot():
            return x.indices[..., :, None] == y.indices[..., None, :]
        case OneHot(), Tensor():
            return _gathered(y, x.indices).mT
        case Tensor(), OneHot():
            return _gathered(x, y.indices)
        case _:
            assert isinstance(x, Tensor)
            assert isinstance(y, Tensor)
            return x @ y.mT


def _gathered(side: Tensor, indices: Tensor) -> Tensor:
    """Return side[..., s, indices[..., t]], [*rows, h, s, t]."""
    rows = torch.broadcast_shapes(side.shape[:-2], indices.shape[:-1])
    index = indices.expand(*rows, indices.shape[-1])[..., None, :]
    index = index.expand(*rows, side.shape[-2], indices.shape[-1])
    return side.expand(*rows, *side.shape[-2:]).gather(-1, index)

"""The Gramian of factored rows, in the cheaper of its two exact forms, and their row norms.

    pairwise       G_rq = Σ_hst (left_r[h,s] · left_q[h,t]) (right_r[h,s] · right_q[h,t])
    materialised   G_rq = Σ_hij row_r[h,i,j] row_q[h,i,j],  some columns j at a time

Both work in blocks of bounded memory; of a symmetric Gramian only half the blocks are computed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
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

#: How many multiply-adds take as long as moving one element to or from memory; about the same for
#: CPUs and GPUs (20 measured in float32 on a CPU core, 28 by the data sheet of an H200).
MULTIPLY_ADDS_PER_ELEMENT = 20

#: A symmetric product of fewer vectors is not worth cutting into strips; in two, of wide rows.
SMALLEST_STRIPS, SMALLEST_HALVES, WIDE = 256, 64, 4096


class GramCost(NamedTuple):
    """What one form of a Gramian costs: multiply-adds, and elements of temporaries if unblocked."""

    multiply_adds: int
    elements: int

    @property
    def total(self) -> int:
        """Arithmetic and memory traffic, in multiply-adds; a temporary is written and read."""
        return self.multiply_adds + 2 * MULTIPLY_ADDS_PER_ELEMENT * self.elements


def gram_cost(leaf: Factored, other: Factored | None = None) -> tuple[GramCost, GramCost]:
    """Count what each form of one parameter's Gramian costs, from static shapes alone.

    With n_l and n_r rows held on the two sides (1 where all rows share a side), m rows in all and
    s positions: pairwise takes h s² (n_l² i + n_r² j + m²) multiply-adds and writes h s² (n_l² +
    n_r² + m²) elements; materialised takes m s h i j to make the rows, m² h i j to multiply them,
    and writes m h i j. Where ``other`` is not given, strips of the symmetric pairwise form save
    three eighths.

    Args:
        leaf: rows of one parameter.
        other: rows of the same parameter from another batch; the same rows if not given.

    Returns:
        The costs of the pairwise and of the materialised form.
    """
    us, vs = uses_of(leaf), uses_of(leaf if other is None else other)
    m, q, numel = math.prod(rows_shape(us[0])), math.prod(rows_shape(vs[0])), param_of(leaf).numel()
    work = elements = 0
    for u in us:
        for v in vs:
            h, st = u.right.shape[-3], positions(u.left) * positions(v.left)
            left, right = (
                h * st * math.prod(row_axes(x)) * math.prod(row_axes(y))
                for x, y in ((u.left, v.left), (u.right, v.right))
            )
            both = h * st * m * q
            work += left * _width(u.left, v.left) + right * u.right.shape[-1] + both
            elements += left + right + both
    if other is None and m * positions(us[0].left) >= SMALLEST_STRIPS:
        work, elements = 5 * work // 8, 5 * elements // 8
    made = m * sum(positions(u.left) for u in us)
    made += 0 if other is None else q * sum(positions(v.left) for v in vs)
    rows = m if other is None else m + q
    return GramCost(work, elements), GramCost((made + m * q) * numel, rows * numel)


def _width(x: Side, y: Side) -> int:
    return 1 if isinstance(x, OneHot) or isinstance(y, OneHot) else x.shape[-1]


def gram(leaf: Factored, other: Factored | None, max_block_bytes: int) -> Tensor:
    """Return one parameter's Gramian of rows with rows, [m, q], in float32 at least."""
    pairwise, materialised = gram_cost(leaf, other)
    us, vs = widened(leaf), widened(leaf if other is None else other)
    itemsize = us[0].right.element_size()
    if pairwise.total <= materialised.total:
        m, q = _length(us), _length(vs)
        per_cell = max(1, pairwise.elements * itemsize // max(1, m * q))

        def products(a: slice, b: slice) -> Tensor:
            return _pairwise(_take(us, a, m), _take(vs, b, q))

        strips = 4 if m * positions(us[0].left) >= SMALLEST_STRIPS else 1
        cells = max(1, max_block_bytes // per_cell)
        return by_blocks(products, m, q, cells, symmetric=other is None, strips=strips)
    width = us[0].right.shape[-1]
    step = max(1, max_block_bytes * width // max(1, materialised.elements * itemsize))
    blocks = []
    for columns in _spans(width, step):
        x = _materialised(us, columns)
        y = x if other is None else _materialised(vs, columns)
        blocks.append(product(x, y, symmetric=other is None))
    return sum(blocks[1:], blocks[0])


def product(x: Tensor, y: Tensor, *, symmetric: bool) -> Tensor:
    """Return x yᵀ for [m, n] and [q, n]; if symmetric, little more than half of it is computed."""
    m, q = x.shape[0], y.shape[0]
    halves = 2 if m >= SMALLEST_HALVES and x.shape[1] >= WIDE else 1
    strips = 4 if m >= SMALLEST_STRIPS else halves
    return by_blocks(lambda a, b: x[a] @ y[b].mT, m, q, m * q, symmetric=symmetric, strips=strips)


def by_blocks(
    products: Callable[[slice, slice], Tensor],
    m: int,
    q: int,
    cells: int,
    *,
    symmetric: bool,
    strips: int,
) -> Tensor:
    """Assemble a matrix from blocks of at most ``cells`` of its m·q cells.

    A symmetric matrix is computed in strips, each up to the diagonal: of four, five eighths of the
    work.

    Args:
        products: gives the block of some rows and some columns.
        m: number of rows.
        q: number of columns.
        cells: of one block, at most.
        symmetric: whether the matrix is.
        strips: in how many strips to cut it at least, if it is symmetric.

    Returns:
        The matrix, [m, q].
    """
    down = max(1, -(-m // strips) if symmetric else m)
    across = max(1, q)
    if cells < m * q:
        down = min(down, max(1, math.isqrt(cells)))
        across = max(1, cells // down)

    def strip(rows: slice) -> Tensor:
        end = rows.stop if symmetric else q
        blocks = [products(rows, columns) for columns in _spans(end, across)]
        return torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]

    rows = [strip(span) for span in _spans(m, down)]
    if len(rows) == 1:
        return rows[0]
    if not symmetric:
        return torch.cat(rows)
    full = rows[-1].shape[1]  # a row of a block may be several
    lower = torch.cat([F.pad(row, (0, full - row.shape[1])) for row in rows]).tril()
    return lower + lower.tril(-1).mT


def _spans(total: int, step: int) -> list[slice]:
    """Cut a range into slices: a compiled function is tied to how many there are, not to it."""
    count = max(1, -(-total // step))
    ends = [*(k * step for k in range(1, count)), total]
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


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
    blocks = []
    for u in us:
        for v in vs:
            products = _inner(u.left, v.left) * _inner(u.right, v.right)
            blocks.append(products.sum((0, u.right.ndim - 2, -1)).reshape(m, q))
    return sum(blocks[1:], blocks[0])


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

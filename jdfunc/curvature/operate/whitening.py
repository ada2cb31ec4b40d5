"""Whitened rows: rows whose plain Gramian is J f(F) Jᵀ, block by block.

Rows of a product S_L ⊗ S_R stay factored: Σ_s (S_L^½ l_s) ⊗ (S_R^½ r_s). In the bases of other
blocks rows are materialised, some columns at a time. What a thin basis leaves out, M − Q Qᵀ M, is
the sum of two orthogonal parts that are factored where M is,

    Σ_s l_s ⊗ r_s − Σ_s (P l_s) ⊗ (P r_s) = Σ_s (l_s − P l_s) ⊗ r_s + Σ_s (P l_s) ⊗ (r_s − P r_s),

so that nothing cancels, and the Gramian is positive semidefinite however small the damping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.curvature.blocks import Block, Shape, matrix_of
from jdfunc.curvature.operate.parts import Elementwise, Part, Product, is_thin
from jdfunc.curvature.operate.parts import Side as RootSide
from jdfunc.factored import leaves as factored
from jdfunc.factored.leaves import Factored, OneHot, Outer, Side, Tied

#: Rows of a block: dense, [*rows, h, i, j], or the uses that sum to them.
BlockRows = Tensor | tuple[Outer, ...]


def whitened(
    part: Part, rows: tuple[BlockRows, ...], max_block_bytes: int
) -> Iterator[tuple[Any, ...]]:
    """The leaves whose Gramians sum to that of the block, one after the other.

    Args:
        part: the block of f(F), not negative.
        rows: one or more trees' rows of the block.
        max_block_bytes: bound on the memory of the materialised columns of one leaf, in bytes.

    Yields:
        For each of ``rows``, a leaf: dense [*rows, h, i, j], or factored.
    """
    if isinstance(part, Product):
        yield tuple(_leaf(_scaled_sides(part, of_tree)) for of_tree in rows)
        return
    scale = part.values.sqrt()
    turned = tuple(_on_left(rotation(part.left), of_tree) for of_tree in rows)
    for columns in _column_blocks(part, rows, max_block_bytes):
        basis = None if part.right is None else part.right[..., columns]
        own = slice(None) if basis is not None else columns
        yield tuple(
            scale[..., columns] * _dense(_on_right(rotation(basis), of_tree, own))
            for of_tree in turned
        )
    if part.outside is None:
        return
    outer = part.outside.sqrt()[..., None, None]
    *_, i, j = rows_shape_of(rows[0])
    if is_thin(part.left, i):
        rest = complement(part.left)
        yield tuple(_leaf(_times(outer, _on_left(rest, of_tree))) for of_tree in rows)
    if is_thin(part.right, j):
        rest = complement(part.right)
        yield tuple(_leaf(_times(outer, _on_right(rest, of_tree))) for of_tree in turned)


# ------------------------------------------------------------------- the rows of a block, jointly


def block_rows(
    block: Block, named: Mapping[str, Any], row_ndim: int, dtype: torch.dtype
) -> BlockRows:
    """The rows of all parameters of a block: factored where those of its matrices are.

    A joint bias is one more position, [G | b] = Σ_s l_s ⊗ [r_s; 0] + b ⊗ [0; 1].

    Args:
        block: the block.
        named: rows by name, dense [*rows, *param.shape] or factored.
        row_ndim: how many leading axes of a dense leaf are row axes.
        dtype: to compute in.

    Returns:
        Rows of M [h, i, j].

    Raises:
        ValueError: a leaf has another number of row axes, or another shape behind them.
    """
    for name, shape in zip(block.params, block.shapes, strict=True):
        _check_row_axes(name, shape, named[name], row_ndim)
    parts = [
        _part_uses(named[name], part, block.axis, row_ndim, dtype)
        for name, part in zip(block.params, block.parts, strict=True)
    ]
    dense = all(isinstance(named[name], Tensor) for name in block.params)
    if dense or any(own is None for own in parts):
        return matrix_of(block, {name: _dense_leaf(named[name], dtype) for name in block.params})
    uses: list[Outer] = []
    start = 0
    for own, part in zip(parts, block.parts, strict=True):
        for use in own or ():
            _append(uses, _padded(use, block, part, start))
        start += part[block.axis]
    return tuple(uses)


def _check_row_axes(name: str, shape: Shape, leaf: Any, row_ndim: int) -> None:
    dense = isinstance(leaf, Tensor)
    axes = leaf.ndim - len(shape) if dense else len(factored.rows_shape(leaf))
    if axes != row_ndim or (dense and leaf.shape[axes:] != shape):
        found = tuple(leaf.shape) if dense else f"factored rows {tuple(factored.rows_shape(leaf))}"
        raise ValueError(
            f"expected rows of {name!r} with {row_ndim} row axes in front of {tuple(shape)}, got "
            f"{found}; say how many there are by row_ndim="
        )


def _part_uses(
    leaf: Any, part: Shape, axis: int, row_ndim: int, dtype: torch.dtype
) -> tuple[Outer, ...] | None:
    """The rows of one part as uses [h, i, j]; None where that does not fit."""
    h, i, j = part
    if isinstance(leaf, Tensor):
        if part[axis] != 1:
            return None
        vectors = leaf.reshape(*leaf.shape[:row_ndim], *part).to(dtype)
        one = vectors.new_ones(*(1 for _ in range(row_ndim)), h, 1, 1)
        left, right = (vectors.mT, one) if axis == -1 else (one, vectors)
        return (Outer(left, right, like_part(vectors, part)),)
    uses = []
    for use in factored.uses_of(leaf):
        left, right = use.left, use.right.to(dtype)
        if factored.positions(left) == 0:  # no use: a sum of nothing, of any shape
            rows = factored.rows_shape(use)
            left, right = right.new_zeros(*rows, h, 0, i), right.new_zeros(*rows, h, 0, j)
        param = like_part(right, part)
        if isinstance(left, Tensor):
            left = left.to(dtype)
        if (right.shape[-3], _width(left, use.param), right.shape[-1]) != part:
            return None
        uses.append(Outer(left, right, param))
    return tuple(uses)


def _padded(use: Outer, block: Block, part: Shape, start: int) -> Outer:
    """A use of one part as one of the whole block."""
    h, i, j = block.shape
    if (h, i, j) == part:
        return use
    param = like_part(use.right, block.shape)
    if block.axis == -1:
        return Outer(use.left, F.pad(use.right, (start, j - start - part[-1])), param)
    if isinstance(use.left, OneHot):
        return Outer(OneHot(use.left.indices + start), use.right, param)
    return Outer(F.pad(use.left, (start, i - start - part[-2])), use.right, param)


def _append(uses: list[Outer], use: Outer) -> None:
    joined = factored.concatenate(uses[-1], use) if uses else None
    if joined is None:
        uses.append(use)
    else:
        uses[-1] = joined


def like_part(tensor: Tensor, part: Shape) -> Tensor:
    """A parameter of the shape of a matrix [h, i, j], of one element: it tells sizes alone."""
    h, i, j = part
    return tensor.new_zeros(()).expand(h * i, j)


def _dense_leaf(leaf: Any, dtype: torch.dtype) -> Tensor:
    return (leaf if isinstance(leaf, Tensor) else factored.materialise(leaf)).to(dtype)


# ------------------------------------------------------------- functions of the two sides of rows

Turn = Callable[[Side], Side]


def rotation(basis: Tensor | None) -> Turn:
    """The function x ↦ Qᵀ x of vectors along the last axis."""

    def turn(side: Side) -> Side:
        if basis is None:
            return side
        return basis[0][side.indices] if isinstance(side, OneHot) else side @ basis

    return turn


def complement(basis: Tensor | None) -> Turn:
    """The function x ↦ x − Q Qᵀ x of vectors along the last axis."""
    assert basis is not None

    def turn(side: Side) -> Side:
        inside = rotation(basis)(side)
        assert isinstance(inside, Tensor)
        return _vectors(side, basis.shape[-2], inside.dtype) - inside @ basis.mT

    return turn


def _scaled_sides(part: Product, rows: BlockRows) -> BlockRows:
    rows = _on_right(_root(part.right), rows)
    if isinstance(rows, Tensor) or part.left.basis is not None:
        return _on_left(_root(part.left), rows)
    scale = part.left.values.sqrt()
    return tuple(
        use._replace(right=use.right * scale[0][use.left.indices][..., None])
        if isinstance(use.left, OneHot)
        else use._replace(left=use.left * scale[..., None, :])
        for use in rows
    )


def _root(side: RootSide) -> Turn:
    """A function of vectors x with the inner products of S^½ x."""
    scale = side.values.sqrt()[..., None, :]

    def turn(x: Side) -> Side:
        inside = rotation(side.basis)(x)
        assert isinstance(inside, Tensor)
        if side.outside is None or side.basis is None:
            return inside * scale
        rest = complement(side.basis)(x)
        assert isinstance(rest, Tensor)
        return (inside * scale) @ side.basis.mT + side.outside.sqrt()[..., None, None] * rest

    return turn


def _on_left(turn: Turn, rows: BlockRows) -> BlockRows:
    if not isinstance(rows, Tensor):
        return tuple(_resized(use._replace(left=turn(use.left))) for use in rows)
    turned = turn(rows.mT)
    assert isinstance(turned, Tensor)
    return turned.mT


def _on_right(turn: Turn, rows: BlockRows, columns: slice = slice(None)) -> BlockRows:
    if not isinstance(rows, Tensor):
        turned = [turn(use.right[..., columns]) for use in rows]
        uses = zip(rows, turned, strict=True)
        return tuple(_resized(use._replace(right=right)) for use, right in uses)
    turned = turn(rows[..., columns])
    assert isinstance(turned, Tensor)
    return turned


def _times(scale: Tensor, rows: BlockRows) -> BlockRows:
    if isinstance(rows, Tensor):
        return scale * rows
    return tuple(use._replace(right=scale * use.right) for use in rows)


def _resized(use: Outer) -> Outer:
    part = (use.right.shape[-3], _width(use.left, use.param), use.right.shape[-1])
    return use._replace(param=like_part(use.right, part))


def _width(left: Side, param: Tensor) -> int:
    return param.shape[0] if isinstance(left, OneHot) else left.shape[-1]


def _vectors(side: Side, size: int, dtype: torch.dtype) -> Tensor:
    return F.one_hot(side.indices, size).to(dtype) if isinstance(side, OneHot) else side


def _leaf(rows: BlockRows) -> Tensor | Factored:
    if isinstance(rows, Tensor):
        return rows
    return rows[0] if len(rows) == 1 else Tied(rows)


def _dense(rows: BlockRows) -> Tensor:
    return rows if isinstance(rows, Tensor) else factored.sum_of_outer(rows)


def rows_shape_of(rows: BlockRows) -> tuple[int, ...]:
    """The shape [*rows, h, i, j] of the rows of a block."""
    if isinstance(rows, Tensor):
        return tuple(rows.shape)
    shape = torch.broadcast_shapes(*(factored.rows_shape(use) for use in rows))
    use = rows[0]
    return (*shape, use.right.shape[-3], _width(use.left, use.param), use.right.shape[-1])


def _column_blocks(
    part: Elementwise, rows: tuple[BlockRows, ...], max_block_bytes: int
) -> Iterator[slice]:
    """Slices of the columns of the values, of bounded memory."""
    count = sum(math.prod(rows_shape_of(of_tree)[:-3]) for of_tree in rows)
    h, r, q = part.values.shape
    step = max(1, max_block_bytes // max(1, count * h * r * part.values.element_size()))
    return (slice(start, min(start + step, q)) for start in range(0, max(1, q), step))

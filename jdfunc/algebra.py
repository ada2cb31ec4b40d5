"""The algebra of rows: G = J Jᵀ, Jᵀ w and row norms, for a Jacobian held as a pytree.

A pytree of rows looks like the params. Each leaf is dense, [*rows, *param.shape], or factored
(`jdfunc.factored`), and every function here takes either.
"""

import math
from typing import Any

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.factored import leaves as factored
from jdfunc.factored import products
from jdfunc.types import Metric, Params, Rows

#: Temporary memory of one block of a Gramian, in bytes.
MAX_BLOCK_BYTES = 2**26


def is_rows(node: Any) -> bool:
    """Tell whether a node of a pytree of rows is a leaf: a tensor, or factored rows."""
    return isinstance(node, (Tensor, factored.Outer, factored.Tied))


def leaf_rows_shape(leaf: Any, row_ndim: int) -> torch.Size:
    """Return the shape of the rows of a leaf, [*rows]."""
    return leaf.shape[:row_ndim] if isinstance(leaf, Tensor) else factored.rows_shape(leaf)


def gram(
    rows: Rows,
    other: Rows | None = None,
    metric: Metric | None = None,
    *,
    row_ndim: int = 1,
    max_block_bytes: int = MAX_BLOCK_BYTES,
) -> Tensor:
    """Gramian of rows with rows: G = J₁ F⁻¹ J₂ᵀ, the sum over leaves of their inner products.

    Args:
        rows: J₁, a pytree of rows: dense leaves [*rows, *param.shape], or factored ones.
        other: J₂, of the same structure, rows of another batch or model. J₁ itself if None.
        metric: F⁻¹ as a function of a pytree like the params; the identity if None. Rows are
            materialised to apply it, unless it is a `RowMetric`, with a ``gram`` of its own.
        row_ndim: how many leading axes of a dense leaf are row axes; factored leaves know theirs.
        max_block_bytes: bound on the memory of one block of temporaries, in bytes.

    Returns:
        G, shape [*rows, *reversed(rows of other)]: the second half of its axes is reversed, as in
        torchjd; [m, m] for a vector of losses. Accumulated in float32 at least, whatever the dtype
        of the rows. Units loss²/param².

    Raises:
        ValueError: no leaf to tell the number of rows, or two trees that do not match.

    Cost: m² n multiply-adds for dense leaves; for factored leaves the cheaper of two exact forms
    (`jdfunc.plan` prints which). Half of that if ``other`` is None.

    Example:
        >>> J = {"w": torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "b": torch.tensor([1.0, -1.0])}
        >>> gram(J)
        tensor([[6., 1.],
                [1., 2.]])
    """
    of_rows = getattr(metric, "gram", None)
    if of_rows is not None:
        return of_rows(rows, other, row_ndim=row_ndim, max_block_bytes=max_block_bytes)
    if metric is not None:
        whitened = _each_row(metric, to_dense(rows), row_ndim)
        other = to_dense(rows if other is None else other)
        return gram(whitened, other, row_ndim=row_ndim, max_block_bytes=max_block_bytes)
    mine, theirs = pytrees.leaves(rows, is_rows), None
    if not mine:
        raise ValueError("expected rows with at least one leaf, got an empty pytree")
    if other is not None:
        theirs = pytrees.leaves(other, is_rows)
        if not pytrees.same_structure(rows, other, is_rows):
            raise ValueError("expected two pytrees of rows of the same structure")
    total: Tensor | None = None
    with _no_autocast(mine):
        for k, leaf in enumerate(mine):
            other_leaf = None if theirs is None else theirs[k]
            block = _leaf_gram(leaf, other_leaf, row_ndim, max_block_bytes)
            total = block if total is None else total + block
    assert total is not None
    down = leaf_rows_shape(mine[0], row_ndim)
    across = down if theirs is None else leaf_rows_shape(theirs[0], row_ndim)
    return reversed_half(total, down, across)


def reversed_half(matrix: Tensor, down: torch.Size, across: torch.Size) -> Tensor:
    """Return a matrix [m, q] as the generalised Gramian [*down, *reversed(across)]."""
    grid = matrix.reshape((*down, *across))
    n, k = len(down), len(across)
    return grid.permute((*range(n), *range(n + k - 1, n - 1, -1)))


def _no_autocast(leaves: list[Any]) -> torch.autocast:
    """A context in which products of float32 rows are not rounded to half precision."""
    tensors = pytrees.leaves(leaves[:1])
    return torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False)


def _leaf_gram(leaf: Any, other: Any, row_ndim: int, max_block_bytes: int) -> Tensor:
    if not isinstance(leaf, Tensor) and not isinstance(other, Tensor):
        return products.gram(leaf, other, max_block_bytes)
    x = _matrix(leaf, row_ndim)
    y = x if other is None else _matrix(other, row_ndim)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"expected rows of the same parameter, got rows of {x.shape[1]} and {y.shape[1]} "
            "elements"
        )
    return products.product(x, y, symmetric=other is None)


def _matrix(leaf: Any, row_ndim: int) -> Tensor:
    """Return the rows of a leaf as a matrix [m, n], in the dtype to accumulate in."""
    dense = leaf if isinstance(leaf, Tensor) else factored.materialise(leaf)
    m = math.prod(leaf_rows_shape(leaf, row_ndim))
    n = dense.numel() // m if m else 0
    return dense.reshape(m, n).to(torch.promote_types(dense.dtype, torch.float32))


def gram_blocks(
    rows: Rows, other: Rows | None = None, *, row_ndim: int = 1, max_block_bytes: int = 2**26
) -> Any:
    """Gramian of each parameter on its own: a pytree like the params, whose sum is `gram`.

    For a Gramian of each group of parameters, give `gram` the part of the tree that holds them.

    Args:
        rows: J₁, a pytree of rows.
        other: J₂, of the same structure; J₁ itself if None.
        row_ndim: how many leading axes of a dense leaf are row axes.
        max_block_bytes: bound on the memory of one block of temporaries, in bytes.

    Returns:
        A pytree like the params of Gramians [*rows, *reversed(rows of other)].

    Example:
        >>> gram_blocks({"w": torch.eye(2), "b": torch.tensor([1.0, -1.0])})["b"]
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """

    def one(leaf: Any, *rest: Any) -> Tensor:
        return gram(leaf, *rest, row_ndim=row_ndim, max_block_bytes=max_block_bytes)

    return pytrees.map(one, rows, *(() if other is None else (other,)), is_leaf=is_rows)


def combine(rows: Rows, weights: Tensor) -> Params:
    """Jᵀ w: the sum of the rows, each with its weight.

    Args:
        rows: J, a pytree of rows: dense leaves [*rows, *param.shape], or factored ones.
        weights: w, shape [*rows].

    Returns:
        A pytree like the params, in their dtypes; accumulated in float32 at least.

    Raises:
        ValueError: weights do not have the shape of the rows.

    Cost: m n multiply-adds for dense leaves, m s n for factored ones; no backward pass.

    Example:
        >>> combine({"w": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, torch.tensor([1.0, 3.0]))
        {'w': tensor([1., 5.])}
    """

    def one(leaf: Any) -> Tensor:
        shape = leaf_rows_shape(leaf, weights.ndim)
        if shape != weights.shape:
            raise ValueError(
                f"expected weights of the shape of the rows, {tuple(shape)}, got "
                f"{tuple(weights.shape)}"
            )
        if not isinstance(leaf, Tensor):
            return factored.combine(leaf, weights)
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        return torch.tensordot(weights.to(dtype), leaf.to(dtype), weights.ndim).to(leaf.dtype)

    with _no_autocast(pytrees.leaves(rows, is_rows)):
        return pytrees.map(one, rows, is_leaf=is_rows)


def to_dense(rows: Rows) -> Rows:
    """Return the pytree of rows with every leaf dense, [*rows, *param.shape]: for debugging.

    Args:
        rows: a pytree of rows, dense or factored.

    Returns:
        The same rows, of m·n elements in all.
    """
    return pytrees.map(
        lambda leaf: leaf if isinstance(leaf, Tensor) else factored.materialise(leaf),
        rows,
        is_leaf=is_rows,
    )


def row_norms(rows: Rows, *, row_ndim: int = 1) -> Tensor:
    """Euclidean norm of every row: per-example gradient norms, without the Gramian.

    Args:
        rows: J, a pytree of rows: dense leaves [*rows, *param.shape], or factored ones.
        row_ndim: how many leading axes of a dense leaf are row axes.

    Returns:
        |g_r|, shape [*rows], in float32 at least. Units loss/param.

    Raises:
        ValueError: the pytree is empty.

    Example:
        >>> row_norms({"w": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([4.0, 1.0])})
        tensor([5., 1.])
    """
    squares = [_squared_norms(leaf, row_ndim) for leaf in pytrees.leaves(rows, is_rows)]
    if not squares:
        raise ValueError("expected rows with at least one leaf, got an empty pytree")
    return sum(squares[1:], squares[0]).sqrt()


def _squared_norms(leaf: Any, row_ndim: int) -> Tensor:
    """Return the squared norms of the rows of one leaf, [*rows]."""
    if not isinstance(leaf, Tensor):
        return products.squared_norms(leaf)
    return _matrix(leaf, row_ndim).square().sum(-1).reshape(leaf.shape[:row_ndim])


def _each_row(metric: Metric, rows: Rows, row_ndim: int) -> Rows:
    """Apply F⁻¹ to every row of a dense tree."""
    for _ in range(row_ndim):
        metric = torch.func.vmap(metric)
    return metric(rows)

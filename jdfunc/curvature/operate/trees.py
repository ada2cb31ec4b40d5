"""Trees shaped like the params, block by block: what a block-diagonal matrix is applied to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.curvature.blocks import Block, Shape, matrix_of, params_of


def map_blocks(fn: Callable[[Block, Tensor], Tensor], layout: Sequence[Block], tree: Any) -> Any:
    """Apply a function of the matrix of each block.

    Args:
        fn: ``(block, matrix [*columns, h, i, j]) -> matrix``.
        layout: the blocks.
        tree: a pytree like the params, leaves [*columns, *param.shape].

    Returns:
        A pytree of the same structure and dtypes.

    Raises:
        ValueError: the tree does not hold the parameters of the blocks.
        TypeError: a leaf is no floating-point tensor.
    """
    leaves, restore = pytrees.flatten(tree)
    named = dict(zip(pytrees.names(tree), leaves, strict=True))
    check_columns(layout, named)
    with unrounded(leaves):
        mapped = map_named(fn, layout, named)
    return restore([mapped[name].to(leaf.dtype) for name, leaf in named.items()])


def map_named(
    fn: Callable[[Block, Tensor], Tensor], layout: Sequence[Block], named: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`map_blocks` on tensors by name, which keep the dtype that the function returns."""
    mapped: dict[str, Tensor] = {}
    for block in layout:
        mapped |= params_of(block, fn(block, matrix_of(block, named)))
    return mapped


def check_names(layout: Sequence[Block], names: Sequence[str]) -> None:
    """Check that the blocks cover the parameters.

    Args:
        layout: the blocks.
        names: of the leaves of a tree.

    Raises:
        ValueError: a parameter is missing, or belongs to no block.
    """
    covered = [name for block in layout for name in block.params]
    missing = [name for name in covered if name not in names]
    unknown = [name for name in names if name not in covered]
    if missing or unknown:
        what = [f"without {missing[:5]}"] if missing else []
        what += [f"with {unknown[:5]}, which no block covers"] if unknown else []
        raise ValueError(
            f"expected a pytree like the params of the curvature, got one {' and '.join(what)}"
        )


def check_columns(layout: Sequence[Block], named: Mapping[str, Any]) -> None:
    """Check the leaves of a tree: names, kinds, shapes, and column axes that all of them share."""
    check_names(layout, list(named))
    found: set[Shape] = set()
    for block in layout:
        for name, shape in zip(block.params, block.shapes, strict=True):
            leaf = named[name]
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(f"expected floating-point tensors, got {kind} at {name!r}")
            columns = leaf.ndim - len(shape)
            if columns < 0 or leaf.shape[columns:] != shape:
                raise ValueError(
                    f"expected {name!r} of shape [*columns, *{shape}], got {tuple(leaf.shape)}"
                )
            found.add(tuple(leaf.shape[:columns]))
    if len(found) > 1:
        raise ValueError(
            f"expected the same column axes on every leaf, got {sorted(found)}: leaves are "
            "[*columns, *param.shape]"
        )


def unrounded(tensors: Sequence[Tensor]) -> torch.autocast:
    """A context in which products are not rounded to half precision."""
    return torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False)

"""Powers of F, prepared once: what eigenvalues are raised to, a metric, an inverse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdfunc import algebra, pytrees
from jdfunc.curvature.blocks import Block, Factors, Spectrum
from jdfunc.curvature.eigen import eigh_all
from jdfunc.curvature.operate.damping import Damping, PerBlock
from jdfunc.curvature.operate.parts import Part, applied, dtype_of, part_of, widened
from jdfunc.curvature.operate.trees import check_names, map_blocks, unrounded
from jdfunc.curvature.operate.whitening import block_rows, whitened
from jdfunc.types import Params, Rows


class Power(NamedTuple):
    """(F + damping)^p with everything that does not depend on its argument computed.

    A function of a pytree like the params; and, where p is −1, a metric for `jdfunc.jd_step`.

    Attributes:
        layout: the blocks, static.
        parts: the p-th power of each, by name.
    """

    layout: tuple[Block, ...]
    parts: dict[str, Part]

    def __call__(self, tree: Params) -> Params:
        """Apply the power to a pytree like the params, leaves [*columns, *param.shape]."""

        def one(block: Block, matrix: Tensor) -> Tensor:
            part = self.parts[block.name]
            return applied(part, matrix.to(dtype_of(part)))

        return map_blocks(one, self.layout, tree)

    def gram(
        self,
        rows: Rows,
        other: Rows | None = None,
        *,
        row_ndim: int = 1,
        max_block_bytes: int = algebra.MAX_BLOCK_BYTES,
    ) -> Tensor:
        """J₁ (F + damping)^p J₂ᵀ: see `jdfunc.curvature.metric.metric_gramian`."""
        sizes: dict[str, Any] = {"row_ndim": row_ndim, "max_block_bytes": max_block_bytes}
        total: Tensor | None = None
        with unrounded(pytrees.leaves(rows)):
            for leaf, *theirs in self.whitened(rows, other, **sizes):
                block = algebra.gram([leaf], theirs or None, **sizes)
                total = block if total is None else total + block
        if total is None:
            raise ValueError("expected rows with at least one leaf, got an empty pytree")
        return total.to(_wide_dtype(rows))

    def squared_norms(
        self,
        rows: Rows,
        *,
        row_ndim: int = 1,
        max_block_bytes: int = algebra.MAX_BLOCK_BYTES,
    ) -> Tensor:
        """The diagonal of `gram`, [*rows]: g_rᵀ (F + damping)^p g_r for every row."""
        with unrounded(pytrees.leaves(rows)):
            leaves = self.whitened(rows, row_ndim=row_ndim, max_block_bytes=max_block_bytes)
            squares = [algebra.row_norms([leaf], row_ndim=row_ndim).square() for (leaf,) in leaves]
        if not squares:
            raise ValueError("expected rows with at least one leaf, got an empty pytree")
        return sum(squares[1:], squares[0]).to(_wide_dtype(rows))

    def whitened(
        self,
        rows: Rows,
        other: Rows | None = None,
        *,
        row_ndim: int = 1,
        max_block_bytes: int = algebra.MAX_BLOCK_BYTES,
    ) -> Iterator[tuple[Any, ...]]:
        """Leaves whose plain Gramians sum to `gram`, one after the other.

        Args:
            rows: J₁, a pytree of rows, dense or factored.
            other: J₂, likewise, if there is one.
            row_ndim: how many leading axes of a dense leaf are row axes.
            max_block_bytes: bound on the memory of one materialised leaf, in bytes.

        Yields:
            A leaf of rows for J₁, and one for J₂.
        """
        trees = [_named_rows(self.layout, tree) for tree in (rows, other) if tree is not None]
        for block in self.layout:
            part = self.parts[block.name]
            own = tuple(block_rows(block, tree, row_ndim, dtype_of(part)) for tree in trees)
            yield from whitened(part, own, max_block_bytes)


def power_of(
    layout: Sequence[Block], blocks: Mapping[str, Factors | Spectrum], damping: Damping, p: float
) -> Power:
    """Prepare (F + damping)^p.

    Args:
        layout: the blocks.
        blocks: what is known of each, by name.
        damping: a rule of `jdfunc.curvature.damping`.
        p: any real number.

    Returns:
        A `Power`.
    """
    check_damping(layout, damping)
    spectra = diagonalised(layout, blocks)
    parts = {b.name: part_of(b, spectra[b.name], damping, p) for b in layout}
    return Power(tuple(layout), parts)


def check_damping(layout: Sequence[Block], damping: Damping) -> None:
    """Check that a damping rule is a function, and that it names no block that does not exist."""
    if not callable(damping):
        raise TypeError(
            f"expected a damping rule such as jdfunc.curvature.exact(1e-3), got {damping!r}"
        )
    if isinstance(damping, PerBlock):
        known = {name for block in layout for name in block.params}
        unknown = [name for name in damping.rules if name not in known]
        if unknown:
            raise ValueError(
                f"expected damping for parameters of the curvature, got {unknown[:5]}; it has "
                f"{sorted(known)[:5]}"
            )


def diagonalised(
    layout: Sequence[Block], blocks: Mapping[str, Factors | Spectrum]
) -> dict[str, Spectrum]:
    """Every block as a spectrum: factors by their eigenvalues, matrices of one size in one call.

    Args:
        layout: the blocks.
        blocks: what is known of each, by name.

    Returns:
        A spectrum for each block, by name, with ``sides`` where it came from factors.
    """
    wide = {block.name: widened(blocks[block.name]) for block in layout}
    products = {name: held for name, held in wide.items() if isinstance(held, Factors)}
    matrices = {
        f"{name} ({where})": side
        for name, held in products.items()
        for where, side in (("left", held.left), ("right", held.right))
        if side.ndim == 3
    }
    found = eigh_all(matrices)

    def of_side(name: str, where: str, side: Tensor) -> tuple[Tensor, Tensor | None]:
        return found[f"{name} ({where})"] if side.ndim == 3 else (side, None)

    spectra: dict[str, Spectrum] = {}
    for name, held in wide.items():
        if isinstance(held, Spectrum):
            spectra[name] = held
            continue
        a, left = of_side(name, "left", held.left)
        b, right = of_side(name, "right", held.right)
        spectra[name] = Spectrum(left, right, a[..., :, None] * b[..., None, :], (a, b))
    return spectra


def _named_rows(layout: Sequence[Block], rows: Rows) -> dict[str, Any]:
    leaves = pytrees.leaves(rows, algebra.is_rows)
    names = pytrees.names(rows, algebra.is_rows)
    check_names(layout, names)
    return dict(zip(names, leaves, strict=True))


def _wide_dtype(rows: Rows) -> torch.dtype:
    """The dtype of a Gramian of rows, float32 at least."""
    leaf = pytrees.leaves(rows, algebra.is_rows)[0]
    tensor = leaf if isinstance(leaf, Tensor) else pytrees.leaves(leaf)[-1]
    return torch.promote_types(tensor.dtype, torch.float32)

"""The curvature F of a model: a block-diagonal matrix over its parameters, as tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from jdfunc import algebra
from jdfunc.curvature.blocks import Block, Factors, Spectrum
from jdfunc.curvature.operate.damping import Damping, undamped
from jdfunc.curvature.operate.powers import Power, power_of
from jdfunc.types import Params, Rows


class Curvature(NamedTuple):
    """F, symmetric positive semidefinite, and the damping of its inverse.

    A metric for `jdfunc.jd_step` and `jdfunc.gramian`, which call ``inverse()`` once. Called, it
    is the inverse itself, and solves the eigenvalue problems of its `Factors` each time; what
    `jdfunc.curvature.inverse` returns has solved them.

    To save it, save the state that it was made of (`jdfunc.curvature.state_dict`). For an ensemble,
    `torch.vmap` gives back states, and what is computed with curvatures, but no curvatures.

    Attributes:
        layout: the blocks, static; every parameter belongs to one of them.
        blocks: what is known of each block, by name.
        damping: that of its negative powers where no other is given.
    """

    layout: tuple[Block, ...]
    blocks: dict[str, Factors | Spectrum]
    damping: Damping

    def __call__(self, tree: Params) -> Params:
        """(F + damping)⁻¹ of a pytree like the params."""
        return self.inverse()(tree)

    def gram(
        self,
        rows: Rows,
        other: Rows | None = None,
        *,
        row_ndim: int = 1,
        max_block_bytes: int = algebra.MAX_BLOCK_BYTES,
    ) -> Tensor:
        """J₁ (F + damping)⁻¹ J₂ᵀ: see `jdfunc.curvature.metric_gramian`."""
        return self.inverse().gram(rows, other, row_ndim=row_ndim, max_block_bytes=max_block_bytes)

    def inverse(self) -> Power:
        """(F + damping)⁻¹, prepared."""
        return power_of(self.layout, self.blocks, self.damping, -1)


def damping_of(curv: Curvature, p: float, damping: Damping | None) -> Damping:
    """The damping of F^p: that which is given; else the curvature's own if p < 0, none if not."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"expected a power that is a number, got {p!r}")
    if not math.isfinite(p):
        raise ValueError(f"expected a finite power, got {p}")
    if damping is not None:
        return damping
    return curv.damping if p < 0 else undamped

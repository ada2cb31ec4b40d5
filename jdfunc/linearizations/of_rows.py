"""A `Linearization` from the rows it holds."""

from typing import Any

from torch import Tensor

from jdfunc import algebra, pytrees
from jdfunc.types import Linearization, Params, Rows


def of_rows(
    losses: Tensor, rows: Rows, aux: Any, max_block_bytes: int = algebra.MAX_BLOCK_BYTES
) -> Linearization:
    """Return the linearization that holds J as the given pytree of rows."""

    def gram() -> Tensor:
        if not pytrees.leaves(rows, algebra.is_rows):  # no parameters: J has no columns
            return losses.new_zeros((*losses.shape, *reversed(losses.shape)))
        return algebra.gram(rows, row_ndim=losses.ndim, max_block_bytes=max_block_bytes)

    def combine(weights: Tensor) -> Params:
        return algebra.combine(rows, weights)

    return Linearization(losses=losses, gram=gram, combine=combine, rows=rows, aux=aux)

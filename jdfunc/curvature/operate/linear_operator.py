"""F or a power of it as a linear operator of SciPy, for code that was written for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jdfunc import pytrees
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.operators import matvec
from jdfunc.curvature.operate.powers import Power
from jdfunc.types import Params

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def as_linear_operator(operator: Curvature | Power, params: Params) -> LinearOperator:
    """F, or a power of it, on flat vectors: a `scipy.sparse.linalg.LinearOperator`.

    Args:
        operator: F, which is not damped; or what `power` and `inverse` return.
        params: the params, for structure, dtype and device. Never modified.

    Returns:
        A symmetric operator [n, n] on vectors, or columns [n, K], of NumPy, over the leaves of the
        params, each flattened, one after the other. Its dtype is the widest of the params, float32
        at least.

    Raises:
        ImportError: SciPy is not installed.
    """
    from scipy.sparse.linalg import LinearOperator

    leaves, restore = pytrees.flatten(params)
    sizes = [leaf.numel() for leaf in leaves]
    dtype, device = torch.float32, leaves[0].device if leaves else None
    for leaf in leaves:
        dtype = torch.promote_types(dtype, leaf.dtype)

    def columns(given: Any) -> Any:
        matrix = torch.tensor(given, dtype=dtype, device=device).T
        pieces = zip(matrix.split(sizes, 1), leaves, strict=True)
        tree = restore([piece.reshape(len(matrix), *leaf.shape) for piece, leaf in pieces])
        applied = matvec(operator, tree) if isinstance(operator, Curvature) else operator(tree)
        pairs = zip(pytrees.leaves(applied), sizes, strict=True)
        flat = torch.cat([leaf.reshape(len(matrix), size) for leaf, size in pairs], 1)
        return flat.T.detach().cpu().numpy()

    def column(given: Any) -> Any:
        return columns(given.reshape(-1, 1))[:, 0]

    size, name = sum(sizes), str(dtype).removeprefix("torch.")
    functions: dict[str, Any] = {"rmatvec": column, "matmat": columns, "rmatmat": columns}
    return LinearOperator((size, size), column, dtype=name, **functions)  # pyright: ignore

"""The dual-cone problem by an external package: an independent check on `dual_cone`."""

import torch
from jaxtyping import Float
from torch import Tensor

from jdfunc.solvers.precision import effective_ridge

__all__ = ["quadprog"]


def quadprog(
    gramian: Float[Tensor, "*batch m m"],
    bounds: Float[Tensor, "*batch k m"],
    *,
    ridge: float = 1e-10,
) -> Float[Tensor, "*batch k m"]:
    """`dual_cone` by the method of Goldfarb and Idnani: one problem at a time, on the CPU.

    With `qpsolvers` and `quadprog`: v = argmin ½ vᵀGv subject to v ≥ u for each row u, solved on
    the row-normalised Gramian with every row of bounds scaled to size 1, because the tolerances of
    `quadprog` are absolute.

    Args:
        gramian: G = J Jᵀ, shape [*batch, m, m], symmetric PSD. Units loss²/param².
        bounds: u, shape [*batch, k, m], one problem per row.
        ridge: as in `dual_cone`.

    Returns:
        v, shape [*batch, k, m], dtype and device of `gramian`; not differentiable, not traceable.

    Raises:
        ImportError: `qpsolvers` and `quadprog` are not installed.

    Cost: O(m⁴) for k = m, one core.

    References:
        Goldfarb and Idnani, A numerically stable dual method for solving strictly convex quadratic
        programs, Math. Programming 27, 1983.

    Example:
        >>> J = torch.tensor([[-4., 1., 1.], [6., 1., 1.]], dtype=torch.float64)
        >>> quadprog(J @ J.T, torch.eye(2))
        tensor([[1.0000, 0.5789],
                [1.2222, 1.0000]], dtype=torch.float64)
    """
    try:
        from qpsolvers import solve_qp
    except ImportError as error:
        raise ImportError(
            "quadprog needs the packages qpsolvers and quadprog: pip install 'jdfunc[solvers]', "
            "or keep the built-in solver jdfunc.solvers.dual_cone."
        ) from error
    m = gramian.shape[-1]
    ridge = effective_ridge(ridge, gramian.dtype, m)
    eye = torch.eye(m, dtype=torch.float64)
    matrices = gramian.detach().double().cpu().reshape(-1, m, m)
    rows = bounds.detach().double().cpu().reshape(len(matrices), -1, m)
    out = torch.empty_like(rows)
    for matrix, us, vs in zip(matrices, rows, out, strict=True):
        diagonal = matrix.diagonal()
        root = torch.where(diagonal > 0, diagonal, 1).sqrt()
        normal = torch.where(eye > 0, 1.0, matrix / root[:, None] / root) + ridge * eye
        for u, v in zip(us * root, vs, strict=True):
            size = u.abs().max().clamp(min=1e-300)
            # min ½ zᵀ(S + ridge I)z + (S b)ᵀz over z ≥ 0: the ridge acts where dual_cone has it
            linear = (normal - ridge * eye) @ (u / size)
            z = solve_qp(
                normal.numpy(),
                linear.numpy(),
                lb=torch.zeros(m).double().numpy(),
                solver="quadprog",
            )
            v.copy_((u / size + torch.as_tensor(z)) * size / root)
    return out.reshape(bounds.shape).to(gramian)

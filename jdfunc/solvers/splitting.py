"""Douglas–Rachford splitting: a cheap guess of which variables of many problems are free."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["douglas_rachford"]

RELAXATION = 1.95
FLOOR = 1e-5  # share of the largest eigenvalue below which others need not be told apart
PERIOD = 10  # iterations between two looks


def douglas_rachford(
    matrix: Float[Tensor, "m m"], q: Float[Tensor, "rows m"], *, tol: float, max_iters: int
) -> Float[Tensor, "rows m"]:
    """X with max(X, 0) ≈ z and max(−X, 0) ≈ y/ρ, where z ≥ 0, y = S z + q ≥ 0, zᵀy = 0 in each row.

    Repeats X ← X + 1.95 (|X| B + C − max(X, 0)) with B = ρ (S + ρI)⁻¹ and C = −q (S + ρI)⁻¹: one
    matrix product per step for all rows, until no sign changes over a period or the increments stay
    below `tol`. ρ = √(λ_min λ_max) balances the slowest modes at both ends of the spectrum.

    Args:
        matrix: S, symmetric positive definite.
        q: right-hand sides.
        tol: of the largest increment.
        max_iters: how many iterations at most.

    Returns:
        X, of which the signs matter: they say which indices are free.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    largest = _top_eigenvalue(lambda x: matrix @ x, eye)
    factor, _ = torch.linalg.cholesky_ex(matrix + FLOOR * largest * eye)
    smallest = 1 / _top_eigenvalue(lambda x: torch.cholesky_solve(x, factor), eye)
    rho = (smallest * largest).sqrt()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix + rho * eye).L)
    shift, inverse = -q @ inverse, rho * inverse
    x, free = shift.clone(), shift > 0
    for i in range(1, max_iters + 1):
        step = torch.addmm(shift, x.abs(), inverse).sub_(x.relu())
        x.add_(step, alpha=RELAXATION)
        if i % PERIOD == 0:
            before, free = free, x > 0
            if torch.equal(before, free) or step.abs().amax() < tol:
                break
    return x


def _top_eigenvalue(apply: Callable[[Tensor], Tensor], eye: Tensor) -> Float[Tensor, ""]:
    """Largest eigenvalue of a symmetric operator, by a dozen power steps."""
    x = eye[:, :1] + eye.sum(1, keepdim=True)
    for _ in range(11):
        x = apply(x)
        x = x / x.norm()
    return apply(x).norm()

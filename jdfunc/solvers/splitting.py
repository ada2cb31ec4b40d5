"""Douglas–Rachford splitting: a cheap guess of which variables of many complementarity problems are free."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["douglas_rachford"]

RELAXATION = 1.95
SMALLEST_SPREAD = 1e-6  # eigenvalues below this share of the largest do not slow the iteration down
PERIOD = 10  # iterations between two looks at the increment


def douglas_rachford(
    matrix: Float[Tensor, "m m"], q: Float[Tensor, "rows m"], *, tol: float, max_iters: int
) -> Float[Tensor, "rows m"]:
    """X with max(X, 0) ≈ z and max(−X, 0) ≈ y/ρ, where z ≥ 0, y = S z + q ≥ 0, zᵀy = 0 in each row.

    Repeats X ← X + 1.95 (|X| B + C − max(X, 0)) with B = ρ (S + ρI)⁻¹ and C = −q (S + ρI)⁻¹: one
    matrix product per step for all rows. ρ = √(λ_min λ_max) balances the slowest modes at both ends
    of the spectrum.
    """
    smallest, largest = _spectrum(matrix)
    rho = (torch.maximum(smallest, SMALLEST_SPREAD * largest) * largest).sqrt()
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix + rho * eye).L)
    shift, inverse = -q @ inverse, rho * inverse
    x = shift.clone()
    for i in range(1, max_iters + 1):
        step = torch.addmm(shift, x.abs(), inverse).sub_(x.relu())
        x.add_(step, alpha=RELAXATION)
        if i % PERIOD == 0 and step.abs().amax() < tol:
            break
    return x


def _spectrum(matrix: Float[Tensor, "m m"]) -> tuple[Tensor, Tensor]:
    """The ends of the spectrum, by a dozen power and inverse power steps."""
    factor, _ = torch.linalg.cholesky_ex(matrix)
    m = matrix.shape[-1]
    up = down = torch.linspace(1, 2, m, dtype=matrix.dtype, device=matrix.device)[:, None].cos()
    for _ in range(12):
        up = matrix @ up
        up = up / up.norm()
        down = torch.cholesky_solve(down, factor)
        down = down / down.norm()
    return (down * (matrix @ down)).sum(), (up * (matrix @ up)).sum()

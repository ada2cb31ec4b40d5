"""Exact active-set steps for many linear complementarity problems at once.

Row r asks for z ≥ 0, y = S z + q ≥ 0, zᵀy = 0, and is solved once its free set F = {i : zᵢ > 0} is
known. `pivot` exchanges whole sets and needs a handful of rounds; `descend` changes few indices at
a time, never raises the objective, and finishes what `pivot` leaves. Sizes depend on data, so both
run below the opaque operator of `lcp.py`. `matrix` is one S for all rows, or one S per row.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["descend", "pivot", "solve_free"]

Rows = Float[Tensor, "rows m"]
Sets = Bool[Tensor, "rows m"]
Shared = Float[Tensor, "_ m m"]  # one for all rows, or one per row

MASKED_SIZE = 40  # up to this m, padding every F to m costs less than gathering F
MOSTLY_FREE = 0.7  # beyond this share of m, S_FF⁻¹ comes cheaper from S⁻¹ and the few bound indices
FULL_ROUNDS = 5  # of small problems, where dropping finished rows costs more than repeating them
CHUNK_ELEMENTS = 1 << 22  # bounds the memory of one batch of factorisations


def pivot(
    matrix: Shared, q: Rows, free: Sets, *, tol: float, rounds: int
) -> tuple[Rows, Bool[Tensor, " rows"]]:
    """Block principal pivoting: exchange all indices of wrong sign, or the worst once that stalls.

    Args:
        matrix: S, [1 or rows, m, m].
        q: right-hand sides, [rows, m].
        free: where to start, [rows, m].
        tol: below this a sign counts as right.
        rounds: how many exchanges at most.

    Returns:
        z, and a mark on the rows that did not finish.
    """
    done = torch.zeros(len(q), dtype=torch.bool, device=q.device)
    full_rounds = min(rounds, FULL_ROUNDS) if q.shape[-1] <= MASKED_SIZE else 0
    for _ in range(full_rounds):
        z, _, wrong = _check(matrix, q, free, tol)
        if not wrong.any():
            return z, done
        free = free ^ wrong
    solution, rows = torch.zeros_like(q), torch.arange(len(q), device=q.device)
    fewest = torch.full_like(rows, q.shape[-1] + 1)
    patience = torch.full_like(rows, 3)
    for _ in range(rounds - full_rounds):
        z, slack, wrong = _check(matrix, q, free, tol)
        solution[rows] = z
        count = wrong.sum(-1)
        going = count.nonzero()[:, 0]
        if len(going) == 0:
            return solution, done
        if len(going) < len(rows):
            matrix = matrix if len(matrix) == 1 else matrix[going]
            state = (rows, q, free, fewest, patience, wrong, count, slack)
            rows, q, free, fewest, patience, wrong, count, slack = (t[going] for t in state)
        patience = torch.where(count < fewest, 3, patience - 1)
        fewest = torch.minimum(fewest, count)
        worst = torch.zeros_like(free).scatter_(1, slack.argmin(-1, keepdim=True), True)
        free = free ^ torch.where((patience >= 0)[:, None], wrong, worst)
    return solution, done.index_fill(0, rows, True)


def _check(
    matrix: Shared, q: Rows, free: Sets, tol: float
) -> tuple[Rows, Rows, Bool[Tensor, "rows m"]]:
    """The z of F, what has to be non-negative (z on F, y elsewhere), and where it is not."""
    z = solve_free(matrix, q, free)
    slack = torch.where(free, z, multiply(matrix, z) + q)
    return z, slack, slack < -tol * z.amax(-1, keepdim=True).clamp(min=1)


def descend(matrix: Shared, q: Rows, start: Rows, *, tol: float, rounds: int) -> Rows:
    """Lawson and Hanson's active-set descent on ½zᵀSz + qᵀz over z ≥ 0, from a feasible start."""
    x, free = start, start > 0
    for _ in range(rounds):
        z = solve_free(matrix, q, free)
        blocked = free & (z <= 0)
        inside = ~blocked.any(-1, keepdim=True)
        # The longest step from x towards z that stays feasible; where it ends, indices leave F.
        step = torch.where(blocked, x / (x - z), 1).amin(-1, keepdim=True)
        x = torch.where(inside, z, (x + step * (z - x)).clamp(min=0))
        free = free & ~(blocked & (x <= 1e-15 * x.amax(-1, keepdim=True)))
        x = torch.where(free, x, 0)
        y = torch.where(free, torch.inf, multiply(matrix, x) + q)
        lowest, index = y.min(-1, keepdim=True)
        enters = inside & (lowest < -tol * x.amax(-1, keepdim=True).clamp(min=1))
        if not (enters | ~inside).any():
            break
        free = free | torch.zeros_like(free).scatter_(1, index, enters)
    return x


def solve_free(matrix: Shared, q: Rows, free: Sets) -> Rows:
    """The z with z_F = −S_FF⁻¹ q_F and zero elsewhere."""
    m = q.shape[-1]
    if m <= MASKED_SIZE or len(matrix) > 1:
        return solve_masked(matrix, q, free)
    large = (free.sum(-1) > MOSTLY_FREE * m).nonzero()[:, 0]
    if len(large) < 4:  # the inverse costs as much as about three factorisations
        return _solve_gathered(matrix[0], q, free)
    z = torch.zeros_like(q)
    z[large] = _solve_bound(matrix[0], q[large], free[large])
    residual = torch.where(free, multiply(matrix, z) + q, 0).abs().amax(-1)
    accurate = residual <= 1e-12 * z.abs().amax(-1).clamp(min=1)
    others = (~accurate).nonzero()[:, 0]
    z[others] = _solve_gathered(matrix[0], q[others], free[others])
    return z


def multiply(matrix: Shared, z: Rows) -> Rows:
    """S z for each row."""
    return z @ matrix[0] if len(matrix) == 1 else torch.einsum("rij,rj->ri", matrix, z)


def solve_masked(
    matrix: Float[Tensor, "*#rows m m"], q: Float[Tensor, "*rows m"], free: Bool[Tensor, "*rows m"]
) -> Float[Tensor, "*rows m"]:
    """`solve_free` with rows of the identity on the bound indices: batched, differentiable."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    masked = torch.where(free[..., :, None] & free[..., None, :], matrix, eye)
    factor, _ = torch.linalg.cholesky_ex(masked)
    return torch.cholesky_solve(torch.where(free, -q, 0)[..., None], factor)[..., 0]


def _solve_gathered(matrix: Float[Tensor, "m m"], q: Rows, free: Sets) -> Rows:
    """`solve_free` on the entries of F alone, rows of like size together."""
    sizes, by_size = free.sum(-1).sort()
    tops, z, start = sizes.tolist(), torch.zeros_like(q), 0
    while start < len(tops):
        stop = min(start + max(16, len(tops) // 8), len(tops))
        size = max(tops[stop - 1], 1)
        stop = min(stop, start + max(1, CHUNK_ELEMENTS // size**2))
        rows = by_size[start:stop]
        # The first `size` indices of this order hold all of F; the others pad it.
        order = free[rows].byte().argsort(dim=-1, descending=True, stable=True)[:, :size]
        block = matrix[order[:, :, None], order[:, None, :]]
        inner = solve_masked(block, q[rows].gather(1, order), free[rows].gather(1, order))
        z[rows] = torch.zeros_like(q[rows]).scatter_(1, order, inner)
        start = stop
    return z


def _solve_bound(matrix: Float[Tensor, "m m"], q: Rows, free: Sets) -> Rows:
    """`solve_free` through B = S⁻¹: y_A = B_AA⁻¹ (B q)_A on the bound A, z = B (y − q); refined."""
    factor, _ = torch.linalg.cholesky_ex(matrix)
    inverse = torch.cholesky_inverse(factor)
    z = torch.zeros_like(q)
    for _ in range(2):
        residual = torch.where(free, z @ matrix + q, 0)
        plain = -residual @ inverse
        y = _solve_gathered(inverse, plain, ~free)
        z = torch.where(free, z + plain + y @ inverse, 0)
    return z

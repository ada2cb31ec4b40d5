"""Block principal pivoting in Python floats, for problems too tiny to pay for tensor operators."""

import math
from operator import mul

__all__ = ["pivot_floats"]

Matrix = list[list[float]]


def pivot_floats(
    matrix: Matrix, qs: Matrix, bounds: Matrix | None, *, ridge: float, tol: float, rounds: int
) -> Matrix | None:
    """The z of `jdfunc.solvers.lcp` for each q, or None where the general path has to decide."""
    diagonal = [row[i] for i, row in enumerate(matrix)]
    if not math.isfinite(sum(map(sum, matrix)) + sum(map(sum, qs))):
        return None
    root = [math.sqrt(d) if d > 0 else 1.0 for d in diagonal]
    normal = [
        [a / (r * s) for a, s in zip(row, root, strict=True)]
        for row, r in zip(matrix, root, strict=True)
    ]
    for i, row in enumerate(normal):
        row[i] = 1 + ridge
    solutions = []
    for k, row in enumerate(qs):
        q = [a / r for a, r in zip(row, root, strict=True)]
        scaled = q if bounds is None else [u * r for u, r in zip(bounds[k], root, strict=True)]
        size = max(map(abs, scaled)) or 1.0
        z = _pivot(normal, [a / size for a in q], tol, rounds)
        if z is None:
            return None
        solutions.append([max(a, 0.0) * size / r for a, r in zip(z, root, strict=True)])
    return solutions


def _pivot(matrix: Matrix, q: list[float], tol: float, rounds: int) -> list[float] | None:
    indices = range(len(q))
    free = [i for i in indices if q[i] < -tol]
    fewest, patience = len(q) + 1, 3
    for _ in range(rounds):
        z = _solve_free(matrix, q, free)
        if z is None:
            return None
        slack = [q[i] + sum(matrix[i][j] * z[j] for j in free) for i in indices]
        for i in free:
            slack[i] = z[i]
        bar = -tol * max(1.0, *z)
        wrong = [i for i in indices if slack[i] < bar]
        if not wrong:
            return z
        patience = 3 if len(wrong) < fewest else patience - 1
        fewest = min(fewest, len(wrong))
        if patience < 0:
            wrong = [min(indices, key=slack.__getitem__)]
        free = sorted(set(free).symmetric_difference(wrong))
    return None


def _solve_free(matrix: Matrix, q: list[float], free: list[int]) -> list[float] | None:
    """The z with z_F = −S_FF⁻¹ q_F and zero elsewhere; None where S_FF is not definite."""
    factor: Matrix = []
    forward: list[float] = []
    for a, i in enumerate(free):
        row: list[float] = []
        for b in range(a):
            other = factor[b]
            inner = sum(map(mul, row, other))
            row.append((matrix[i][free[b]] - inner) / other[b])
        pivot = matrix[i][i] - sum(map(mul, row, row))
        if pivot <= 0:
            return None
        forward.append((-q[i] - sum(map(mul, row, forward))) / math.sqrt(pivot))
        row.append(math.sqrt(pivot))
        factor.append(row)
    z = [0.0] * len(q)
    for a in reversed(range(len(free))):
        value = forward[a] / factor[a][a]
        z[free[a]] = value
        for b in range(a):
            forward[b] -= factor[a][b] * value
    return z

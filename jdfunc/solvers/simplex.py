"""Points of the simplex {a : a ≥ 0, Σa = 1}: projection, and the minimum of ½ aᵀGa."""

import torch
from jaxtyping import Float
from torch import Tensor

from jdfunc.solvers.lcp import lcp
from jdfunc.solvers.precision import compute_dtype, effective_ridge, poison

__all__ = ["frank_wolfe", "min_norm", "project_simplex"]


def project_simplex(point: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
    """Nearest point of the probability simplex.

    max(y − t, 0) with t = maxₖ (y₍₁₎ + … + y₍ₖ₎ − 1) / k over the entries sorted in descending
    order.

    Args:
        point: y, shape [*batch, m].

    Returns:
        The projection, shape [*batch, m], dtype and device of `point`; NaN where a row has a NaN.

    Cost: one sort.

    References:
        Held, Wolfe and Crowder, Validation of subgradient optimization, Math. Programming 6, 1974.

    Example:
        >>> project_simplex(torch.tensor([1.0, 0.5, -1.0]))
        tensor([0.7500, 0.2500, 0.0000])
    """
    excess = point.sort(dim=-1, descending=True).values.cumsum(-1) - 1
    count = torch.arange(1, point.shape[-1] + 1, dtype=point.dtype, device=point.device)
    return (point - (excess / count).amax(-1, keepdim=True)).relu()


def min_norm(
    gramian: Float[Tensor, "*batch m m"], *, ridge: float = 1e-10
) -> Float[Tensor, "*batch m"]:
    """Weights of the shortest vector in the convex hull of the gradients.

    a = argmin aᵀGa over the simplex. With D = diag(G)^½, S = D⁻¹GD⁻¹ and βᵢ = minⱼ dⱼ / dᵢ, solves
    the complementarity problem of S + ββᵀ and −β, and normalises βx. The rank-one term is constant
    on the simplex and bounds the problem when 0 is in the hull.

    Args:
        gramian: G = J Jᵀ, shape [*batch, m, m], symmetric PSD. Units loss²/param².
        ridge: added to the unit diagonal of S + ββᵀ; dimensionless. At least the rounding of the
            dtype of `gramian`.

    Returns:
        a, shape [*batch, m], dtype and device of `gramian`; non-negative, sums to 1. Where some
        G_ii = 0, equal weights on those i. NaN for a batch element that is not finite.
        `jdfunc.weightings.min_norm_gap` certifies it.

    Cost: closed form for m = 2, else one right-hand side of `jdfunc.solvers.lcp`.

    References:
        Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization, C. R.
        Math. 350, 2012.

    Example:
        >>> J = torch.tensor([[-4., 1., 1.], [6., 1., 1.]])
        >>> min_norm(J @ J.T)
        tensor([0.6000, 0.4000])
    """
    dtype, m = gramian.dtype, gramian.shape[-1]
    ridge = effective_ridge(ridge, dtype, m)
    gramian = gramian.to(compute_dtype(gramian.device))
    if m == 2:
        return _segment(gramian).to(dtype)
    if m == 0:
        return torch.zeros(gramian.shape[:-1], dtype=dtype, device=gramian.device)
    diagonal = gramian.diagonal(dim1=-2, dim2=-1)
    safe = torch.where(diagonal > 0, diagonal, 1)
    root = safe.sqrt()
    beta = safe.amin(-1, keepdim=True).sqrt() / root
    normal = gramian / root[..., :, None] / root[..., None, :]
    shifted = normal + beta[..., :, None] * beta[..., None, :]
    y = beta * lcp(shifted, -beta[..., None, :], ridge=ridge)[..., 0, :]
    zero = (diagonal == 0).to(y)
    any_zero = zero.sum(-1, keepdim=True)
    on_zero_rows = zero / any_zero.clamp(min=1)
    return torch.where(any_zero > 0, on_zero_rows, y / y.sum(-1, keepdim=True)).to(dtype)


def _segment(gramian: Float[Tensor, "*batch 2 2"]) -> Float[Tensor, "*batch 2"]:
    """The minimum on the segment between two gradients."""
    first, second, cross = gramian[..., 0, 0], gramian[..., 1, 1], gramian[..., 0, 1]
    distance = first + second - 2 * cross
    share = (second - cross) / torch.where(distance <= 0, 1, distance)
    share = torch.where(distance <= 0, 0.5, share).clamp(0, 1) + poison(gramian)
    return torch.stack((share, 1 - share), dim=-1)


def frank_wolfe(
    gramian: Float[Tensor, "*batch m m"],
    *,
    ridge: float = 0.0,
    epsilon: float = 1e-3,
    max_iters: int = 100,
) -> Float[Tensor, "*batch m"]:
    """Weights of a short vector in the convex hull of the gradients, by Frank–Wolfe steps.

    From a = 1/m repeats a ← (1 − γ) a + γ e_t, with t = argmin (Ga) and the best γ in [0, 1], until
    γ < `epsilon`. After 100 steps the squared length is some percent above the minimum, and at a
    vertex γ stays 1; `min_norm` is exact.

    Args:
        gramian: G = J Jᵀ, shape [*batch, m, m], symmetric PSD. Units loss²/param².
        ridge: G + ridge · diag(G) takes the place of G; dimensionless.
        epsilon: step length below which a batch element stops.
        max_iters: number of steps; every one is run, finished elements stay.

    Returns:
        a, shape [*batch, m], dtype and device of `gramian`; non-negative, sums to 1. NaN for a
        batch element that is not finite.

    Cost: `max_iters` products of G and a vector; no host sync.

    References:
        Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018,
        arXiv:1810.04650, Algorithm 2.

    Example:
        >>> J = torch.tensor([[-4., 1., 1.], [6., 1., 1.]])
        >>> frank_wolfe(J @ J.T)
        tensor([0.6000, 0.4000])
    """
    dtype, m = gramian.dtype, gramian.shape[-1]
    gramian = gramian.to(compute_dtype(gramian.device))
    if ridge:
        gramian = gramian + torch.diag_embed(ridge * gramian.diagonal(dim1=-2, dim2=-1))
    a = gramian.new_full(gramian.shape[:-1], 1 / max(m, 1)) + poison(gramian)[..., None]
    running = torch.ones_like(a[..., :1], dtype=torch.bool)
    for _ in range(max_iters if m else 0):
        image = (gramian @ a[..., None])[..., 0]
        vertex = torch.zeros_like(a).scatter(-1, image.argmin(-1, keepdim=True), 1.0)
        x = (image * vertex).sum(-1, keepdim=True)
        b = (image * a).sum(-1, keepdim=True)
        c = (gramian.diagonal(dim1=-2, dim2=-1) * vertex).sum(-1, keepdim=True)
        length = b + c - 2 * x
        inner = (b - x) / torch.where(length > 0, length, 1)
        gamma = torch.where(c <= x, 1.0, torch.where(b <= x, 0.0, inner))
        a = torch.where(running, (1 - gamma) * a + gamma * vertex, a)
        running = running & (gamma >= epsilon)
    return a.to(dtype)

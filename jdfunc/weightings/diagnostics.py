"""How good given weights are: numbers to log or to test, never used by the methods themselves."""

import torch
from jaxtyping import Float
from torch import Tensor

from jdfunc.solvers.precision import compute_dtype

__all__ = ["cone_residual", "conflict_margin", "min_cosine", "min_norm_gap"]


def conflict_margin(
    gramian: Float[Tensor, "*batch m m"], weights: Float[Tensor, "*batch m"]
) -> Float[Tensor, "*batch"]:
    """Smallest slope of an objective over its gradient, relative to the gross length of Jᵀw.

    minᵢ (Gw)ᵢ / dᵢ over Σⱼ |wⱼ| dⱼ, with d = diag(G)^½; negative where an objective is made worse.
    Zero rows are left out.

    Args:
        gramian: G = J Jᵀ, shape [*batch, m, m], symmetric PSD.
        weights: w, shape [*batch, m].

    Returns:
        The margin in [−1, 1], shape [*batch], in the compute dtype (float64). Dimensionless; 0
        where all rows are zero.

    Cost: one matrix-vector product.

    Example:
        >>> conflict_margin(torch.eye(2), torch.tensor([0.5, 0.5]))
        tensor(0.5000, dtype=torch.float64)
    """
    gramian, weights, root, present = _scaled(gramian, weights)
    slopes = _image(gramian, weights) / root
    gross = (weights.abs() * root * present).sum(-1)
    lowest = torch.where(present, slopes, torch.inf).amin(-1)
    return torch.where(gross > 0, lowest / torch.where(gross > 0, gross, 1), 0 * gross)


def min_cosine(
    gramian: Float[Tensor, "*batch m m"], weights: Float[Tensor, "*batch m"]
) -> Float[Tensor, "*batch"]:
    """Smallest cosine between a gradient and the direction Jᵀw.

    minᵢ (Gw)ᵢ / (dᵢ |Jᵀw|), with d = diag(G)^½; negative where an objective is made worse. Zero
    rows are left out.

    Args:
        gramian: G = J Jᵀ, shape [*batch, m, m], symmetric PSD.
        weights: w, shape [*batch, m].

    Returns:
        The cosine, shape [*batch], in the compute dtype (float64). 0 where Jᵀw = 0; noise where it
        is nearly so.

    Cost: one matrix-vector product.

    Example:
        >>> min_cosine(torch.eye(2), torch.tensor([0.5, 0.5]))
        tensor(0.7071, dtype=torch.float64)
    """
    gramian, weights, root, present = _scaled(gramian, weights)
    image = _image(gramian, weights)
    length = (weights * image).sum(-1).clamp(min=0).sqrt()
    lowest = torch.where(present, image / root, torch.inf).amin(-1)
    return torch.where(length > 0, lowest / torch.where(length > 0, length, 1), 0 * length)


def cone_residual(
    gramian: Float[Tensor, "*batch m m"],
    bounds: Float[Tensor, "*rows m"],
    weights: Float[Tensor, "*rows m"],
) -> Float[Tensor, "*batch"]:
    """How far v = `weights` is from solving: argmin ½ vᵀGv subject to v ≥ u = `bounds`.

    max |min(z, y)| with z = d ∘ (v − u), y = S (d ∘ v), S the row-normalised Gramian and each row
    of d ∘ u scaled to maximum 1. A ridge in the solution shows as ridge · max z.

    Args:
        gramian: G = J Jᵀ, shape [*batch, m, m], symmetric PSD.
        bounds: u, shape [*batch, k, m], or [*batch, m] for one problem.
        weights: v, the shape of `bounds`: what `jdfunc.solvers.dual_cone(gramian, bounds)` or, for
            one problem, `dualproj` returned.

    Returns:
        The largest residual over the k problems, shape [*batch], in the compute dtype (float64).
        Dimensionless.

    Raises:
        ValueError: `bounds` and `weights` differ in shape.

    Cost: one product of [k, m] and [m, m].

    Example:
        >>> J = torch.tensor([[-4., 1., 1.], [6., 1., 1.]])
        >>> cone_residual(J @ J.T, torch.tensor([1.0, 1.0]), torch.tensor([11 / 9, 1.0])) < 1e-6
        tensor(True)
    """
    if bounds.shape != weights.shape:
        raise ValueError(
            f"Expected bounds and weights of one shape, got {list(bounds.shape)} and "
            f"{list(weights.shape)}."
        )
    if bounds.ndim < gramian.ndim:
        bounds, weights = bounds[..., None, :], weights[..., None, :]
    gramian, weights, root, _ = _scaled(gramian, weights)
    normal = gramian / root[..., :, None] / root[..., None, :]
    bounds, weights = bounds.to(weights) * root[..., None, :], weights * root[..., None, :]
    size = bounds.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1)
    residual = torch.minimum((weights - bounds) / size, weights / size @ normal)
    return residual.abs().amax((-2, -1))


def min_norm_gap(
    gramian: Float[Tensor, "*batch m m"], weights: Float[Tensor, "*batch m"]
) -> Float[Tensor, "*batch"]:
    """Duality gap of w as the shortest point of the convex hull, over the mean squared gradient.

    (wᵀGw − minᵢ (Gw)ᵢ) / mean diag(G): at least the excess of ½|Jᵀw|² over its minimum, and 0
    exactly at the solution.

    Args:
        gramian: G = J Jᵀ, shape [*batch, m, m], symmetric PSD.
        weights: w on the simplex, shape [*batch, m].

    Returns:
        The relative gap, shape [*batch], in the compute dtype (float64). Dimensionless; 0 where all
        rows are zero.

    Cost: one matrix-vector product.

    Example:
        >>> min_norm_gap(torch.eye(2), torch.tensor([0.5, 0.5]))
        tensor(0., dtype=torch.float64)
    """
    gramian, weights, _, _ = _scaled(gramian, weights)
    image = _image(gramian, weights)
    gap = (weights * image).sum(-1) - image.amin(-1)
    size = gramian.diagonal(dim1=-2, dim2=-1).mean(-1)
    return gap / torch.where(size > 0, size, 1)


def _scaled(gramian: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gramian and weights in the compute dtype; diag(G)^½ with 1 for 0; where it is positive."""
    gramian = gramian.to(compute_dtype(gramian.device))
    diagonal = gramian.diagonal(dim1=-2, dim2=-1)
    present = diagonal > 0
    return gramian, weights.to(gramian), torch.where(present, diagonal, 1).sqrt(), present


def _image(gramian: Tensor, weights: Tensor) -> Tensor:
    return (gramian @ weights[..., None])[..., 0]

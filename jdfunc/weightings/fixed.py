"""Weights that do not depend on the gradients."""

import torch
from jaxtyping import Float
from torch import Tensor

from jdfunc.solvers.precision import poison
from jdfunc.weightings.base import check_gramian, vector_like

__all__ = ["constant", "mean", "sum"]


def mean(gramian: Float[Tensor, "*batch m m"]) -> Float[Tensor, "*batch m"]:
    """Equal weights 1/m: the gradient of the mean loss.

    Args:
        gramian: G = J Jᵀ, shape [*batch, m, m]; only its shape, dtype, device and finiteness count.

    Returns:
        w, shape [*batch, m], dtype and device of `gramian`. NaN for a batch element that is not
        finite.

    Raises:
        TypeError: `gramian` is not a tensor.
        ValueError: `gramian` is not floating-point of shape [*batch, m, m].

    Cost: one pass over G.

    Example:
        >>> mean(torch.eye(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    check_gramian(gramian)
    return _filled(gramian, 1 / max(gramian.shape[-1], 1))


def sum(gramian: Float[Tensor, "*batch m m"]) -> Float[Tensor, "*batch m"]:  # noqa: A001
    """Weights 1: the gradient of the sum of the losses.

    Args:
        gramian: G = J Jᵀ, shape [*batch, m, m]; only its shape, dtype, device and finiteness count.

    Returns:
        w, shape [*batch, m], dtype and device of `gramian`. NaN for a batch element that is not
        finite.

    Raises:
        TypeError: `gramian` is not a tensor.
        ValueError: `gramian` is not floating-point of shape [*batch, m, m].

    Cost: one pass over G.

    Example:
        >>> sum(torch.eye(2))
        tensor([1., 1.])
    """
    check_gramian(gramian)
    return _filled(gramian, 1.0)


def constant(
    gramian: Float[Tensor, "*#batch m m"], *, weights: Float[Tensor, "*#batch m"]
) -> Float[Tensor, "... m"]:
    """The given weights: the gradient of a fixed linear combination of the losses.

    Args:
        gramian: G = J Jᵀ, shape [*batch, m, m]; only its shape, dtype, device and finiteness count.
        weights: one weight per objective, shape [*batch, m]; any signs; broadcast with G.

    Returns:
        w, shape [*batch, m], dtype and device of `gramian`. NaN for a batch element that is not
        finite.

    Raises:
        TypeError: `gramian` is not a tensor.
        ValueError: `gramian` is not floating-point of shape [*batch, m, m], or `weights` does not
            end in m.

    Cost: one pass over G.

    Example:
        >>> constant(torch.eye(2), weights=torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    check_gramian(gramian)
    return vector_like(gramian, weights, "weights") + poison(gramian)[..., None]


def _filled(gramian: Float[Tensor, "*batch m m"], value: float) -> Float[Tensor, "*batch m"]:
    filled = torch.full(gramian.shape[:-1], value, dtype=gramian.dtype, device=gramian.device)
    return filled + poison(gramian)[..., None]

"""What a likelihood is: a loss term seen from its outputs, and the factor of a mean or a sum.

A loss term is what one position of one example adds to the loss: it reads C outputs. Outputs are
[b, *terms, C]: b examples, any number of axes of terms, the class axis last. All that is quadratic
in the loss is a sum over terms, and gets one factor w in the end, from a reduction.
"""

from __future__ import annotations  # Dynamo does not trace the annotations of inner functions

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdfunc.random import Key

#: ``(denominator, examples, batches, num_data) -> w``
Reduction = Callable[..., Tensor]


class Likelihood(NamedTuple):
    """A loss seen from its outputs: pure functions, none of which depends on the batch size.

    f are canonical outputs [b, *terms, C], y the targets as they are given. Vectors have the dtype
    of f, float32 at least.

    Attributes:
        canonical: ``(outputs) -> f``.
        term_loss: ``(f, y) -> losses [b, *terms]``, the terms that the others are about; weights
            are in, no mean is taken.
        root: ``(f, y) -> v [V, b, *terms, C]``, Σ_v v vᵀ is the Hessian of each term in its C
            outputs; all terms at once.
        gradient: ``(f, y) -> v [b, *terms, C]`` of each term.
        sample: ``(f, y, key, n) -> labels [n, b, *terms]`` or [n, b, *terms, C], of the model.
        sampled_gradient: ``(f, y, labels) -> v [n, b, *terms, C]``; the mean over labels of v vᵀ
            is the Hessian.
        denominator: ``(f, y) -> scalar``, what these examples add to the divisor of a mean.
        reduction: ``(denominator, examples, batches, num_data) -> w``.
    """

    canonical: Callable[[Any], Tensor]
    term_loss: Callable[[Tensor, Any], Tensor]
    root: Callable[[Tensor, Any], Tensor]
    gradient: Callable[[Tensor, Any], Tensor]
    sample: Callable[..., Any]
    sampled_gradient: Callable[[Tensor, Any, Any], Tensor]
    denominator: Callable[[Tensor, Any], Tensor]
    reduction: Reduction


def mean_reduction(
    denominator: Tensor,
    examples: Tensor,
    batches: Tensor | None = None,
    num_data: float | None = None,
) -> Tensor:
    """The factor of a mean over loss terms: w = 1 / denominator.

    Args:
        denominator: the sum of what `Likelihood.denominator` gave.
        examples: not read.
        batches: not read.
        num_data: not read: a mean does not grow with the data.

    Returns:
        w, a scalar; 0 where the denominator is 0, as for examples whose terms are all ignored: the
        curvature of no terms is 0 (torch's loss is NaN there).

    Example:
        >>> mean_reduction(torch.tensor(4.0), torch.tensor(2.0))
        tensor(0.2500)
    """
    return _inverse(denominator)


def sum_reduction(
    denominator: Tensor,
    examples: Tensor,
    batches: Tensor | None = None,
    num_data: float | None = None,
) -> Tensor:
    """The factor of a sum over loss terms: w = 1, or num_data / examples seen.

    Args:
        denominator: not read.
        examples: how many were seen.
        batches: None if everything seen was added up; else how many batches an exponential average
            has in it, each with its weight: the sum is then that of one batch.
        num_data: N, to scale the sum to; None for what was seen.

    Returns:
        w, a scalar; 0 where nothing was seen.

    Raises:
        ValueError: `num_data` is not positive.

    Example:
        >>> sum_reduction(torch.tensor(8.0), torch.tensor(2.0), num_data=100)
        tensor(50.)
    """
    if num_data is not None:
        if not isinstance(num_data, Tensor) and not num_data > 0:
            raise ValueError(f"expected num_data > 0, got {num_data}")
        return num_data * _inverse(examples)
    return torch.ones_like(denominator) if batches is None else _inverse(batches)


def _inverse(total: Tensor) -> Tensor:
    return torch.where(total == 0, 0, 1 / total)


# ------------------------------------------------------------------------------- for likelihoods


def wide(f: Tensor) -> Tensor:
    """Return outputs in the dtype to compute in, float32 at least."""
    return f.to(torch.promote_types(f.dtype, torch.float32))


def canonical_outputs(outputs: Any, class_axis: int | None = None) -> Tensor:
    """Return outputs with the class axis last.

    Args:
        outputs: of the model.
        class_axis: where the classes are; None for the last axis, and outputs [b] get one.

    Returns:
        f [b, *terms, C].

    Raises:
        TypeError: outputs are no tensor.
        ValueError: they are not floating point, or have no such axis.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"expected outputs to be one tensor, got {type(outputs).__name__}; the likelihood of a "
            "dict of heads is several({head: likelihood, ...}); of the apply_fn of "
            "model_to_function, which also returns buffers, take the first: apply_fn(p, b, x)[0]"
        )
    if not outputs.is_floating_point():
        raise ValueError(f"expected floating-point outputs, got {outputs.dtype}")
    shape = tuple(outputs.shape)
    if class_axis is None:
        if not shape:
            raise ValueError("expected outputs with a batch axis, got a scalar")
        return outputs[:, None] if len(shape) == 1 else outputs
    if not -len(shape) < class_axis < len(shape) or len(shape) < 2:
        raise ValueError(
            f"expected outputs with a batch axis and the classes on axis {class_axis}, got shape "
            f"{shape}"
        )
    return outputs.movedim(class_axis, -1)


def draws(
    draw: Callable[[Key, int], Tensor], key: Key, f: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Random numbers of a key, of a shape."""
    if isinstance(key, Tensor) and key.ndim:
        raise ValueError(
            f"expected one key, got keys of shape {tuple(key.shape)}; use torch.vmap over keys"
        )
    return draw(key, math.prod(shape)).reshape(shape).to(f.device)


def check_reduction(reduction: Any) -> None:
    """Check that a reduction is a function."""
    if not callable(reduction):
        raise TypeError(
            "expected reduction to be a function such as jdfunc.curvature.mean, got "
            f"{type(reduction).__name__}"
        )


def check_tensor(name: str, value: Any) -> None:
    """Check that a value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")


def count(f: Tensor) -> Tensor:
    """Return how many numbers the outputs are, a scalar of their dtype."""
    return torch.full((), f.numel(), dtype=wide(f).dtype, device=f.device)

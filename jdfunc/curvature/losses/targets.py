"""Targets that every likelihood takes: plain ones, weighted ones, and ones that carry labels."""

from __future__ import annotations  # Dynamo does not trace the annotations of inner functions

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdfunc.curvature.losses.terms import Likelihood, check_tensor, wide


class Weighted(NamedTuple):
    """Targets whose loss terms are multiplied by weights, as by those of torch's BCE.

    The divisor of a mean does not change, and a term of weight 0 counts for nothing, whatever its
    outputs are. Vectors of type-2 and Monte-Carlo are multiplied by the roots of the weights,
    empirical ones by the weights.

    Attributes:
        target: the targets themselves.
        weight: broadcasts to [b, *terms], batch axis first; none negative.
    """

    target: Any
    weight: Tensor


class Labelled(NamedTuple):
    """Targets with labels drawn outside, which `monte_carlo` takes in place of its own.

    Attributes:
        target: the targets themselves.
        labels: n labels for every term, [b, n, *terms], or [b, n, *terms, C] where a label has as
            many numbers as a term has outputs. Batch axis first, as that of all targets.
    """

    target: Any
    labels: Tensor


def holds_labels(targets: Any) -> bool:
    """Tell whether targets bring labels of their own, those of every head where there are heads."""
    if isinstance(targets, Mapping):
        return bool(targets) and all(holds_labels(own) for own in targets.values())
    while isinstance(targets, Weighted):
        targets = targets.target
    return isinstance(targets, Labelled)


def accepting(likelihood: Likelihood) -> Likelihood:
    """Let a likelihood of plain targets take `Weighted` and `Labelled` ones, either in the other.

    Args:
        likelihood: of plain targets.

    Returns:
        A likelihood whose every function takes off what it is given around the targets.
    """

    def root(f: Tensor, y: Any) -> Tensor:
        target, weight, _ = _unwrapped(f, y)
        vectors = likelihood.root(f, target)
        return vectors if weight is None else scaled(vectors, weight.sqrt())

    def gradient(f: Tensor, y: Any) -> Tensor:
        target, weight, _ = _unwrapped(f, y)
        vectors = likelihood.gradient(f, target)
        return vectors if weight is None else scaled(vectors, weight)

    def term_loss(f: Tensor, y: Any) -> Tensor:
        target, weight, _ = _unwrapped(f, y)
        losses = likelihood.term_loss(f, target)
        return losses if weight is None else scaled(losses[..., None], weight).squeeze(-1)

    def sample(f: Tensor, y: Any, key: Any, n: int) -> Any:
        target, _, labels = _unwrapped(f, y)
        if labels is None:
            return likelihood.sample(f, target, key, n)
        if labels.ndim < 2 or labels.shape[:2] != (f.shape[0], n):
            raise ValueError(
                f"expected {n} labels for each of {f.shape[0]} examples, [b, n, ...], got labels "
                f"of shape {tuple(labels.shape)}"
            )
        return labels.movedim(1, 0)

    def sampled_gradient(f: Tensor, y: Any, labels: Any) -> Tensor:
        target, weight, _ = _unwrapped(f, y)
        vectors = likelihood.sampled_gradient(f, target, labels)
        return vectors if weight is None else scaled(vectors, weight.sqrt())

    return likelihood._replace(
        term_loss=term_loss,
        root=root,
        gradient=gradient,
        sample=sample,
        sampled_gradient=sampled_gradient,
        denominator=lambda f, y: likelihood.denominator(f, _unwrapped(f, y)[0]),
    )


def _unwrapped(f: Tensor, y: Any) -> tuple[Any, Tensor | None, Tensor | None]:
    """Return plain targets, the weight of each term [b, *terms], and labels [b, n, ...]."""
    weight = labels = None
    while isinstance(y, (Weighted, Labelled)):
        if isinstance(y, Labelled):
            labels = y.labels
        else:
            given = spread(y.weight, f.shape[:-1], "weights of the terms").to(wide(f).dtype)
            weight = given if weight is None else weight * given
        y = y.target
    return y, weight, labels


def spread(tensor: Tensor, shape: torch.Size, what: str) -> Tensor:
    """Expand a tensor to a shape, which is not to grow by it."""
    sizes = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.ndim > len(shape) or any(size not in (1, full) for size, full in sizes):
        raise ValueError(
            f"expected {what} that broadcast to {tuple(shape)}, got shape {tuple(tensor.shape)}"
        )
    return tensor.expand(shape)


# ------------------------------------------------------------------------------- for likelihoods


def scaled(vectors: Tensor, factor: Tensor) -> Tensor:
    """Multiply vectors [..., *terms, C] by a factor of each term; by 0 gives 0, of NaN too."""
    factor = factor[..., None].to(vectors.dtype)
    return torch.where(factor == 0, 0, factor * vectors)


def aligned(f: Tensor, y: Any, lead: int = 0) -> Tensor:
    """Targets [*lead, b, *terms, C] of outputs f; where C = 1 they may lack the last axis."""
    check_tensor("targets", y)
    if y.shape[lead:] == f.shape:
        return y
    if f.shape[-1] == 1 and y.shape[lead:] == f.shape[:-1]:
        return y[..., None]
    raise ValueError(
        f"expected targets of the shape of the outputs, {tuple(f.shape)}, got "
        f"{tuple(y.shape[lead:])}"
    )

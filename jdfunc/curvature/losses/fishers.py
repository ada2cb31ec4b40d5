"""Kinds of Fisher matrices: which vectors are pulled back through the model.

F = w Σ_v Σ_n J_nᵀ v_n v_nᵀ J_n over examples n and vectors v [V, b, *terms, C] in the outputs. The
model may mix the terms of an example (attention, a convolution over time), so that J_n has rows of
several terms in it. Then vectors of two terms must not be added up, but for random signs.
"""

from __future__ import annotations  # Dynamo does not trace the annotations of inner functions

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdfunc.curvature.losses.targets import holds_labels
from jdfunc.curvature.losses.terms import Likelihood, draws
from jdfunc.random import Key, uniform

__all__ = [
    "Fisher",
    "default_fisher",
    "empirical",
    "forward_only",
    "monte_carlo",
    "signed",
    "type2",
]


class Fisher(NamedTuple):
    """A kind of Fisher matrix.

    Attributes:
        vectors: ``(likelihood, f, y, key) -> v [V, b, *terms, C]``, constants whatever f depends
            on, for outputs f [b, *terms, C] and targets y. Kinds that draw nothing do not read the
            key. None: nothing is pulled back, see `forward_only`.
        draws: ``(targets) -> bool``, whether vectors for such targets are random, and need a key.
    """

    vectors: Callable[[Likelihood, Tensor, Any, Any], Tensor] | None
    draws: Callable[[Any], bool] = lambda targets: False


def type2() -> Fisher:
    """Exact vectors: Σ_v v vᵀ is the Hessian of the loss in the outputs of an example.

    F is the generalised Gauss-Newton matrix, with nothing left to chance.

    Returns:
        The kind. V is that of the likelihood's root (C − 1 for cross entropy, else C) times the
        number of terms: each vector is zero in all terms but one. That is T² C numbers for an
        example of T terms; see `monte_carlo` and `signed` for long sequences.

    Example:
        >>> from jdfunc.curvature.losses.softmax import cross_entropy
        >>> vectors, y = type2().vectors, torch.zeros(1, 2, dtype=torch.int64)
        >>> vectors(cross_entropy(class_axis=-1), torch.zeros(1, 2, 3), y, None).shape
        torch.Size([4, 1, 2, 3])
    """

    def vectors(likelihood: Likelihood, f: Tensor, y: Any, key: Any) -> Tensor:
        root = likelihood.root(f.detach(), y)
        terms = f.shape[1:-1]
        if not terms:
            return root
        size = math.prod(terms)
        # where, not a product: an undefined term leaves the vectors of the others alone
        own = torch.eye(size, dtype=torch.bool, device=f.device).reshape(size, 1, 1, *terms, 1)
        return torch.where(own, root, 0).flatten(0, 1)

    return Fisher(vectors)


def monte_carlo(samples: int = 1) -> Fisher:
    """Gradients at labels that the model draws: unbiased with any number of samples.

    Labels come from the key alone, the same whenever it is. Targets `Labelled` bring their own.

    Args:
        samples: M, how many labels are drawn for each term; V = M.

    Returns:
        The kind. Vectors have their factor 1/√M.

    Raises:
        ValueError: `samples` is not a positive whole number.

    Example:
        >>> from jdfunc.curvature.losses.likelihoods import bce_with_logits
        >>> f = torch.zeros(1, 1)
        >>> monte_carlo(4).vectors(bce_with_logits(), f, f, 7).flatten()
        tensor([-0.2500, -0.2500,  0.2500,  0.2500])
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"expected samples to be a positive whole number, got {samples!r}")

    def vectors(likelihood: Likelihood, f: Tensor, y: Any, key: Any) -> Tensor:
        f = f.detach()
        labels = likelihood.sample(f, y, key, samples)
        return likelihood.sampled_gradient(f, y, labels) / math.sqrt(samples)

    return Fisher(vectors, lambda targets: not holds_labels(targets))


def empirical() -> Fisher:
    """Gradients at the true labels: F = w Σ g gᵀ of each example's gradient g. V = 1.

    Not the Gauss-Newton matrix, nor an estimate of it (Kunstner, Hennig and Balles, 2019,
    arXiv:1905.12558).

    Returns:
        The kind.

    Example:
        >>> from jdfunc.curvature.losses.likelihoods import mse
        >>> empirical().vectors(mse(), torch.tensor([[3.0]]), torch.tensor([[1.0]]), None)
        tensor([[[4.]]])
    """

    def vectors(likelihood: Likelihood, f: Tensor, y: Any, key: Any) -> Tensor:
        return likelihood.gradient(f.detach(), y)[None]

    return Fisher(vectors)


def forward_only() -> Fisher:
    """No vectors: factors of cotangents are the identity, and there is no backward pass.

    Returns:
        The kind; of use to KFAC alone.

    Example:
        >>> forward_only().vectors is None
        True
    """
    return Fisher(None)


def signed() -> Fisher:
    """The vectors of all terms at once, each term's with a random sign: unbiased.

    In the mean over signs, products of two terms cancel and those of one term are exact. Without
    term axes every sign is that of a whole vector, and F is that of `type2`.

    Returns:
        The kind; V is that of the likelihood's root, however many terms there are.

    Example:
        >>> from jdfunc.curvature.losses.likelihoods import mse
        >>> f = torch.zeros(1, 5, 1)
        >>> signed().vectors(mse(), f, f, 7).flatten()
        tensor([ 1.4142,  1.4142, -1.4142, -1.4142,  1.4142])
    """

    def vectors(likelihood: Likelihood, f: Tensor, y: Any, key: Key) -> Tensor:
        root = likelihood.root(f.detach(), y)
        heads = draws(uniform, key, f, (*root.shape[:-1], 1)) < 0.5
        return torch.where(heads, root, -root)

    return Fisher(vectors, lambda targets: True)


def default_fisher(ndim: int) -> Fisher:
    """The kind that estimators take unless told: exact where that costs no more than the classes.

    Args:
        ndim: how many axes the outputs [b, *terms, C] have.

    Returns:
        `type2` without term axes, outputs [b] included; `monte_carlo` with one sample with them.

    Example:
        >>> default_fisher(2).vectors is not None
        True
    """
    return type2() if ndim <= 2 else monte_carlo()

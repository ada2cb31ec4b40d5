"""Likelihoods of squared error, of binary cross entropy, and of a loss given as a function.

Vectors of one loss term, f its C outputs:

    loss                     type-2, Σ v vᵀ = Hessian   Monte Carlo              empirical
    Σᵢ (fᵢ − yᵢ)²            √2 eᵢ                      2 (f − ỹ), ỹ ~ N(f, ½)   2 (f − y)
    binary cross entropy     √(ωᵢ pᵢ(1−pᵢ)) eᵢ          √ω (p − ỹ), ỹ ~ p        t (l p − h y)

with p = sigmoid(f), and ω = t l, l = 1 + (h−1) y of weight t and pos_weight h. Cross entropy is in
`jdfunc.curvature.softmax`.
"""

from __future__ import annotations  # Dynamo does not trace the annotations of inner functions

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jdfunc.curvature.eigen import looks
from jdfunc.curvature.losses.targets import accepting, aligned, spread
from jdfunc.curvature.losses.terms import (
    Likelihood,
    Reduction,
    canonical_outputs,
    check_reduction,
    check_tensor,
    count,
    draws,
    mean_reduction,
    wide,
)
from jdfunc.random import Key, normal, uniform

__all__ = ["bce_with_logits", "custom", "mse"]


def mse(*, reduction: Reduction = mean_reduction) -> Likelihood:
    """Squared error Σᵢ (fᵢ − yᵢ)², minus the log likelihood of y ~ N(f, ½) up to a constant.

    Args:
        reduction: `mean_reduction`, over all numbers as torch's, or `sum_reduction`.

    Returns:
        The likelihood; targets have the shape of the outputs, which may be [b].

    Raises:
        TypeError: `reduction` is no function.

    Example:
        >>> mse().root(torch.zeros(1, 2), torch.zeros(1, 2)).squeeze(1)
        tensor([[1.4142, 0.0000],
                [0.0000, 1.4142]])
    """
    check_reduction(reduction)

    def residual(f: Tensor, y: Any) -> Tensor:
        return wide(f) - aligned(f, y).to(wide(f).dtype)

    def sample(f: Tensor, y: Any, key: Key, n: int) -> Tensor:
        noise = draws(normal, key, f, (n, *f.shape))
        return f + math.sqrt(0.5) * noise  # float64, so that large outputs do not swallow it

    return accepting(
        Likelihood(
            canonical=canonical_outputs,
            term_loss=lambda f, y: residual(f, y).square().sum(-1),
            root=lambda f, y: _diagonal(torch.full_like(wide(f), math.sqrt(2))),
            gradient=lambda f, y: 2 * residual(f, y),
            sample=sample,
            sampled_gradient=lambda f, y, labels: 2 * (f - aligned(f, labels, 1)).to(wide(f).dtype),
            denominator=lambda f, y: count(f),
            reduction=reduction,
        )
    )


def bce_with_logits(
    *,
    reduction: Reduction = mean_reduction,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Likelihood:
    """Binary cross entropy of logits, Σᵢ −tᵢ (hᵢ yᵢ log pᵢ + (1 − yᵢ) log(1 − pᵢ)).

    Args:
        reduction: `mean_reduction`, over all numbers as torch's, or `sum_reduction`.
        weight: t ≥ 0, broadcasts to the outputs, [C] or [*terms, C]; 1 if None. Weights of examples
            are no hyperparameter: see `Weighted`.
        pos_weight: h ≥ 0 of the positive label, broadcasts likewise; 1 if None.

    Returns:
        The likelihood; targets in [0, 1] have the shape of the outputs, which may be [b].

    Raises:
        TypeError: `reduction` is no function, or a weight no tensor.

    Example:
        >>> likelihood = bce_with_logits(pos_weight=torch.tensor([3.0]))
        >>> likelihood.root(torch.zeros(2, 1), torch.tensor([[0.0], [1.0]])).squeeze(0)
        tensor([[0.5000],
                [0.8660]])
    """
    check_reduction(reduction)
    if weight is not None:
        check_tensor("weight", weight)
    if pos_weight is not None:
        check_tensor("pos_weight", pos_weight)

    def sides(f: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        """What −log p and −log(1 − p) are multiplied by: t h y and t (1 − y)."""
        y, f = aligned(f, y).to(wide(f).dtype), wide(f)
        t = 1 if weight is None else spread(weight, f.shape, "weight").to(f.dtype)
        h = 1 if pos_weight is None else spread(pos_weight, f.shape, "pos_weight").to(f.dtype)
        return t * h * y, t * (1 - y)

    def omega(f: Tensor, y: Any) -> Tensor:
        positive, negative = sides(f, y)
        return positive + negative

    def term_loss(f: Tensor, y: Any) -> Tensor:
        (positive, negative), f = sides(f, y), wide(f)
        log = torch.nn.functional.logsigmoid
        return -(positive * log(f) + negative * log(-f)).sum(-1)

    def root(f: Tensor, y: Any) -> Tensor:
        variance = wide(f).sigmoid() * (-wide(f)).sigmoid()  # p(1 − p), p = 1 to rounding too
        return _diagonal((omega(f, y) * variance).sqrt())

    def gradient(f: Tensor, y: Any) -> Tensor:
        (positive, negative), f = sides(f, y), wide(f)
        return negative * f.sigmoid() - positive * (-f).sigmoid()

    def sample(f: Tensor, y: Any, key: Key, n: int) -> Tensor:
        u = draws(uniform, key, f, (n, *f.shape))
        return (u < f.to(u.dtype).sigmoid()).to(wide(f).dtype)

    def sampled_gradient(f: Tensor, y: Any, labels: Tensor) -> Tensor:
        labels = aligned(f, labels, 1).to(wide(f).dtype)
        return omega(f, y).sqrt() * (wide(f).sigmoid() - labels)

    return accepting(
        Likelihood(
            canonical=canonical_outputs,
            term_loss=term_loss,
            root=root,
            gradient=gradient,
            sample=sample,
            sampled_gradient=sampled_gradient,
            denominator=lambda f, y: count(f),
            reduction=reduction,
        )
    )


def custom(
    term_loss: Callable[[Tensor, Any], Tensor],
    *,
    sample: Callable[[Tensor, Any, Any, int], Any] | None = None,
    sampled_gradient: Callable[[Tensor, Any, Any], Tensor] | None = None,
    denominator: Callable[[Tensor, Any], Tensor] | None = None,
    reduction: Reduction = mean_reduction,
) -> Likelihood:
    """A likelihood from its loss terms: Hessians by `torch.func`, roots by eigendecomposition.

    Args:
        term_loss: ``(f, y) -> losses [b, *terms]`` for outputs f [b, *terms, C], minus the log
            likelihood of each term, no mean taken. The loss of a term may read no outputs but its
            own C. For outputs [b], f is [b, 1].
        sample: ``(f, y, key, n) -> labels [n, ...]`` of the model, each of the n like y, for
            `monte_carlo`; see `jdfunc.random`.
        sampled_gradient: ``(f, y, labels) -> v [n, b, *terms, C]``, the mean of whose squares v vᵀ
            is the Hessian; None for the gradients of ``term_loss(f, label)``.
        denominator: ``(f, y) -> scalar``, what examples add to the divisor of a mean; the number
            of terms if None.
        reduction: `mean_reduction` or `sum_reduction`.

    Returns:
        The likelihood. Its root raises ValueError where a Hessian has a negative eigenvalue, and
        is NaN there under transforms and in compiled code, which see no values: there is no root
        then, and `empirical` needs none. What counts as rounding, and as 0, is 100 C eps times the
        largest eigenvalue, or times 1: log likelihoods and outputs are taken to be of order one.

    Raises:
        TypeError: `term_loss` or `reduction` is no function.

    Cost: C backward passes through `term_loss`, and an eigh [C, C] for each term.

    Example:
        >>> poisson = custom(lambda f, y: (f.exp() - y * f).sum(-1))
        >>> poisson.root(torch.tensor([[0.0, 2.0]]), torch.ones(1, 2)).squeeze(1).abs()
        tensor([[1.0000, 0.0000],
                [0.0000, 2.7183]])
    """
    check_reduction(reduction)
    if not callable(term_loss):
        raise TypeError(f"expected term_loss to be a function, got {type(term_loss).__name__}")

    def losses(f: Tensor, y: Any) -> Tensor:
        terms = term_loss(f, y)
        check_tensor("what term_loss returns", terms)
        if terms.shape != f.shape[:-1]:
            raise ValueError(
                f"expected term_loss to return one loss for each term, {tuple(f.shape[:-1])}, got "
                f"{tuple(terms.shape)}; outputs that share a loss stand on the last axis"
            )
        return terms

    def gradient(f: Tensor, y: Any) -> Tensor:
        return torch.func.grad(lambda f: losses(f, y).sum())(wide(f))

    def root(f: Tensor, y: Any) -> Tensor:
        pull: Any = torch.func.vjp(lambda f: gradient(f, y), wide(f))[1]
        eye = torch.eye(f.shape[-1], dtype=wide(f).dtype, device=f.device)
        units = eye.reshape(-1, *[1] * (f.ndim - 1), f.shape[-1]).expand(-1, *f.shape)
        return _root(torch.vmap(lambda unit: pull(unit)[0])(units).movedim(0, -2))

    def no_sample(f: Tensor, y: Any, key: Any, n: int) -> Any:
        raise ValueError(
            "expected a sampler for Monte-Carlo labels, got none: pass "
            "custom(..., sample=(f, y, key, n) -> labels), or take type2() or empirical()"
        )

    def label_gradient(f: Tensor, y: Any, labels: Any) -> Tensor:
        return torch.vmap(lambda label: gradient(f, label))(labels)

    return accepting(
        Likelihood(
            canonical=canonical_outputs,
            term_loss=lambda f, y: losses(wide(f), y),
            root=root,
            gradient=gradient,
            sample=sample or no_sample,
            sampled_gradient=sampled_gradient or label_gradient,
            denominator=denominator or (lambda f, y: count(f[..., 0])),
            reduction=reduction,
        )
    )


def _root(hessian: Tensor) -> Tensor:
    """Columns v [C, b, *terms, C] with Σ_v v vᵀ = hessian [b, *terms, C, C], if there are any."""
    finite = hessian.isfinite().all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, hessian, 0))
    rounding = 100 * hessian.shape[-1] * torch.finfo(hessian.dtype).eps
    # Derivatives of a sure softmax are 1e-24, and the 1 − p that went into them is wrong by eps.
    negative = values < -rounding * values.abs().amax(-1, keepdim=True).clamp(min=1)
    if looks(hessian) and bool(negative.any()):
        raise ValueError(
            "expected a loss that is convex in the outputs, got a Hessian with the eigenvalue "
            f"{values.min().item():.3g}; take empirical() or monte_carlo()"
        )
    columns = vectors * values.clamp(min=0).sqrt()[..., None, :]
    valid = finite & ~negative.any(-1)[..., None, None]
    return torch.where(valid, columns, torch.nan).movedim(-1, 0)


def _diagonal(entries: Tensor) -> Tensor:
    """Columns [C, b, *terms, C] of the diagonal matrices with these entries."""
    return entries.diag_embed().movedim(-2, 0)

"""Several heads on one trunk: outputs are independent given x, so that F = Σ_k ω_k w_k F_k.

The vectors of all heads go back through one model, each zero in the outputs of the others. What
they add up to has one factor w; the rest of each head's is put into its vectors, √(w_k / w) v.
Means have w_k = 1 / Σ_n d_k(n), where example n adds d_k(n) to the divisor. With d = Σ_k d_k and
w = 1 / Σ_n d(n), one pass knows w_k / w = d(n) / d_k(n) if that is the same number for every
example. Whether it was is known in the end, since (Σ_n d d_k)² = Σ_n d² Σ_n d_k² only then.
"""

from __future__ import annotations  # Dynamo does not trace the annotations of inner functions

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc import pytrees, random
from jdfunc.curvature.eigen import looks
from jdfunc.curvature.losses.terms import Likelihood, Reduction, mean_reduction, sum_reduction
from jdfunc.random import Key

__all__ = ["Heads", "joint_vectors", "several"]

#: ``(likelihood, f, y, key) -> v``, see `jdfunc.curvature.Fisher`.
MakeVectors = Callable[[Likelihood, Tensor, Any, Any], Tensor]


class Heads(NamedTuple):
    """The likelihoods of a model whose outputs are a dict: see `several`.

    Attributes:
        likelihoods: by head.
        weights: ω, by head.
        divisors: what an example adds to the divisor of a mean, by head; of some heads.
        reduction: ``(denominator, examples, batches, num_data) -> w``.
    """

    likelihoods: dict[str, Likelihood]
    weights: dict[str, float]
    divisors: dict[str, float]
    reduction: Reduction


def several(
    likelihoods: Mapping[str, Likelihood],
    *,
    weights: Mapping[str, float] | None = None,
    divisors: Mapping[str, float] | None = None,
) -> Heads:
    """The likelihoods of several heads: F = Σ_k ω_k w_k F_k, the curvature of Σ_k ω_k loss_k.

    Outputs are a dict of heads and so are the targets; outputs of no likelihood here do not count.
    Heads may have any shapes, and term axes of their own. Every kind of Fisher matrix is taken of
    each head on its own: V = Σ_k V_k vectors, and none of two heads are added up, of `empirical`
    neither. For the curvature of one task alone, take the likelihood of that head alone.

    Args:
        likelihoods: by head, with one reduction: the sum or the mean.
        weights: ω ≥ 0 by head; 1 where not given.
        divisors: what one example adds to the divisor of a head's mean, where that is no count of
            outputs or terms: w_k = 1 / (N divisor). A mean with ignored terms, with class weights
            or over sequences of different lengths adds another number with each example; pass its
            average over the data for torch's mean, or 1 for a mean over examples.

    Returns:
        What `ekfac` and `kfac` take as a likelihood. Exact for sums, and for means where each head
        adds in fixed proportion to the others (any fixed shapes; or one mask for all heads). For
        other means ``refresh`` and ``finalize`` raise ValueError, with the divisors that make them
        exact; under transforms and in compiled code, which see no values, they give NaN.

    Raises:
        TypeError: a likelihood is none.
        ValueError: there are no likelihoods, they have different reductions or one that is neither
            `sum` nor `mean`, weights or divisors are of other heads or out of range, or divisors
            are given for sums.

    Example:
        >>> from jdfunc import curvature as cv
        >>> def apply(params, buffers, x):
        ...     h = x @ params["trunk"]
        ...     return {"class": h @ params["head"], "size": h[:, 0]}
        >>> params = {"trunk": torch.eye(2), "head": torch.ones(2, 3)}
        >>> x, y = torch.eye(2), {"class": torch.tensor([0, 2]), "size": torch.zeros(2)}
        >>> layout = cv.curvature_layout(apply, params, None, x)
        >>> heads = several({"class": cv.cross_entropy(), "size": cv.mse()}, weights={"size": 0.5})
        >>> cv.trace(cv.build(cv.ekfac(layout, likelihood=heads), params, None, [(x, y)]))
        tensor(1.6667)
    """
    if not likelihoods:
        raise ValueError("expected likelihoods of at least one head, got none")
    for name, likelihood in likelihoods.items():
        if not isinstance(likelihood, Likelihood):
            raise TypeError(
                f"expected a Likelihood such as mse() for head {name!r}, got "
                f"{type(likelihood).__name__}"
            )
    reductions = {likelihood.reduction for likelihood in likelihoods.values()}
    if len(reductions) > 1 or not reductions <= {mean_reduction, sum_reduction}:
        raise ValueError(
            "expected heads with one reduction, jdfunc.curvature.mean or jdfunc.curvature.sum, got "
            f"{sorted(getattr(r, '__name__', repr(r)) for r in reductions)}; scale heads by weights"
        )
    weights, divisors = dict(weights or {}), dict(divisors or {})
    if divisors and reductions == {sum_reduction}:
        raise ValueError("expected divisors of means, got divisors of sums; scale heads by weights")
    for what, given in (("weights", weights), ("divisors", divisors)):
        if unknown := sorted(set(given) - set(likelihoods)):
            raise ValueError(f"expected {what} of {list(likelihoods)}, got {unknown}")
    if any(not value >= 0 for value in weights.values()):
        raise ValueError(f"expected weights of at least 0, got {weights}")
    if any(not value > 0 for value in divisors.values()):
        raise ValueError(f"expected divisors greater than 0, got {divisors}")

    names = list(likelihoods)
    reduction = _summed if reductions == {sum_reduction} else _mean_of(names)
    return Heads(dict(likelihoods), weights, divisors, reduction)


def joint_vectors(
    likelihood: Likelihood | Heads, make: MakeVectors | None, outputs: Any, targets: Any, key: Key
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs that are differentiated, the vectors they are pulled back with, and the divisor.

    Args:
        likelihood: of one head or of several.
        make: the vectors of a Fisher matrix; None for none.
        outputs: of the model.
        targets: as they are given.
        key: of random vectors.

    Returns:
        Outputs f [b, ...], vectors [V, b, ...] (f itself where there are none), and what these
        examples add to the denominator, of shape `counted(likelihood)`.

    Raises:
        TypeError: outputs or targets of several heads are no dict.
        ValueError: a head has no outputs, or no targets.
    """
    if isinstance(likelihood, Heads):
        return _of_heads(likelihood, make, outputs, targets, key)
    f = likelihood.canonical(outputs)
    fixed = f.detach()
    vectors = fixed[None] if make is None else make(likelihood, fixed, targets, key)
    return f, vectors, likelihood.denominator(fixed, targets)


def counted(likelihood: Likelihood | Heads) -> tuple[int, ...]:
    """The shape of what is summed for the divisors of means.

    Args:
        likelihood: of one head or of several.

    Returns:
        () of one head; of several (3 K,), Σ d_k, Σ d d_k and Σ d_k².
    """
    return (3 * len(likelihood.likelihoods),) if isinstance(likelihood, Heads) else ()


def _of_heads(
    heads: Heads, make: MakeVectors | None, outputs: Any, targets: Any, key: Key
) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of each head, padded with zeros for the others."""
    _check_heads("outputs", heads, outputs)
    _check_heads("targets", heads, targets)
    found = [
        joint_vectors(own, make, outputs[name], targets[name], random.fold_in(key, k))
        for k, (name, own) in enumerate(heads.likelihoods.items())
    ]
    divisors = [
        d.new_full((), float(heads.divisors[name] * f.shape[0])) if name in heads.divisors else d
        for name, (f, _, d) in zip(heads.likelihoods, found, strict=True)
    ]
    d = torch.stack([_exact(d) for d in divisors])
    share = torch.ones_like(d)
    if heads.reduction is not _summed:
        share = torch.where(d == 0, 0, d.sum(0) / torch.where(d == 0, 1, d))
    # Outputs that do not count are differentiated too: the layers below them have zero cotangents.
    others = [pytrees.leaves(outputs[name]) for name in outputs if name not in heads.likelihoods]
    rest = [x.reshape(len(x), -1) for own in others for x in own if x.is_floating_point()]
    f = torch.cat([*(f.flatten(1) for f, _, _ in found), *rest], 1)
    rows, start = [], 0
    for name, part, (_, v, _) in zip(heads.likelihoods, share, found, strict=True):
        own = v.flatten(2) * (heads.weights.get(name, 1.0) * part).sqrt().to(v.dtype)
        rows.append(F.pad(own, (start, f.shape[1] - start - own.shape[2])))
        start += own.shape[2]
    return f, torch.cat(rows), torch.cat([d, d.sum(0) * d, d * d])


def _check_heads(what: str, heads: Heads, given: Any) -> None:
    names = list(heads.likelihoods)
    if not isinstance(given, Mapping):
        raise TypeError(f"expected {what} to be a dict of {names}, got {type(given).__name__}")
    if missing := [name for name in names if name not in given]:
        raise ValueError(
            f"expected {what} of {names}, got no {what} of {missing}, only of {list(given)}; a "
            "likelihood whose terms are all ignored takes targets too"
        )


def _summed(
    denominator: Tensor,
    examples: Tensor,
    batches: Tensor | None = None,
    num_data: float | None = None,
) -> Tensor:
    """The factor of a sum."""
    return sum_reduction(denominator[0], examples, batches, num_data)


def _mean_of(names: list[str]) -> Reduction:
    def reduction(
        denominator: Tensor,
        examples: Tensor,
        batches: Tensor | None = None,
        num_data: float | None = None,
    ) -> Tensor:
        """The factor of the first head's mean, if it decides those of the others."""
        d, products, squares = denominator.unflatten(-1, (3, len(names)))
        rounding = 1e-9 if d.dtype == torch.float64 else 1e-5
        proportional = (products.square() >= (1 - rounding) * products.sum(0) * squares).all()
        if looks(proportional) and not bool(proportional):
            averages = zip(names, (d / examples).tolist(), strict=True)
            average = {name: value for name, value in averages if value > 0}
            raise ValueError(
                "expected heads whose means divide by numbers in a fixed proportion, got examples "
                "that add in different ones (ignored terms, class weights, sequences of different "
                f"lengths): pass several(..., divisors={average}), which is exact for these data, "
                "or take sums and weights"
            )
        return torch.where(proportional, mean_reduction(d.sum(0), examples), torch.nan)

    return reduction


def _exact(divisor: Tensor) -> Tensor:
    """A divisor in a dtype whose products are exact."""
    return divisor.to(torch.float32 if divisor.device.type == "mps" else torch.float64)

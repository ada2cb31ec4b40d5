"""The likelihood of a label under the softmax of the outputs: cross entropy.

With p = softmax(f), ω = Σ_c q_c and q = ((1−ε) y + ε/C) c of smoothing ε and class weights c, y
one-hot or soft, a term is −Σ_c q_c log p_c, and its vectors are

    type-2        √ω √p_c (e_c − p), in C − 1 combinations
    Monte Carlo   √ω (p − e_ỹ), ỹ ~ p
    empirical     ω p − q
"""

from __future__ import annotations  # Dynamo does not trace the annotations of inner functions

from typing import Any

import torch
from torch import Tensor

from jdfunc.curvature.losses.targets import accepting, scaled
from jdfunc.curvature.losses.terms import (
    Likelihood,
    Reduction,
    canonical_outputs,
    check_reduction,
    check_tensor,
    draws,
    mean_reduction,
    wide,
)
from jdfunc.random import Key, uniform

__all__ = ["cross_entropy"]


def cross_entropy(
    *,
    reduction: Reduction = mean_reduction,
    class_axis: int = 1,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Likelihood:
    """Cross entropy of softmax(f), with the options of torch's and in their meaning.

    The root has C − 1 columns: H = diag(r) (I − r rᵀ) diag(r) with r = √p, and a Householder
    reflection that takes −r to a unit vector e_m has in its other columns an orthonormal basis of
    what I − r rᵀ projects on.

    Args:
        reduction: `mean_reduction`, torch's mean, which divides by the weights of the labels that
            are not ignored, and for soft labels by the number of terms; or `sum_reduction`.
        class_axis: of the outputs, and of soft labels. 1 as in torch; -1 for [b, *terms, C].
        ignore_index: the label of terms that count for nothing.
        weight: of each class, [C], none negative; 1 if None.
        label_smoothing: ε in [0, 1], the share of the uniform distribution.

    Returns:
        The likelihood; targets are integers [b, *terms], or probabilities of the shape of the
        outputs.

    Raises:
        TypeError: `reduction` is no function, `weight` no tensor.
        ValueError: the class axis is that of the batch, `weight` is no vector, or ε is not in
            [0, 1].

    Example:
        >>> likelihood = cross_entropy(ignore_index=-1)
        >>> f, y = torch.zeros(2, 3), torch.tensor([0, -1])
        >>> v = likelihood.root(f, y)
        >>> torch.einsum("vbi, vbj -> bij", v, v)[0]
        tensor([[ 0.2222, -0.1111, -0.1111],
                [-0.1111,  0.2222, -0.1111],
                [-0.1111, -0.1111,  0.2222]])
        >>> likelihood.denominator(f, y)
        tensor(1.)
    """
    check_reduction(reduction)
    if weight is not None:
        check_tensor("weight", weight)
    if weight is not None and weight.ndim != 1:
        raise ValueError(f"expected one weight for each class, got shape {tuple(weight.shape)}")
    if class_axis == 0:
        raise ValueError("expected a class axis other than 0, that of the batch")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"expected label_smoothing in [0, 1], got {label_smoothing}")

    def distribution(f: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        """Return q [b, *terms, C], and what each term adds to the divisor of a mean."""
        soft, kept = _probabilities(f, y, class_axis, ignore_index)
        c = torch.ones_like(soft[..., :1]) if weight is None else _class_weights(weight, f)
        q = scaled(((1 - label_smoothing) * soft + label_smoothing / f.shape[-1]) * c, kept)
        counted = kept if y.is_floating_point() else kept * (soft * c).sum(-1)
        return q, counted

    def term_loss(f: Tensor, y: Any) -> Tensor:
        q, _ = distribution(f, y)
        return -torch.where(q == 0, 0, q * wide(f).log_softmax(-1)).sum(-1)

    def root(f: Tensor, y: Any) -> Tensor:
        q, _ = distribution(f, y)
        return scaled(_softmax_root(wide(f)), q.sum(-1).sqrt())

    def gradient(f: Tensor, y: Any) -> Tensor:
        q, _ = distribution(f, y)
        return scaled(wide(f).softmax(-1), q.sum(-1)) - q

    def sample(f: Tensor, y: Any, key: Key, n: int) -> Tensor:
        u = draws(uniform, key, f, (n, *f.shape[:-1], 1))
        p = f.to(u.dtype).softmax(-1)
        # Classes without a chance are out, even where a parallel sum is rounded up.
        below = p.cumsum(-1).masked_fill(p == 0, 0)
        return (u * below.amax(-1, keepdim=True) < below).to(torch.uint8).argmax(-1)

    def sampled_gradient(f: Tensor, y: Any, labels: Tensor) -> Tensor:
        if labels.shape[1:] != f.shape[:-1]:
            expected = ("n", *f.shape[:-1])
            raise ValueError(f"expected labels of shape {expected}, got {tuple(labels.shape)}")
        p, (q, _) = wide(f).softmax(-1), distribution(f, y)
        return scaled(p - _one_hot(p, labels), q.sum(-1).sqrt())

    return accepting(
        Likelihood(
            canonical=lambda outputs: canonical_outputs(outputs, class_axis),
            term_loss=term_loss,
            root=root,
            gradient=gradient,
            sample=sample,
            sampled_gradient=sampled_gradient,
            denominator=lambda f, y: distribution(f, y)[1].sum(),
            reduction=reduction,
        )
    )


def _probabilities(f: Tensor, y: Any, class_axis: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Labels as probabilities [b, *terms, C], and 1 for the terms that are kept, [b, *terms]."""
    check_tensor("targets", y)
    everything = torch.ones_like(wide(f[..., 0]))
    if y.is_floating_point():
        if ignore_index >= 0:
            raise ValueError("expected integer labels where ignore_index is set, got soft labels")
        soft = y.movedim(class_axis, -1) if y.ndim == f.ndim else y
        if soft.shape != f.shape:
            raise ValueError(
                f"expected integer labels of shape {tuple(f.shape[:-1])}, or soft ones of the "
                f"shape of the outputs, got {y.dtype} of shape {tuple(y.shape)}"
            )
        return soft.to(everything.dtype), everything
    if y.shape != f.shape[:-1] or y.dtype == torch.bool:
        raise ValueError(
            f"expected integer labels of shape {tuple(f.shape[:-1])}, got {y.dtype} of shape "
            f"{tuple(y.shape)}, for outputs that have their {f.shape[-1]} classes on axis "
            f"{class_axis}; class_axis=-1 is that of outputs [b, *terms, C]"
        )
    kept = y != ignore_index
    return _one_hot(wide(f), torch.where(kept, y, 0)), kept * everything


def _class_weights(weight: Tensor, f: Tensor) -> Tensor:
    if weight.shape != f.shape[-1:]:
        raise ValueError(
            f"expected weights of {f.shape[-1]} classes, got shape {tuple(weight.shape)}"
        )
    return weight.to(wide(f).dtype)


def _one_hot(p: Tensor, labels: Tensor) -> Tensor:
    """One-hot vectors [*labels.shape, C]; the scatter complains of labels out of range."""
    zeros = p.new_zeros(*labels.shape, p.shape[-1])
    return zeros.scatter(-1, labels.long()[..., None], 1.0)


def _softmax_root(f: Tensor) -> Tensor:
    """Columns v [C − 1, b, *terms, C] with Σ_v v vᵀ = diag(p) − p pᵀ."""
    r = (f.log_softmax(-1) / 2).exp()
    # u = r + e_m for the largest r_m: no difference of near numbers, however sure the softmax is.
    largest, m = r.max(-1, keepdim=True)
    classes = torch.arange(f.shape[-1], device=f.device)
    k = classes[:-1] + (classes[:-1] >= m)  # the others, [b, *terms, C − 1]
    u = r + (classes == m)
    step = (r.gather(-1, k) / (1 + largest)).movedim(-1, 0)[..., None]
    is_k = (k[..., None] == classes).movedim(-2, 0)
    return r * (is_k.to(r.dtype) - step * u)

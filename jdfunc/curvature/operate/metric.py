"""F as a metric on rows of a Jacobian: J₁ (F + damping)⁻¹ J₂ᵀ, and what it is read as."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from jdfunc import algebra
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.damping import Damping, exact
from jdfunc.curvature.operate.operators import inverse
from jdfunc.curvature.operate.powers import Power
from jdfunc.types import Params, Rows

__all__ = ["influence", "laplace_variance", "metric_gramian", "natural_step"]


def metric_gramian(
    curv: Curvature | Power,
    rows: Rows,
    other: Rows | None = None,
    *,
    damping: Damping | None = None,
    row_ndim: int = 1,
    max_block_bytes: int = algebra.MAX_BLOCK_BYTES,
) -> Tensor:
    """Gramian of rows in the metric of F: G = J₁ (F + damping)⁻¹ J₂ᵀ.

    Factored rows (`jdfunc.structured`) stay factored where the inverse of a block is a product: in
    KFAC with `plain` or `heuristic` damping, or with none. Elsewhere their sides are rotated and
    the rotated rows materialised, some columns at a time.

    Leverage scores, the diagonal of J (JᵀJ + d)⁻¹ Jᵀ, are that of 2 G where F = 2 Σ JᵀJ (`mse`,
    reduction `sum`) and the damping is 2 d. Blocks of the NTK, F = 1, are `jdfunc.gram`.

    Args:
        curv: F; or what `inverse` returns, which has its damping.
        rows: J₁, a pytree of rows: dense leaves [*rows, *param.shape], or factored ones.
        other: J₂, rows of another batch or model; J₁ itself if None, and then G is symmetric
            positive semidefinite.
        damping: a rule; the curvature's own if None.
        row_ndim: how many leading axes of a dense leaf are row axes.
        max_block_bytes: bound on the memory of one block of temporaries, in bytes.

    Returns:
        G, [*rows, *reversed(rows of other)]: [m, q] for vectors of losses. Accumulated in float32
        at least. Units loss² / (param² F).

    Raises:
        ValueError: rows and curvature are not of the same params, or a damping is given for an
            inverse that has one.

    Cost: for a block [i, j] and m dense rows, m i j (i + j) multiply-adds to rotate them, m² i j
    for their products; for factored rows of s positions, m s (i² + j²) to rotate and, where they
    are materialised, m s i j to do so.

    Example:
        >>> import torch
        >>> from jdfunc.curvature.blocks import Block, Spectrum
        >>> layout = (Block(("w",), ((2,),), ((1, 1, 2),)),)
        >>> F = {"w": Spectrum(None, None, torch.tensor([[[1.0, 3.0]]]))}
        >>> metric_gramian(Curvature(layout, F, exact(1.0)), {"w": torch.eye(2)})
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    metric = _prepared(curv, damping)
    return metric.gram(rows, other, row_ndim=row_ndim, max_block_bytes=max_block_bytes)


def natural_step(
    curv: Curvature | Power,
    rows: Rows,
    weighting: Callable[[Tensor], Tensor],
    *,
    damping: Damping | None = None,
) -> Params:
    """Natural Jacobian descent: (F + damping)⁻¹ Jᵀ w with w of the Gramian in the metric of F.

    With θ' = F^(½) θ it is Jacobian descent in θ', so what a weighting promises of G w, that no
    loss rises to first order, holds of this direction. `jdfunc.jd_step` does the same for a
    model, with ``metric=inverse(curv)``.

    Args:
        curv: F; or what `inverse` returns.
        rows: J, a pytree of rows with one row axis, dense or factored.
        weighting: ``gramian [m, m] -> weights [m]``, such as `jdfunc.upgrad`.
        damping: a rule; the curvature's own if None.

    Returns:
        The direction, to be subtracted: a pytree like the params.
    """
    metric = _prepared(curv, damping)
    return metric(algebra.combine(rows, weighting(metric.gram(rows))))


def influence(
    curv: Curvature | Power,
    test_rows: Rows,
    train_rows: Rows,
    *,
    damping: Damping | None = None,
    row_ndim: int = 1,
) -> Tensor:
    """Influence of training examples on test losses: J_test (F + damping)⁻¹ J_trainᵀ.

    To first order, adding ε times the loss of training example n to the objective whose curvature
    is F + damping lowers test loss t by ε I[t, n]. Positive: more weight on that example lowers the
    test loss. No factor of the number of examples is hidden: where F is that of a mean over N
    examples, one more example has ε = 1/N.

    Args:
        curv: F; or what `inverse` returns.
        test_rows: gradients of the test losses, a pytree of rows.
        train_rows: gradients of the training losses, a pytree of rows.
        damping: a rule; the curvature's own if None.
        row_ndim: how many leading axes of a dense leaf are row axes.

    Returns:
        I, [tests, examples] for one row axis each.

    References:
        Koh and Liang, Understanding Black-box Predictions via Influence Functions, 2017,
        arXiv:1703.04730 (there I_up,loss, of the opposite sign); Grosse et al., Studying Large
        Language Model Generalization with Influence Functions, 2023, arXiv:2308.03296.
    """
    return metric_gramian(curv, test_rows, train_rows, damping=damping, row_ndim=row_ndim)


def laplace_variance(
    curv: Curvature,
    rows: Rows,
    prior_precision: float | Tensor | Damping,
    *,
    row_ndim: int = 1,
) -> Tensor:
    """Variances of a linearised model under a Laplace posterior: g (F + δ)⁻¹ gᵀ for every row g.

    F must be that of the sum of the losses over the data (reduction "sum"), so that F + δ is the
    precision of the posterior N(θ, (F + δ)⁻¹).

    Args:
        curv: F.
        rows: ∂f(x)/∂θ, a pytree of rows [*rows, *param.shape], dense or factored: for outputs
            [b, C], two row axes.
        prior_precision: δ, a number or a tensor without axes; or a rule, for a precision per block:
            ``per_block({name: exact(δ)}, otherwise=exact(δ₀))``.
        row_ndim: how many leading axes of a dense leaf are row axes.

    Returns:
        Variances [*rows]. The whole covariance of all rows is
        ``metric_gramian(curv, rows, damping=exact(δ), row_ndim=...)``.
    """
    rule = prior_precision if callable(prior_precision) else exact(prior_precision)
    return inverse(curv, rule).squared_norms(rows, row_ndim=row_ndim)


def _prepared(curv: Curvature | Power, damping: Damping | None) -> Power:
    if not isinstance(curv, Power):
        return inverse(curv, damping)
    if damping is not None:
        raise ValueError("expected no damping with an inverse that is prepared, which has its own")
    return curv

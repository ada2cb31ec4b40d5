"""KFAC and EKFAC: state in, state out.

state = est.init(params)
state = est.update(state, params, buffers, (inputs, targets), key)
state = est.refresh(state)
state = est.update_eigenvalues(state, params, buffers, (inputs, targets), key)
curv = est.finalize(state)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from jdfunc import pytrees
from jdfunc.checks import check_positive
from jdfunc.curvature.estimate import steps
from jdfunc.curvature.estimate.capture import PositionMask
from jdfunc.curvature.estimate.passes import Precision, Setup
from jdfunc.curvature.estimate.sharing import Sharing, expand
from jdfunc.curvature.estimate.state import State
from jdfunc.curvature.layouts.layout import Layout
from jdfunc.curvature.losses.fishers import Fisher, default_fisher
from jdfunc.curvature.losses.several import Heads
from jdfunc.curvature.losses.terms import Likelihood
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.damping import Damping, relative
from jdfunc.random import Key

DEFAULT_PRECISION, DEFAULT_DAMPING = Precision(), relative(1e-3)


class Update(Protocol):
    """Adds one batch to a state: pure."""

    def __call__(
        self, state: State, params: Any, buffers: Any, batch: tuple[Any, Any], key: Key | None = ...
    ) -> State:
        """Return the next state."""
        ...


class Estimator(NamedTuple):
    """Curvature by pure functions.

    Attributes:
        init: ``init(params) -> state``.
        update: ``update(state, params, buffers, (inputs, targets), key=None) -> state``: adds the
            factors of a batch; also its eigenvalues once there is a basis, with ``decay``.
        refresh: ``refresh(state) -> state``: diagonalises the factors; sums of eigenvalues start
            anew, averages are carried over to the new basis.
        update_eigenvalues: as ``update``, but only the eigenvalues: the second pass over the data.
        finalize: ``finalize(state, num_data=None) -> Curvature``.
        setup: what is estimated, and how: static.
    """

    init: Callable[[Any], State]
    update: Update
    refresh: Callable[[State], State]
    update_eigenvalues: Update
    finalize: Callable[..., Curvature]
    setup: Setup


def ekfac(
    layout: Layout,
    *,
    likelihood: Likelihood | Heads,
    fisher: Fisher | None = None,
    sharing: Sharing = expand,
    position_mask: PositionMask | None = None,
    joint_bias: bool = True,
    decay: float | None = None,
    basis_every: int | None = None,
    chunk_size: int | None = None,
    vector_chunk: int | None = None,
    precision: Precision = DEFAULT_PRECISION,
    damping: Damping = DEFAULT_DAMPING,
) -> Estimator:
    """EKFAC: the eigenbasis of KFAC, with the eigenvalues that belong to it.

    Each layer's block is approximated in the basis of its Kronecker factors,

        F ≈ (Q_B ⊗ Q_A) diag(λ) (Q_B ⊗ Q_A)ᵀ,    λ = w Σ_v Σ_n (Q_Bᵀ G_vn Q_A)²,

    with G_vn the gradient of example n's vector v: the best diagonal in that basis, no farther from
    the exact block than KFAC, and of the same trace. Layers used at many positions, which KFAC
    gets wrong by their number, gain most.

    Args:
        layout: from `curvature_layout`.
        likelihood: `mse`, `cross_entropy`, `bce_with_logits`, `custom`; with its reduction. Of a
            model with several heads: `several`.
        fisher: `type2`, `monte_carlo(samples)`, `empirical` or `signed`; `type2` for outputs [b, C]
            and `monte_carlo(1)` for sequences if None.
        sharing: `expand` or `reduce`: what the factors are taken of. λ is exact for both.
        position_mask: ``inputs -> [b, s]``: which positions count in A, 0 for padding, in the
            layers that are used at s positions; all if None.
        joint_bias: whether a bias shares the block of its weight.
        decay: None for sums over everything that streams by; or the decay of an exponential
            average without bias. Numerators and divisors decay alike, so that batches of different
            sizes count by their size.
        basis_every: refresh the basis inside ``update`` every so many steps, in eager mode; None
            leaves `Estimator.refresh` to the caller.
        chunk_size: how many examples are captured at a time; what fits 32 MiB if None.
        vector_chunk: how many vectors of them; each further chunk runs the model again.
        precision: dtypes of factors, eigenvalues and eigendecompositions.
        damping: of the finished curvature's inverse where none is given there.

    Returns:
        An `Estimator`.

    Raises:
        ValueError: a hyperparameter is out of range, or ``fisher`` is `forward_only`, which has no
            gradients to square.

    Cost: a forward pass and V backward passes for the factors, the same again for the eigenvalues
    (`build` keeps what it captured), and an eigendecomposition of each factor. V = 1 for
    `monte_carlo(1)` and `empirical`, C − 1 for `type2` of C classes.

    References:
        George et al., Fast Approximate Natural Gradient Descent in a Kronecker-factored
        Eigenbasis, 2018, arXiv:1806.03884. Martens and Grosse, Optimizing Neural Networks with
        Kronecker-factored Approximate Curvature, 2015, arXiv:1503.05671.

    Example:
        >>> import torch
        >>> from jdfunc import curvature as cv
        >>> params, X, y = {"w": torch.zeros(3, 2)}, torch.eye(2), torch.tensor([0, 2])
        >>> def apply(params, buffers, x):
        ...     return torch.nn.functional.linear(x, params["w"])
        >>> layout = cv.curvature_layout(apply, params, None, X)
        >>> est = cv.ekfac(layout, likelihood=cv.cross_entropy())
        >>> state = est.refresh(est.update(est.init(params), params, {}, (X, y)))
        >>> curv = est.finalize(est.update_eigenvalues(state, params, {}, (X, y)))
        >>> cv.trace(curv)
        tensor(0.6667)
    """
    return _estimator(
        Setup(
            layout=layout,
            likelihood=likelihood,
            fisher=_fisher(layout, fisher),
            sharing=sharing,
            position_mask=position_mask,
            joint_bias=joint_bias,
            decay=decay,
            basis_every=basis_every,
            chunk_size=chunk_size,
            vector_chunk=vector_chunk,
            precision=precision,
            damping=damping,
            eigenvalues=True,
        )
    )


def kfac(
    layout: Layout,
    *,
    likelihood: Likelihood | Heads,
    fisher: Fisher | None = None,
    sharing: Sharing = expand,
    position_mask: PositionMask | None = None,
    joint_bias: bool = True,
    decay: float | None = None,
    chunk_size: int | None = None,
    vector_chunk: int | None = None,
    precision: Precision = DEFAULT_PRECISION,
    damping: Damping = DEFAULT_DAMPING,
) -> Estimator:
    """KFAC: a Kronecker product for each layer, F ≈ B ⊗ A.

    A is the mean of activations' squares, B the sum of cotangents' squares times the factor w of
    the reduction. Exact for one linear layer with squared error, for deep linear networks, and for
    one example. Parameters that are no layer's weight have their exact block, or its diagonal.

    Args:
        layout: as for `ekfac`.
        likelihood: as for `ekfac`.
        fisher: as for `ekfac`; or `forward_only`, B = I without a backward pass.
        sharing: `expand`: A = 1/(N s) Σ a aᵀ, B = w Σ g gᵀ over all positions; `reduce`: of the
            mean activation and the summed cotangent of each example.
        position_mask: as for `ekfac`.
        joint_bias: as for `ekfac`; a separate bias has the block B.
        decay: as for `ekfac`.
        chunk_size: as for `ekfac`.
        vector_chunk: as for `ekfac`.
        precision: as for `ekfac`.
        damping: as for `ekfac`.

    Returns:
        An `Estimator`, whose ``refresh`` does nothing.

    Raises:
        ValueError: a hyperparameter is out of range.

    References:
        Martens and Grosse, 2015, arXiv:1503.05671. Eschenhagen et al., Kronecker-Factored
        Approximate Curvature for Modern Neural Network Architectures, 2023, arXiv:2311.00636.
        Benzing, Gradient Descent on Neurons and its Link to Approximate Second-order Optimization,
        2022, arXiv:2201.12250 (`forward_only`).

    Example:
        >>> import torch
        >>> from jdfunc import curvature as cv
        >>> X, params = torch.tensor([[1.0, 2.0]]), {"w": torch.zeros(2, 1)}
        >>> layout = cv.curvature_layout(lambda p, b, x: x @ p["w"], params, None, X)
        >>> est = cv.kfac(layout, likelihood=cv.mse(reduction=cv.sum))
        >>> curv = est.finalize(est.update(est.init(params), params, {}, (X, torch.zeros(1, 1))))
        >>> cv.to_dense(curv).round()
        tensor([[2., 4.],
                [4., 8.]])
    """
    return _estimator(
        Setup(
            layout=layout,
            likelihood=likelihood,
            fisher=_fisher(layout, fisher),
            sharing=sharing,
            position_mask=position_mask,
            joint_bias=joint_bias,
            decay=decay,
            basis_every=None,
            chunk_size=chunk_size,
            vector_chunk=vector_chunk,
            precision=precision,
            damping=damping,
            eigenvalues=False,
        )
    )


def _estimator(setup: Setup) -> Estimator:
    if not isinstance(setup.likelihood, Heads):
        _check_kind("likelihood", setup.likelihood, Likelihood, "cross_entropy()")
    _check_kind("sharing", setup.sharing, Sharing, "expand")
    if setup.eigenvalues and setup.fisher.vectors is None:
        raise ValueError(
            "expected a Fisher with vectors, got forward_only: EKFAC squares gradients; use kfac"
        )
    check_positive(
        basis_every=setup.basis_every,
        chunk_size=setup.chunk_size,
        vector_chunk=setup.vector_chunk,
    )
    _check_precision(setup.precision)
    if setup.decay is not None and not 0 <= setup.decay < 1:
        raise ValueError(f"expected decay in [0, 1), or None for plain sums, got {setup.decay}")
    return Estimator(
        partial(steps.init, setup),
        partial(steps.update, setup),
        partial(steps.refresh, setup),
        partial(steps.update_eigenvalues, setup),
        partial(steps.finalize, setup),
        setup,
    )


def _check_precision(precision: Precision) -> None:
    if not isinstance(precision, Precision):
        raise TypeError(f"expected a Precision, got {type(precision).__name__}")
    for name, dtype in zip(precision._fields, precision, strict=True):
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(
                f"expected {name} in float32, float64, or None for the dtype of the gradients, "
                f"float32 at least; got {dtype}"
            )


def _fisher(layout: Layout, fisher: Fisher | None) -> Fisher:
    _check_kind("layout", layout, Layout, "curvature_layout(apply, params, buffers, inputs)")
    if fisher is not None:
        _check_kind("fisher", fisher, Fisher, "type2() or monte_carlo(1)")
        return fisher
    return default_fisher(max(leaf.ndim for leaf in pytrees.leaves(layout.outputs)))


def _check_kind(name: str, value: Any, kind: type, example: str) -> None:
    if not isinstance(value, kind):
        got = getattr(value, "__name__", repr(value))
        raise TypeError(f"expected {name} to be a {kind.__name__}, such as {example}, got {got}")

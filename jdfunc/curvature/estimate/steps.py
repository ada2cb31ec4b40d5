"""One batch into a state, a new basis, and the end: what the estimators' functions are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.curvature.eigen import looks
from jdfunc.curvature.estimate.basis import basis_of
from jdfunc.curvature.estimate.factors import Moments
from jdfunc.curvature.estimate.finalize import (
    kron_blocks,
    normalised,
    reexpressed,
    spectral_blocks,
    zero_blocks,
)
from jdfunc.curvature.estimate.passes import Counted, Setup, batch_sums
from jdfunc.curvature.estimate.state import Counters, State, init_state, zero_eigenvalues
from jdfunc.curvature.losses.several import counted
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.trees import unrounded
from jdfunc.random import Key


def init(setup: Setup, params: Any) -> State:
    """Return the state before any data.

    Args:
        setup: of the estimator.
        params: give shapes and dtypes.

    Returns:
        A state of zeros.
    """
    state = init_state(
        setup.layout,
        params,
        joint_bias=setup.joint_bias,
        forward_only=setup.fisher.vectors is None,
        expanded=setup.eigenvalues and setup.sharing.sums,
        dtype=setup.precision.factors,
    )
    first, second = (  # two, not one twice: `build` adds in place
        counters._replace(denominator=counters.denominator.new_zeros(counted(setup.likelihood)))
        for counters in (state.counters, state.eigen_counters)
    )
    return state._replace(counters=first, eigen_counters=second)


def update(
    setup: Setup,
    state: State,
    params: Any,
    buffers: Any,
    batch: tuple[Any, Any],
    key: Key | None = None,
) -> State:
    """Add a batch: its factors, and its eigenvalues once there is a basis.

    Args:
        setup: of the estimator.
        state: before.
        params: where the model is linearised.
        buffers: handed to the model.
        batch: inputs and targets.
        key: of the random vectors; not read by kinds that draw none.

    Returns:
        The next state.

    Raises:
        ValueError: the batch is empty, or ``basis_every`` is given where values cannot be read.
    """
    due = _refresh_is_due(setup, state)
    averaged = setup.eigenvalues and bool(state.basis) and not due
    sums = batch_sums(
        setup,
        params,
        buffers,
        batch,
        key,
        factors=True,
        basis=state.basis if averaged else None,
    )
    state = state._replace(
        step=state.step + 1,
        factors=_added(setup, state.factors, sums.factors),
        counters=_added(setup, state.counters, sums.counters),
    )
    if averaged:
        return _with_eigenvalues(setup, state, sums)
    if due:
        return update_eigenvalues(setup, refresh(setup, state), params, buffers, batch, key)
    return state


def update_eigenvalues(
    setup: Setup,
    state: State,
    params: Any,
    buffers: Any,
    batch: tuple[Any, Any],
    key: Key | None = None,
) -> State:
    """Add the eigenvalues of a batch, and no factors.

    Args:
        setup: of the estimator.
        state: before.
        params: where the model is linearised.
        buffers: handed to the model.
        batch: inputs and targets.
        key: of the random vectors; not read by kinds that draw none.

    Returns:
        The next state.

    Raises:
        ValueError: the estimator has no eigenvalues, or the state has no basis yet.
    """
    if not setup.eigenvalues:
        raise ValueError("expected an estimator with eigenvalues, ekfac, got kfac")
    if not state.basis:
        raise ValueError("expected a state with a basis, got one without: call refresh first")
    sums = batch_sums(setup, params, buffers, batch, key, factors=False, basis=state.basis)
    return _with_eigenvalues(setup, state, sums)


def _with_eigenvalues(setup: Setup, state: State, sums: Counted) -> State:
    return state._replace(
        eigenvalues=_added(setup, state.eigenvalues, sums.eigenvalues),
        eigen_counters=_added(setup, state.eigen_counters, sums.counters),
    )


def _added(setup: Setup, total: Any, sums: Any) -> Any:
    """Σ ← decay Σ + new, for sums and for what divides them alike: an average without bias."""
    if setup.decay is None:
        return pytrees.map(lambda old, new: old + new.to(old.dtype), total, sums)
    return pytrees.map(lambda old, new: setup.decay * old + new.to(old.dtype), total, sums)


def _refresh_is_due(setup: Setup, state: State) -> bool:
    if setup.basis_every is None:
        return False
    if not looks(state.step):
        raise ValueError(
            "expected basis_every=None where the step is compiled or under torch.vmap, and cannot "
            f"branch on the number of steps, got {setup.basis_every}; call refresh from outside"
        )
    return int(state.step) % setup.basis_every == 0


def refresh(setup: Setup, state: State) -> State:
    """Diagonalise the factors; eigenvalues start anew, or are carried over if averaged.

    Args:
        setup: of the estimator.
        state: before.

    Returns:
        The next state.

    Raises:
        ValueError: a factor holds NaN or inf.
    """
    if not setup.eigenvalues:
        return state
    layout, joint = setup.layout, setup.joint_bias
    with unrounded([state.step]):
        factors, expanded = _divided(setup, state)
        basis = basis_of(layout, factors, expanded, setup.precision.eigh)
        if setup.decay is not None and state.basis:
            carried = reexpressed(state.eigenvalues, state.basis, basis, layout, joint)
            return state._replace(basis=basis, eigenvalues=carried)
    like = pytrees.leaves(state.factors)[0].new_zeros((), dtype=setup.precision.eigenvalues)
    zeros = zero_eigenvalues(layout, basis, joint, like)
    none = pytrees.map(torch.zeros_like, state.counters)
    return state._replace(basis=basis, eigenvalues=zeros, eigen_counters=none)


def _divided(setup: Setup, state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the factors, divided; and those of every position on its own, where there are any."""
    w = _weight(setup, state.counters, None)
    only = setup.fisher.vectors is None
    factors = normalised(setup.layout, state.factors, w, forward_only=only)
    expanded = {
        name: m._replace(roles=m.expanded)
        for name, m in state.factors.items()
        if isinstance(m, Moments) and m.expanded
    }
    divided = normalised(setup.layout, expanded, w, forward_only=only) if expanded else {}
    return factors, divided


def _weight(setup: Setup, counters: Counters, num_data: int | None) -> Tensor:
    """Return what quadratic sums are multiplied by."""
    batches = None if setup.decay is None else counters.batches
    return setup.likelihood.reduction(counters.denominator, counters.examples, batches, num_data)


def finalize(setup: Setup, state: State, num_data: int | None = None) -> Curvature:
    """Divide every sum by what was counted.

    Args:
        setup: of the estimator.
        state: what was seen.
        num_data: how many examples the whole data set has: see the reduction of the likelihood.

    Returns:
        The curvature.

    Raises:
        ValueError: the state has no basis yet, or has seen no data.
    """
    layout, joint = setup.layout, setup.joint_bias
    like = next(iter(pytrees.leaves(state.factors)))
    if setup.eigenvalues:
        if not state.basis:
            raise ValueError(
                "expected eigenvalues, got a state without a basis: call refresh, and then "
                "update_eigenvalues for every batch (or use build, which does both)"
            )
        _check_seen(state.eigen_counters, "update_eigenvalues for every batch")
        w = _weight(setup, state.eigen_counters, num_data)
        blocks = spectral_blocks(layout, state.basis, state.eigenvalues, w, joint)
    else:
        _check_seen(state.counters, "update for every batch")
        w = _weight(setup, state.counters, num_data)
        only = setup.fisher.vectors is None
        factors = normalised(layout, state.factors, w, forward_only=only)
        blocks = kron_blocks(layout, factors, joint)
    return Curvature(layout.blocks(joint), {**blocks, **zero_blocks(layout, like)}, setup.damping)


def _check_seen(counters: Counters, how: str) -> None:
    if looks(counters.examples) and float(counters.examples) == 0:
        raise ValueError(f"expected a state that has seen data, got one without: call {how}")


def merge(first: State, second: State) -> State:
    """Merge the states of two parts of the data, or of two workers: their sums add up.

    Associative. Of an EKFAC either both states are without a basis, or both have the same one.

    Args:
        first: a state without decay.
        second: another of the same estimator.

    Returns:
        The state of both.

    Raises:
        ValueError: the states are of different estimators, or have different bases.
    """
    shapes = [[leaf.shape for leaf in pytrees.leaves(state)] for state in (first, second)]
    if not pytrees.same_structure(first, second) or shapes[0] != shapes[1]:
        raise ValueError(
            "expected two states of one estimator, both before or both after refresh, got states "
            "of different structure or shapes"
        )
    bases = zip(pytrees.leaves(first.basis), pytrees.leaves(second.basis), strict=True)
    if any(looks(a) and a is not b and not torch.equal(a, b) for a, b in bases):
        raise ValueError(
            "expected two states with the same basis, since eigenvalues belong to it: merge the "
            "factors first, refresh once, and give every worker that state"
        )
    merged = pytrees.map(torch.add, first, second)
    return merged._replace(basis=first.basis)

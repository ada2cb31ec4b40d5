"""The one-call form: curvature of a whole data set, in one traversal of it or two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jdfunc import pytrees, random
from jdfunc.checks import check_buffers
from jdfunc.curvature.estimate.estimators import Estimator
from jdfunc.curvature.estimate.passes import Chunk, Counted, Setup, chunks, reduced
from jdfunc.curvature.estimate.state import State
from jdfunc.curvature.estimate.thin import spanned_basis
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.trees import unrounded
from jdfunc.random import Key
from jdfunc.types import Buffers, Params

Progress = Callable[[int, int | None], Any]

#: Memory up to which the activations and cotangents of the data are kept between passes, in bytes.
CACHE_BYTES, SMALL_CACHE_BYTES = 2**28, 2**23


def build(
    est: Estimator,
    params: Params,
    buffers: Buffers | None,
    data: Iterable[tuple[Any, Any]],
    key: Key | None = None,
    *,
    num_data: int | None = None,
    progress: Progress | None = None,
    check_determinism: bool = False,
    cache_limit: int | None = None,
) -> Curvature:
    """Curvature of a data set.

    KFAC traverses the data once. EKFAC traverses it once if the activations and cotangents of all
    of it fit ``cache_limit``, and then takes the basis of a side with fewer vectors than their
    length from those vectors (the complement has eigenvalue zero); twice otherwise.

    Args:
        est: `kfac` or `ekfac`, without ``decay``.
        params: where the model is linearised.
        buffers: handed to the model; an empty dict if None.
        data: batches (inputs, targets); a loader that gives the same batches each time. A
            generator will do where one traversal is enough.
        key: of the random vectors; the i-th batch folds i into it.
        num_data: how many examples the whole data set has, if this is a part of it: see the
            reduction of the likelihood.
        progress: called ``(done, total)`` after each batch of both traversals, once for a second
            one that is not needed; total is None if data has no length.
        check_determinism: evaluate the first batch twice, and the first batch of another traversal,
            and compare.
        cache_limit: in bytes; 0 for no cache; 256 MiB if None, or 8 MiB where the estimator has a
            ``chunk_size`` or ``vector_chunk``, as one who sets these is short of memory.

    Returns:
        The curvature.

    Raises:
        ValueError: no data, a second traversal of an iterator or one that differs from the first,
            a model that draws random numbers, or an estimator with ``decay``.

    Example:
        >>> import torch
        >>> from jdfunc import curvature as cv
        >>> params, X = {"w": torch.zeros(2, 1)}, torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> layout = cv.curvature_layout(lambda p, b, x: x @ p["w"], params, None, X)
        >>> est = cv.ekfac(layout, likelihood=cv.mse())
        >>> curv = build(est, params, None, [(X, torch.zeros(2, 1))])
        >>> cv.diag(curv, params)["w"].T.round()
        tensor([[4., 1.]])
    """
    setup = est.setup
    if setup.decay is not None:
        raise ValueError(
            f"expected an estimator of sums, got decay={setup.decay}: build goes over a fixed data "
            "set; leave decay out, or call update for every batch of a stream"
        )
    buffers = check_buffers(buffers)
    if cache_limit is None:
        chunked = setup.chunk_size is not None or setup.vector_chunk is not None
        cache_limit = SMALL_CACHE_BYTES if chunked else CACHE_BYTES
    if check_determinism:
        _check_repeats(est, params, buffers, data, key)
    steps = partial(_traversal, data, key, progress, 2 if setup.eigenvalues else 1)
    state = est.init(params)
    if not setup.eigenvalues:
        for batch, own in steps(0):
            state = est.update(state, params, buffers, batch, own)
        return est.finalize(_nonempty(state), num_data)
    cache, held, seen = [], 0, 0
    for batch, own in steps(0):
        seen += 1
        for chunk in chunks(setup, params, buffers, batch, own):
            cache.append(chunk)
            held += _bytes(chunk)
            if held > cache_limit:
                _check_repeatable(data, "it does not fit cache_limit", "raise cache_limit")
                state, cache = _with_factors(setup, state, cache), []
    if not seen:
        return est.finalize(_nonempty(state), num_data)
    if held <= cache_limit:
        state = _from_cache(est, state, cache)
        if progress is not None:  # what was kept is not traversed again
            progress(2 * seen, 2 * seen if isinstance(data, Sized) else None)
        return est.finalize(state, num_data)
    state = est.refresh(_with_factors(setup, state, cache))
    for batch, own in steps(seen):
        state = est.update_eigenvalues(state, params, buffers, batch, own)
    _check_same_data(state)
    return est.finalize(state, num_data)


def _traversal(
    data: Iterable[Any], key: Key | None, progress: Progress | None, passes: int, done: int
) -> Iterator[tuple[Any, Key | None]]:
    """Go over the batches once, each with its key."""
    total = passes * len(data) if isinstance(data, Sized) else None
    for k, batch in enumerate(data):
        yield batch, None if key is None else random.fold_in(key, k)
        if progress is not None:
            progress(done + k + 1, total)


def _bytes(chunk: Chunk) -> int:
    leaves = pytrees.leaves((chunk.cap.uses, chunk.cap.rows))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def _with_factors(setup: Setup, state: State, cache: list[Chunk]) -> State:
    """Add the factors of captured chunks, in place: the state is one of our own."""
    for chunk in cache:
        sums = reduced(setup, chunk, factors=True, basis=None)
        state = state._replace(
            factors=pytrees.map(Tensor.add_, state.factors, sums.factors),
            counters=pytrees.map(Tensor.add_, state.counters, sums.counters),
        )
    return state


def _from_cache(est: Estimator, state: State, cache: list[Chunk]) -> State:
    """Return the state of data that was captured in whole."""
    setup = est.setup
    if setup.sharing.sums or any(len(layer.roles) > 1 for layer in setup.layout.layers):
        state = est.refresh(_nonempty(_with_factors(setup, state, cache)))
    else:
        with unrounded([state.step]):
            state = state._replace(basis=spanned_basis(setup, cache))
    total: Counted | None = None
    while cache:  # each chunk is let go once it is reduced
        sums = reduced(setup, cache.pop(0), factors=False, basis=state.basis)
        total = sums if total is None else pytrees.map(Tensor.add_, total, sums)
    assert total is not None  # at least one batch
    return state._replace(
        eigenvalues=total.eigenvalues, counters=total.counters, eigen_counters=total.counters
    )


def _nonempty(state: State) -> State:
    if not pytrees.leaves(state.factors) or float(state.counters.examples) == 0:
        raise ValueError("expected data of at least one batch, got none")
    return state


def _check_repeatable(data: Iterable[Any], why: str, instead: str) -> None:
    if iter(data) is data:
        raise ValueError(
            f"expected data that can be traversed twice, since {why}, got an iterator "
            f"({type(data).__name__}); pass a list or a loader, or {instead}"
        )


def _check_same_data(state: State) -> None:
    first, second = float(state.counters.examples), float(state.eigen_counters.examples)
    if first != second:
        raise ValueError(
            f"expected two traversals of the same data, got {first:.0f} examples and then "
            f"{second:.0f}; the loader drops or draws examples anew"
        )


def _check_repeats(
    est: Estimator, params: Params, buffers: Buffers, data: Iterable[Any], key: Key | None
) -> None:
    """Check that the first batch gives the same factors twice, and that data starts with it."""
    _check_repeatable(data, "check_determinism is given", "leave that out")
    first, again = next(iter(data), None), next(iter(data), None)
    if first is None or again is None:
        return  # no data: an error that follows
    sums = [
        pytrees.leaves(est.update(est.init(params), params, buffers, batch, key).factors)
        for batch in (first, first, again)
    ]
    causes = (
        "the model: it draws random numbers (dropout: call module.eval())",
        "the data: it starts with another batch each time (a loader that shuffles)",
    )
    for other, cause in zip(sums[1:], causes, strict=True):
        close = (torch.allclose(x, y, rtol=1e-4) for x, y in zip(sums[0], other, strict=True))
        if not all(close):
            raise ValueError(f"expected equal factors of the first batch, got others: {cause}")

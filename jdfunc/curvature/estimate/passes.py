"""A pass over one batch: some examples and some vectors at a time, each reduced before the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdfunc import pytrees, random
from jdfunc.checks import check_buffers
from jdfunc.curvature.eigen import looks
from jdfunc.curvature.estimate.basis import Basis
from jdfunc.curvature.estimate.capture import (
    Captured,
    PositionMask,
    UseOf,
    VectorsFn,
    captured,
)
from jdfunc.curvature.estimate.eigenvalues import eigenvalue_sums
from jdfunc.curvature.estimate.factors import Moments, factor_sums
from jdfunc.curvature.estimate.sharing import Sharing
from jdfunc.curvature.estimate.state import Counters
from jdfunc.curvature.layouts.layout import Layout
from jdfunc.curvature.losses.fishers import Fisher
from jdfunc.curvature.losses.several import Heads, joint_vectors
from jdfunc.curvature.losses.terms import Likelihood
from jdfunc.curvature.operate.damping import Damping
from jdfunc.curvature.operate.trees import unrounded
from jdfunc.examples import num_examples, select
from jdfunc.random import Key

#: Memory of the activations and cotangents of one chunk, and as much again for products of them.
CHUNK_BYTES = 2**25


class Precision(NamedTuple):
    """Dtypes; None for that of the gradients, float32 at least.

    Attributes:
        factors: of second moments.
        eigenvalues: of squared gradients.
        eigh: of eigendecompositions.
    """

    factors: torch.dtype | None = None
    eigenvalues: torch.dtype | None = None
    eigh: torch.dtype | None = None


class Setup(NamedTuple):
    """What an estimator estimates, and how: static."""

    layout: Layout
    likelihood: Likelihood | Heads
    fisher: Fisher
    sharing: Sharing
    position_mask: PositionMask | None
    joint_bias: bool
    decay: float | None
    basis_every: int | None
    chunk_size: int | None
    vector_chunk: int | None
    precision: Precision
    damping: Damping
    eigenvalues: bool


class Chunk(NamedTuple):
    """What a run captured of some examples and some vectors.

    Attributes:
        cap: the rows.
        uses: what their uses are.
        first: whether these are the first vectors of their examples.
    """

    cap: Captured
    uses: list[UseOf]
    first: bool


def chunks(
    setup: Setup, params: Any, buffers: Any, batch: tuple[Any, Any], key: Key | None
) -> Iterator[Chunk]:
    """Capture a batch, some examples and some vectors at a time.

    Args:
        setup: of the estimator.
        params: where the model is linearised.
        buffers: handed to the model.
        batch: inputs and targets.
        key: of the random vectors.

    Yields:
        What was captured.

    Raises:
        ValueError: the batch is empty, or vectors are to be drawn without a key.
        TypeError: the batch is no pair.
    """
    layout, fisher, buffers = setup.layout, setup.fisher, check_buffers(buffers)
    inputs, targets = _pair(batch)
    n = num_examples((inputs, targets), (layout.batch_dim, 0))
    if n == 0:
        raise ValueError("expected a batch of at least one example, got an empty one")
    keys = random.bits(_key_of(fisher, targets, key), n)
    keys = keys.to(pytrees.leaves(params)[0].device)
    whole, dims = (inputs, targets, keys), (layout.batch_dim, 0, 0)
    kept = {layer.name for layer in layout.layers}
    rests = [name for rest in layout.rests if rest.rule.covered for name in rest.params]
    size, width = _sizes(setup, whole, dims, n)
    for start in range(0, n, size):
        examples = torch.arange(start, min(n, start + size), device=keys.device)
        part = whole if size >= n else select(whole, dims, examples)
        seen, k = [1], 0
        while k < seen[-1]:
            cap, uses = captured(
                layout.apply,
                params,
                buffers,
                part,
                dims,
                _vectors(setup, slice(k, k + width), seen),
                wanted=[*kept, *rests],
                kept=kept,
                position_mask=setup.position_mask,
                backward=fisher.vectors is not None,
            )
            yield Chunk(cap, uses, k == 0)
            k += width


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or batch[1] is None:
        kinds = [type(part).__name__ for part in batch] if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            "expected a batch (inputs, targets), where targets are tensors with an example axis in "
            f"front, got {type(batch).__name__} {kinds}".rstrip()
            + "; data is a list or a loader of such pairs"
        )
    return batch[0], batch[1]


def _key_of(fisher: Fisher, targets: Any, key: Key | None) -> Key:
    """Return the key of a batch, checked; any where nothing is drawn."""
    if key is None and fisher.draws(targets):
        raise ValueError(
            "expected a key, since this kind of Fisher matrix draws its vectors (labels or signs): "
            "pass an int or an int64 tensor, the same for both passes over a batch and another for "
            "every batch; or take type2() or empirical(), which draw nothing"
        )
    if isinstance(key, Tensor) and key.ndim:
        raise ValueError(
            f"expected one key, got keys of shape {tuple(key.shape)}; use torch.vmap over keys"
        )
    return 0 if key is None else key


def _vectors(setup: Setup, columns: slice, seen: list[int]) -> VectorsFn:
    """Return what makes the pseudo-losses of one example; ``seen`` gets their number."""
    likelihood, make = setup.likelihood, setup.fisher.vectors

    def vectors(outputs: Any, targets: Any, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, made, count = joint_vectors(likelihood, make, outputs, targets, key)
        if make is not None:
            seen.append(made.shape[0])
        return f, made[columns], count

    return vectors


def _sizes(setup: Setup, whole: Any, dims: Any, n: int) -> tuple[int, int]:
    """Return how many examples and how many vectors to take at a time."""
    layout = setup.layout
    per_vector = max(1, layout.bytes_each)
    vectors = 1 if setup.fisher.vectors is None else _count(setup, whole, dims)
    width = setup.vector_chunk
    if width is None:
        fits = max(1, (CHUNK_BYTES - layout.bytes_fixed) // per_vector)
        width = vectors if setup.chunk_size is not None else min(vectors, fits)
    example = layout.bytes_fixed + width * per_vector
    size = max(1, CHUNK_BYTES // example) if setup.chunk_size is None else setup.chunk_size
    return min(size, max(1, n)), width


def _count(setup: Setup, whole: Any, dims: Any) -> int:
    """Return how many vectors an example has, if it is like that of the layout: a guess."""
    device = whole[2].device
    _, targets, keys = select(whole, dims, torch.zeros(1, dtype=torch.int64, device=device))
    shapes = setup.layout.outputs
    outputs = pytrees.map(lambda x: torch.zeros(x.shape, dtype=x.dtype, device=device), shapes)
    try:
        return _vectors(setup, slice(None), [])(outputs, targets, keys[0])[1].shape[0]
    except (ValueError, RuntimeError, IndexError):  # sequences of another length
        return max(1, sum(x.numel() for x in pytrees.leaves(shapes)))


class Counted(NamedTuple):
    """Sums over one batch."""

    factors: dict[str, Moments | Tensor]
    eigenvalues: dict[str, Tensor]
    counters: Counters


def batch_sums(
    setup: Setup,
    params: Any,
    buffers: Any,
    batch: tuple[Any, Any],
    key: Key | None,
    *,
    factors: bool,
    basis: Mapping[str, Basis] | None,
) -> Counted:
    """Sum factors, eigenvalues in a basis, and counters over one batch.

    Args:
        setup: of the estimator.
        params: where the model is linearised.
        buffers: handed to the model.
        batch: inputs and targets.
        key: of the random vectors.
        factors: whether to sum second moments.
        basis: to sum squares in; None for none.

    Returns:
        The sums; empty dicts of what was not asked for.

    Raises:
        ValueError: the batch is empty, or vectors are to be drawn without a key.
        TypeError: the batch is no pair.
    """
    total: Counted | None = None
    for chunk in chunks(setup, params, buffers, batch, key):
        sums = reduced(setup, chunk, factors=factors, basis=basis)
        total = sums if total is None else pytrees.map(_plus, total, sums)
        del chunk, sums  # before the next one is captured
    assert total is not None  # chunks of at least one example
    one = torch.ones_like(total.counters.batches)
    return total._replace(counters=total.counters._replace(batches=one))


def _plus(total: Tensor, more: Tensor) -> Tensor:
    """Add in place, but below transforms: what is the same for all members cannot take theirs."""
    return total.add_(more) if looks(more) else total + more


def reduced(
    setup: Setup, chunk: Chunk, *, factors: bool, basis: Mapping[str, Basis] | None
) -> Counted:
    """Return the sums over one chunk; its counters count examples once, and no batch."""
    layout, precision, counts = setup.layout, setup.precision, chunk.cap.counts
    made, squares = {}, {}
    with unrounded([counts]):
        if factors:
            made = factor_sums(
                layout,
                chunk.cap,
                chunk.uses,
                setup.sharing,
                joint_bias=setup.joint_bias,
                expanded=setup.eigenvalues and setup.sharing.sums,
                first=chunk.first,
                dtype=precision.factors,
            )
        if basis is not None:
            squares = eigenvalue_sums(
                layout,
                chunk.cap,
                chunk.uses,
                basis,
                joint_bias=setup.joint_bias,
                dtype=precision.eigenvalues,
            )
    wide = torch.float32 if counts.device.type == "mps" else torch.float64
    number = torch.full((), float(counts.shape[0]), dtype=wide, device=counts.device)
    zero = torch.zeros_like(number)
    once = Counters(zero, number, counts.to(wide).sum(0)) if chunk.first else Counters(*[zero] * 3)
    return Counted(made, squares, once)

"""No rows at all: the Gramian from products with J and Jᵀ, some columns at a time."""

from __future__ import annotations  # Dynamo does not trace the annotations of inner functions

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc import algebra, pytrees
from jdfunc.checks import check_buffers, check_model, check_positive
from jdfunc.independence import readable
from jdfunc.linearizations.bound import (
    Bound,
    Pull,
    bound,
    checked_weights,
    each,
    pulled,
    transposed,
    wide_dtype,
)
from jdfunc.linearizations.linearized import begun, detached, tracked
from jdfunc.types import Batch, Buffers, Linearization, Metric, ModelFn, Params

#: Up to so many blocks, every pair of blocks of rows takes no more passes than products with J.
FEW_BLOCKS = 4
#: How far J (Jᵀ e) may be from |Jᵀ e|², relatively, before J is not taken for the transpose.
TOLERANCE = 1e-3


def matrix_free(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    *,
    buffers: Buffers | None = None,
    batch_dim: Any = None,
    has_aux: bool = False,
    chunk_size: int = 1,
) -> Linearization:
    """Hold no rows: G block of columns by block of columns, J (Jᵀ e). Exact.

    Choose it where n is too large for m rows. The model runs once. A block of ``chunk_size`` rows
    is pulled back, used and dropped. With B = ⌈m / chunk_size⌉ blocks,

    - B ≤ 4: every block of rows meets every other one, in B + (B − 1)(B − 2)/2 pullbacks of a
      block, since each sweep begins where the last one ended;
    - B > 4: the columns of a block are G e = J (Jᵀ e), where v ↦ J v is the pullback of the
      linear function w ↦ Jᵀ w: no forward mode, no second run, and dropout is drawn once. Of each
      block only the entries on and below the diagonal are kept, those of the block itself being
      inner products, so the last block takes no product: 2B − 1 passes.

    Every pair of blocks is also formed where parameters are float16 or bfloat16, or under autocast,
    since sums must be of float32 at least; and, with a warning, where an operation has no second
    derivative, or one that is not the transpose of its first (`F.embedding` with
    ``scale_grad_by_freq``).

    Args:
        model_fn: pure function ``(params, buffers, batch) -> losses``, losses of any shape [*rows].
        params: pytree of floating-point tensors, where J is taken.
        batch: handed to ``model_fn``.
        buffers: handed to ``model_fn``; an empty dict if None.
        batch_dim: None, or the example axis, as in `jdfunc.structured`: examples are run as
            batches of one and checked for independence. Saves nothing here.
        has_aux: ``model_fn`` returns ``(losses, aux)``.
        chunk_size: rows to a block. More than one are pulled back together by `torch.vmap`.

    Returns:
        A `Linearization` whose ``rows`` are None. ``gram(metric)`` applies F⁻¹ between Jᵀ and J;
        ``combine`` is one pullback. J (Jᵀ e) is compared with |Jᵀ e|²: where they differ by more
        than a thousandth and the comparison cannot be read (compiled, under an outer `torch.vmap`,
        on accelerators), G is NaN.

    Raises:
        ValueError: params are not floating point; the losses depend on none of them; chunk_size is
            not positive; or, where ``batch_dim`` is given, an operation couples examples or losses
            are not one per example.
        TypeError: ``model_fn`` is no function, or does not return a tensor.

    Cost: one forward pass and, for G, m pullbacks and m − chunk_size products with J, each about
    as much again; memory as of one gradient, and two blocks of chunk_size · n elements. A compiled
    step holds every pass of its own m in its graph: compile it for few losses.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, 1994 (products without the matrix).

    Example:
        >>> def model_fn(params, buffers, batch):
        ...     return batch @ params["w"]
        >>> X = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> matrix_free(model_fn, {"w": torch.zeros(2)}, X).gram()
        tensor([[5., 2.],
                [2., 1.]])
    """
    check_model(model_fn, params)
    check_positive(chunk_size=chunk_size)
    given, params = check_buffers(buffers), detached(params)
    differentiable = tracked(params, given, batch)

    def begin(batch_dim: Any) -> Linearization:
        model = bound(
            model_fn,
            params,
            given,
            batch,
            batch_dim,
            has_aux=has_aux,
            differentiable=differentiable,
        )
        losses, pull, aux = pulled(model)
        exact_pairs = _narrow([losses, *model.values])

        def gram(metric: Metric | None = None) -> Tensor:
            shape = (*losses.shape, *reversed(losses.shape))
            if not model.values or not losses.numel():
                return losses.new_zeros(shape, dtype=wide_dtype(model.values))
            units = _units(losses).split(chunk_size)
            lower = _lower(_Blocks(model, losses, pull, units, metric), exact_pairs)
            whole = lower.tril() + lower.tril(-1).mT
            return algebra.reversed_half(whole, losses.shape, losses.shape)

        def combine(weights: Tensor) -> Params:
            return model.restore(pull(checked_weights(weights, losses)))

        return Linearization(losses, gram, combine, None, model.restore_aux(aux))

    return begun(begin, model_fn, params, given, batch, batch_dim, has_aux)


class _Blocks(NamedTuple):
    """What the rows of J are pulled back from, some at a time."""

    model: Bound
    losses: Tensor
    pull: Pull
    units: Sequence[Tensor]
    metric: Metric | None

    def rows(self, k: int) -> Params:
        """Block k of the rows of J, leaves [rows of the block, *param.shape]."""
        return self.model.restore(each(self.pull, self.units[k]))

    def white(self, rows: Params) -> Params:
        """F⁻¹ of every row."""
        return rows if self.metric is None else torch.vmap(self.metric)(rows)


def _lower(blocks: _Blocks, exact_pairs: bool) -> Tensor:
    """G as a matrix, right on and below the diagonal."""
    if len(blocks.units) <= FEW_BLOCKS or exact_pairs:
        return _by_pairs(blocks)
    try:
        lower, doubtful = _by_products(blocks)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("not implemented", "differentiate twice")):
            raise
        _warn(f"has no second derivative ({error})")
        return _by_pairs(blocks)
    if not readable(doubtful):
        return lower + torch.where(doubtful, torch.nan, 0.0).to(lower.dtype)
    if bool(doubtful):
        _warn("has a second derivative that is not the transpose of its first")
        return _by_pairs(blocks)
    return lower


def _by_pairs(blocks: _Blocks) -> Tensor:
    """G[a, b] = J_a F⁻¹ J_bᵀ for every pair of blocks, two of them held at a time."""
    count = len(blocks.units)
    found: dict[tuple[int, int], Tensor] = {}
    at, others, rows = 0, range(1, count), blocks.rows(0)
    while True:
        white = blocks.white(rows)
        found[at, at] = algebra.gram(white, rows)
        for other in others:
            del rows  # before there are three
            rows = blocks.rows(other)
            cross = algebra.gram(white, rows)
            found[max(at, other), min(at, other)] = cross.mT if at < other else cross
        if not others:
            break
        at, others = others[-1], others[-2::-1]  # the block at hand begins the next sweep
    columns = [torch.cat([found[a, b] for a in range(b, count)]) for b in range(count)]
    return _side_by_side(columns)


def _by_products(blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """G[:, b] = J (F⁻¹ J_bᵀ), and whether J_b (F⁻¹ J_bᵀ) is not what inner products are."""
    push = transposed(blocks.pull, blocks.losses, blocks.model)
    columns: list[Tensor] = []
    doubts: list[Tensor] = []
    begin = 0
    for k, units in enumerate(blocks.units):
        end = begin + len(units)
        rows = blocks.rows(k)
        white = blocks.white(rows)
        own = algebra.gram(white, rows)
        del rows  # they are `white` without a metric, and would outlive it
        if end == blocks.losses.numel():
            columns.append(own)
            break
        whole = each(push, pytrees.leaves(white)).flatten(1).mT.to(own.dtype)
        del white  # before the next block is pulled back
        doubts.append((whole[begin:end] - own).abs().amax() > TOLERANCE * own.abs().amax())
        columns.append(torch.cat([own, whole[end:]]))
        begin = end
    return _side_by_side(columns), torch.stack(doubts).any()


def _side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Columns of blocks from the diagonal down, as a matrix with zeros above."""
    m = len(columns[0])
    return torch.cat([F.pad(column, (0, 0, m - len(column), 0)) for column in columns], 1)


def _units(losses: Tensor) -> Tensor:
    """The unit cotangents of the losses, [m, *rows]."""
    m = losses.numel()
    return torch.eye(m, dtype=losses.dtype, device=losses.device).reshape(m, *losses.shape)


def _narrow(tensors: Sequence[Tensor]) -> bool:
    """Tell whether sums are taken in less than float32."""
    narrow = any(t.dtype.itemsize < 4 for t in tensors)
    return narrow or torch.is_autocast_enabled(tensors[0].device.type)


def _warn(what: str) -> None:
    warnings.warn(
        f"an operation of the model {what}, so rows of the Jacobian are pulled back again for "
        "every pair of blocks: exact, but slower; give matrix_free a larger chunk_size, or use "
        "jdfunc.dense",
        stacklevel=5,
    )

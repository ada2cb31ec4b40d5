"""The Jacobian as dense rows: one pullback per loss, or one per example where rows allow it."""

from typing import Any

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.checks import check_buffers, check_depends, check_model, check_positive
from jdfunc.examples import Run, for_each_example, losses_function, num_examples
from jdfunc.independence import guarded
from jdfunc.linearizations.of_rows import of_rows
from jdfunc.taps.rules import vmappable
from jdfunc.types import Batch, Buffers, Linearization, ModelFn, Params, Rows


def detached(params: Params) -> Params:
    """Return params whose `nn.Parameter` leaves are detached: a step never writes their ``.grad``.

    A tensor that carries a graph keeps it, so that a step can itself be differentiated.
    """
    return pytrees.map(lambda p: p.detach() if isinstance(p, torch.nn.Parameter) else p, params)


def jacobian(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    *,
    buffers: Buffers | None = None,
    chunk_size: int | None = None,
    has_aux: bool = False,
) -> Any:
    """Rows of J = ∂losses/∂params, by the pullback of every loss under `torch.vmap`.

    Args:
        model_fn: pure function ``(params, buffers, batch) -> losses``, losses of any shape [*rows].
        params: pytree of floating-point tensors, where J is taken.
        batch: handed to ``model_fn``.
        buffers: handed to ``model_fn``; an empty dict if None.
        chunk_size: how many pullbacks run at a time; all at once if None. Bounds memory.
        has_aux: ``model_fn`` returns ``(losses, aux)``.

    Returns:
        A pytree like ``params`` of rows [*rows, *param.shape]; ``(rows, aux)`` if ``has_aux``.
        Units loss/param. A parameter that the losses do not use has rows of zeros.

    Raises:
        ValueError: params are not floating point, or the losses depend on none of them.
        TypeError: ``model_fn`` is no function, or does not return a tensor.

    Cost: one forward pass, m pullbacks, m·n elements.

    Example:
        >>> def model_fn(params, buffers, batch):
        ...     return torch.stack([(batch * params["w"]).sum(), params["w"].square().sum()])
        >>> jacobian(model_fn, {"w": torch.tensor([1.0, 2.0])}, torch.tensor([3.0, 4.0]))
        {'w': tensor([[3., 4.],
                [2., 4.]])}
    """
    check_model(model_fn, params)
    check_positive(chunk_size=chunk_size)
    run, restore_aux = losses_function(
        model_fn, check_buffers(buffers), has_aux=has_aux, by_example=False
    )
    _, rows, tensors = _rows(run, detached(params), batch, chunk_size, one_example=False)
    return (rows, restore_aux(tensors)) if has_aux else rows


def dense(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    *,
    buffers: Buffers | None = None,
    batch_dim: Any = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Linearization:
    """Hold J as dense rows: always exact, whatever the model; the oracle of the other forms.

    Choose it for few objectives, or for a model whose parameters `structured` does not recognise.

    Args:
        model_fn: pure function ``(params, buffers, batch) -> losses``, losses of any shape [*rows].
        params: pytree of floating-point tensors, where J is taken.
        batch: handed to ``model_fn``.
        buffers: handed to ``model_fn``; an empty dict if None.
        batch_dim: None: one pullback per loss. An int, or a pytree like in_dims of `torch.vmap`:
            losses[i] depends on example i alone, and one batched pullback serves every example.
        has_aux: ``model_fn`` returns ``(losses, aux)``.
        chunk_size: how many pullbacks run at a time; all at once if None.

    Returns:
        A `Linearization` whose ``rows`` are dense, [*rows, *param.shape].

    Raises:
        ValueError: params are not floating point, the losses depend on none of them, or they are
            not one per example where ``batch_dim`` is given.
        TypeError: ``model_fn`` is no function, or does not return a tensor.

    Cost: m pullbacks, m·n elements, m² n multiply-adds for the Gramian.
    """
    check_model(model_fn, params)
    check_positive(chunk_size=chunk_size)
    given, values = check_buffers(buffers), detached(params)
    by_example = batch_dim is not None and num_examples(batch, batch_dim) > 0
    run, restore_aux = losses_function(model_fn, given, has_aux=has_aux, by_example=by_example)

    def one(example: Batch) -> tuple[Tensor, Rows, list[Tensor]]:
        return _rows(run, values, example, chunk_size, one_example=by_example)

    if not by_example:
        losses, rows, tensors = one(batch)
        return of_rows(losses, rows, restore_aux(tensors))
    losses, rows, tensors = for_each_example(one, batch, batch_dim)
    lin = of_rows(losses, rows, restore_aux(tensors))
    return guarded(lin, model_fn, values, given, batch, batch_dim, has_aux)


def _rows(
    run: Run, params: Params, batch: Batch, chunk_size: int | None, *, one_example: bool
) -> tuple[Tensor, Rows, list[Tensor]]:
    """Losses, dense rows and tensors of aux of one run of the model."""
    values, restore = pytrees.flatten(params)
    names = pytrees.names(params)

    def losses_fn(*values: Tensor) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        tap = vmappable(dict(zip(names, values, strict=True)), one_example=one_example)
        with tap:
            losses, tensors = run(restore(values), batch)
        check_depends(losses, params)
        return losses, (losses, tensors)

    if not values:
        losses, tensors = run(params, batch)
        return losses, params, tensors
    losses, pullback, (value, tensors) = torch.func.vjp(losses_fn, *values, has_aux=True)
    units = torch.eye(losses.numel(), dtype=losses.dtype, device=losses.device)
    if losses.numel() == 0:
        flat = [v.new_zeros(0) for v in values]
    elif losses.numel() == 1:
        flat = list(pullback(units.reshape(losses.shape)))
    else:
        pull = torch.vmap(lambda unit: pullback(unit.reshape(losses.shape)), chunk_size=chunk_size)
        flat = list(pull(units))
    rows = [row.reshape((*losses.shape, *v.shape)) for row, v in zip(flat, values, strict=True)]
    return value, restore(rows), tensors

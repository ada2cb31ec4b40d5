"""One example at a time: a model run by `torch.vmap` on batches of one.

`vmap` tracks the example axis whatever the layout inside the model: sequence-first tensors and
reshapes to ``[B·T, d]`` stay right, because each example only ever sees itself.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.checks import run_model
from jdfunc.types import Batch, Buffers, ModelFn, Params


def batch_dims(batch: Batch, batch_dim: Any) -> list[int | None]:
    """Return the example axis of every leaf of the batch; None for a leaf that examples share.

    Args:
        batch: the batch.
        batch_dim: an axis for every tensor, or a pytree prefix of axes and None, as in_dims of
            `torch.vmap`.

    Returns:
        One axis, or None, for each leaf of the batch.

    Raises:
        ValueError: leaves disagree on the number of examples, or none has an example axis.
        TypeError: an axis that is not an int or None.
    """
    values = pytrees.leaves(batch)
    if isinstance(batch_dim, int) and not isinstance(batch_dim, bool):
        dims = [batch_dim if isinstance(v, Tensor) and v.ndim else None for v in values]
    else:
        try:
            dims = pytrees.broadcast_prefix(batch_dim, batch)
        except ValueError as error:
            raise ValueError(
                f"expected batch_dim to be an int or a pytree prefix of the batch: {error}"
            ) from None
    for value, dim in zip(values, dims, strict=True):
        if dim is None:
            continue
        if not isinstance(dim, int) or isinstance(dim, bool) or not isinstance(value, Tensor):
            raise TypeError(
                "expected batch_dim to give an int for every tensor with an example axis and None "
                f"for the rest, got {dim!r} for a {type(value).__name__}"
            )
        if not -value.ndim <= dim < value.ndim:
            raise ValueError(
                f"expected batch_dim to be an axis of every tensor of the batch, got {dim} for a "
                f"tensor of shape {tuple(value.shape)}; pass a pytree like in_dims of torch.vmap, "
                "with None for a tensor that all examples share"
            )
    sizes = [v.shape[d] for v, d in zip(values, dims, strict=True) if d is not None]
    if not sizes or any(size != sizes[0] for size in sizes):
        raise ValueError(
            "expected the tensors of the batch to have one number of examples along batch_dim, got "
            f"{sorted(set(sizes)) or 'no tensor with an example axis'}; shared tensors take None "
            "in a pytree given as batch_dim"
        )
    return dims


def num_examples(batch: Batch, batch_dim: Any) -> int:
    """Return the number of examples of a batch."""
    values, dims = pytrees.leaves(batch), batch_dims(batch, batch_dim)
    return next(v.shape[d] for v, d in zip(values, dims, strict=True) if d is not None)


def select(batch: Batch, batch_dim: Any, examples: Tensor) -> Batch:
    """Return the batch of the given examples."""
    values, restore = pytrees.flatten(batch)
    dims = batch_dims(batch, batch_dim)
    return restore(
        [v if d is None else v.index_select(d, examples) for v, d in zip(values, dims, strict=True)]
    )


def for_each_example(function: Callable[[Batch], Any], batch: Batch, batch_dim: Any) -> Any:
    """Apply a function of a batch of one to every example; results stack along a first axis.

    Random draws inside the function are independent between examples.

    Args:
        function: of a batch of one; returns a pytree of tensors.
        batch: the batch.
        batch_dim: the example axis.

    Returns:
        What the function returned, stacked.
    """
    values, restore = pytrees.flatten(batch)
    dims = batch_dims(batch, batch_dim)

    restores: list[Callable[[Sequence[Tensor]], Any]] = []

    def batch_of_one(example: list[Any]) -> Any:
        given = iter(example)
        results = function(
            restore(
                [
                    v if d is None else next(given).unsqueeze(d if d >= 0 else v.ndim + d)
                    for v, d in zip(values, dims, strict=True)
                ]
            )
        )
        if torch.compiler.is_compiling():
            return results
        tensors, restore_results = pytrees.flatten(results)
        restores.append(restore_results)  # torch's own walk through deep trees is slow
        return tensors

    mapped = [(v, d) for v, d in zip(values, dims, strict=True) if d is not None]
    run = torch.vmap(batch_of_one, in_dims=([d for _, d in mapped],), randomness="different")
    tensors = run([v for v, _ in mapped])
    return restores[-1](tensors) if restores else tensors


def warn_if_data_dependent(error: RuntimeError) -> None:
    """Warn that a model is not run by examples because it branches on values; raise other errors.

    Args:
        error: what `torch.vmap` raised.

    Raises:
        RuntimeError: the error, if it is another.
    """
    if not str(error).startswith("vmap: It looks like you're"):
        raise error
    warnings.warn(
        "the model branches on the values of tensors, which torch.vmap cannot follow, so its "
        "losses are pulled back one by one (batch_dim=None): exact, but slower; move the branch "
        "out of the model, or pass batch_dim=None",
        stacklevel=5,
    )


Run = Callable[[Params, Batch], tuple[Tensor, list[Tensor]]]


def losses_function(
    model_fn: ModelFn, buffers: Buffers, *, has_aux: bool, by_example: bool
) -> tuple[Run, Callable[[list[Tensor]], Any]]:
    """Bind a model to its buffers as a function that transforms can take: tensors in, tensors out.

    Args:
        model_fn: the model.
        buffers: its buffers.
        has_aux: whether it returns (losses, aux).
        by_example: whether it is run on batches of one; then losses lose their example axis, and
            tensors of aux their leading axis of size one.

    Returns:
        ``(run, restore_aux)``: ``run(params, batch) -> (losses [*rows], tensors of aux)``, and what
        makes aux of its tensors again.
    """
    structure: list[Callable[[list[Tensor]], Any]] = []

    def run(params: Params, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        losses, aux = run_model(model_fn, params, buffers, batch, has_aux)
        tensors, restore = pytrees.partition(aux, lambda leaf: isinstance(leaf, Tensor))
        structure.append(restore)
        if not by_example:
            return losses, tensors
        if losses.ndim == 0 or losses.shape[0] != 1:
            raise ValueError(
                "expected losses with one entry per example along their first axis because "
                f"batch_dim is given, got losses of shape {tuple(losses.shape)} for a batch of one "
                'example; use reduction="none", or batch_dim=None for losses that are means over '
                "the batch"
            )
        return losses.squeeze(0), [t.squeeze(0) if t.shape[:1] == (1,) else t for t in tensors]

    return run, lambda tensors: structure[-1](tensors)

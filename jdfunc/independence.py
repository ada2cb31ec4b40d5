"""Whether losses[i] depends on example i alone: what ``batch_dim`` promises."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc import pytrees
from jdfunc.checks import buffers_or_empty, check_model, split_aux
from jdfunc.examples import for_each_example, losses_of_one, num_examples, select
from jdfunc.taps.rules import ONE_EXAMPLE_RULES, VMAP_RULES
from jdfunc.taps.tap import Rule, Tap
from jdfunc.types import Batch, Buffers, Linearization, ModelFn, Params

Losses = Callable[[Batch], Tensor]


def check_batch_independence(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    *,
    buffers: Buffers | None = None,
    batch_dim: Any = 0,
    has_aux: bool = False,
) -> None:
    """Check that every loss depends on its own example, by running examples alone and together.

    The losses of the batch are compared with those of each example run as a batch of one. Where
    they differ, a pair of examples is looked for that shows it. Independence is about values, not
    layouts: sequence-first tensors and reshapes to ``[B·T, d]`` pass. Dropout is left out of both
    runs; a model that draws other random numbers cannot be compared with itself and passes.

    Args:
        model_fn: pure function ``(params, buffers, batch) -> losses [batch, ...]``.
        params: handed to ``model_fn``.
        batch: handed to ``model_fn``.
        buffers: handed to ``model_fn``; an empty dict if None.
        batch_dim: the example axis, as in `jdfunc.structured`.
        has_aux: ``model_fn`` returns ``(losses, aux)``.

    Raises:
        ValueError: the loss of some example changes with another by more than 3 √eps of the
            largest loss: the text names the pair, or the module that couples the batch.
        TypeError: ``model_fn`` is no function, or does not return a tensor.

    Cost: two forward passes without gradients.

    Example:
        >>> def coupled(params, buffers, batch):
        ...     return batch @ params - (batch @ params).mean()
        >>> check_batch_independence(coupled, torch.ones(2), torch.eye(2) * torch.tensor([1, 3]))
        Traceback (most recent call last):
            ...
        ValueError: expected losses that depend on one example each because batch_dim is given, but
        the loss of example 0 is another when it is run together with example 1; ...
    """
    check_model(model_fn, params)
    alone, together = _runs(model_fn, params, buffers_or_empty(buffers), batch_dim, has_aux)

    def coupled(examples: list[int]) -> list[int]:
        part = select(batch, batch_dim, torch.tensor(examples))
        first, second = together(part), together(part)
        if bool(_differ(first, second).any()):  # random beyond dropout
            return []
        return _differ(alone(part), first).nonzero().flatten().tolist()

    everyone = list(range(num_examples(batch, batch_dim)))
    for i in coupled(everyone) if everyone else []:
        j = next((j for j in everyone if j != i and coupled([i, j])), None)
        _raise_coupled(i, "others" if j is None else f"example {j}")


def guarded(
    lin: Linearization,
    model_fn: ModelFn,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    batch_dim: Any,
    has_aux: bool,
) -> Linearization:
    """Guard a linearization by examples: compare the first and last example with a batch of two.

    What is computed from coupled examples is a wrong number. It is an error where the comparison
    can be read at once; in a compiled function, under an outer `torch.vmap`, and on accelerators,
    which are not to be waited for, it is made NaN.

    Args:
        lin: losses, and their Jacobian, of examples run alone.
        model_fn: the model.
        params: its parameters.
        buffers: its buffers.
        batch: the batch.
        batch_dim: the example axis.
        has_aux: whether the model returns (losses, aux).

    Returns:
        The linearization, or one that gives NaN if the two examples are coupled.
    """
    size = lin.losses.shape[0]
    if size < 2:
        return lin
    part = select(batch, batch_dim, torch.tensor([0, size - 1], device=lin.losses.device))
    met: list[bool] = []
    alone, together = _runs(model_fn, params, buffers, batch_dim, has_aux, met)
    of_pair = together(part)
    own = alone(part) if met else lin.losses[:: size - 1].detach()
    differ = _differ(own, of_pair).any()
    if _readable(differ):
        if bool(differ) and not bool(_differ(of_pair, together(part)).any()):
            _raise_coupled(0, f"example {size - 1}")
        return lin
    doubt = torch.where(differ, torch.nan, 0.0).to(lin.losses.dtype)
    return lin._replace(
        losses=lin.losses + doubt,
        gram=lambda: lin.gram() + doubt,
        combine=lambda weights: lin.combine(weights + doubt),
    )


def _readable(tensor: Tensor) -> bool:
    """Tell whether the value of a tensor can be read here and now without waiting for a device."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        bool(tensor)
    except RuntimeError:  # under an outer torch.vmap
        return False
    return True


def _runs(
    model_fn: ModelFn,
    params: Params,
    buffers: Buffers,
    batch_dim: Any,
    has_aux: bool,
    met: list[bool] | None = None,
) -> tuple[Losses, Losses]:
    """Return the losses of each example run alone, and run together, without dropout.

    A dropout that is left out is noted in ``met``.
    """
    values = pytrees.leaves(params)
    named = dict(zip(pytrees.names(params), values, strict=True))
    dropout = _without_dropout([] if met is None else met)
    rules = {**VMAP_RULES, **ONE_EXAMPLE_RULES, **dropout}

    def quietly(run: Losses) -> Losses:
        def losses(examples: Batch) -> Tensor:
            with torch.no_grad(), Tap(named, rules):
                return run(examples)

        return losses

    def one(example: Batch) -> Tensor:
        return losses_of_one(model_fn, params, buffers, example, has_aux)[0]

    return (
        quietly(lambda examples: for_each_example(one, examples, batch_dim)),
        quietly(lambda examples: split_aux(model_fn(params, buffers, examples), has_aux)[0]),
    )


def _differ(alone: Tensor, together: Tensor) -> Tensor:
    """Tell which examples have other losses, beyond the rounding of sums in another order."""
    if alone.shape != together.shape:
        raise ValueError(
            "expected losses with one entry per example along their first axis because batch_dim "
            f"is given, got losses of shape {tuple(together.shape)} for a batch of "
            f"{alone.shape[0]} examples"
        )
    tolerance = 3 * torch.finfo(alone.dtype).eps ** 0.5
    largest = torch.where(together.isfinite(), together, 0).abs().amax()
    close = (alone - together).abs() <= tolerance * largest
    same = close | (~alone.isfinite() & ~together.isfinite())
    return ~same.reshape(same.shape[0], -1).all(1)


def _raise_coupled(i: int, other: str) -> None:
    raise ValueError(
        "expected losses that depend on one example each because batch_dim is given, but the loss "
        f"of example {i} is another when it is run together with {other}; use batch_dim=None if "
        "examples are coupled (batch statistics, attention across the batch), and take means over "
        "the batch out of the losses if they are not"
    )


def _without_dropout(met: list[bool]) -> dict[Any, Rule]:
    def kept(
        tap: Tap,
        func: Any,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if training and p > 0:
            met.append(True)
        return input

    functions = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
    return dict.fromkeys([*functions, F.feature_alpha_dropout, torch.dropout], kept)

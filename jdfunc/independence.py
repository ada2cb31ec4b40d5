"""Whether losses[i] depends on example i alone: what ``batch_dim`` promises."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from jdfunc import pytrees
from jdfunc.checks import check_buffers, check_model
from jdfunc.examples import for_each_example, losses_function, num_examples, select
from jdfunc.taps.rules import ONE_EXAMPLE_RULES, RECURRENT_RULES, VMAP_RULES
from jdfunc.taps.tap import Rule, Tap
from jdfunc.types import Batch, Buffers, Linearization, ModelFn, Params

#: Every step compares one example in so many with a batch of them, and `FEWEST` at least.
ONE_IN, FEWEST = 8, 8


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

    The losses of the whole batch are compared with those of each example run as a batch of one,
    and so is the gradient of a sum of them with uneven weights. Where losses differ, a pair of
    examples is looked for that shows it. Independence is about values, not layouts: sequence-first
    tensors and reshapes to ``[B·T, d]`` pass. Dropout is left out of all runs; a model that draws
    other random numbers cannot be compared with itself and passes.

    `jdfunc.structured` and `jdfunc.dense` do the first comparison at every step for an eighth of
    the examples, eight at least, evenly spaced.

    Args:
        model_fn: pure function ``(params, buffers, batch) -> losses [batch, ...]``.
        params: handed to ``model_fn``.
        batch: handed to ``model_fn``.
        buffers: handed to ``model_fn``; an empty dict if None.
        batch_dim: the example axis, as in `jdfunc.structured`.
        has_aux: ``model_fn`` returns ``(losses, aux)``.

    Raises:
        ValueError: the loss of some example changes with another by more than 3 √eps of the
            largest loss, or the gradient does: the text names the pair, or the module that couples
            the batch.
        TypeError: ``model_fn`` is no function, or does not return a tensor.

    Cost: two forward and two backward passes.

    Example:
        >>> def coupled(params, buffers, batch):
        ...     return batch @ params - (batch @ params).mean()
        >>> check_batch_independence(coupled, torch.ones(2), torch.eye(2) * torch.tensor([1, 3]))
        Traceback (most recent call last):
            ...
        ValueError: expected losses that depend on one example each because batch_dim is given, ...
    """
    check_model(model_fn, params)
    given, size = check_buffers(buffers), num_examples(batch, batch_dim)
    alone, together, seen = _runs(model_fn, given, batch_dim, has_aux)
    if size == 0:
        return

    def coupled(examples: list[int]) -> list[int]:
        part = select(batch, batch_dim, torch.tensor(examples))
        with torch.no_grad():
            of_part = together(params, part)
        own = alone(params, part).detach()
        return _differ(own, of_part, seen.eps).nonzero().flatten().tolist()

    with torch.no_grad():
        first, second = together(params, batch), together(params, batch)
    if first.ndim and bool(_differ(first, second, seen.eps).any()):  # random beyond dropout
        return
    everyone = list(range(size))
    for i in coupled(everyone):
        partner = next((j for j in everyone if j != i and 0 in coupled([i, j])), None)
        _raise_coupled(i, "the others" if partner is None else f"example {partner}")
    first, second = _gradients(alone, params, batch), _gradients(together, params, batch)
    scale = max((float(g.abs().max()) for g in first if g.numel()), default=0.0)
    for a, b in zip(first, second, strict=True):
        if a.numel() and float((a - b).abs().max()) > _tolerance(a, seen.eps) * scale:
            raise ValueError(
                "expected losses that depend on one example each because batch_dim is given, but "
                f"gradients of the {size} examples run alone and together differ, though losses "
                "do not; use batch_dim=None"
            )


Losses = Callable[[Params, Batch], Tensor]


def guarded(
    lin: Linearization,
    model_fn: ModelFn,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    batch_dim: Any,
    has_aux: bool,
) -> Linearization:
    """Guard a linearization by examples: compare some of its losses with those of a batch of them.

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
        The linearization, or one that gives NaN if examples are coupled.
    """
    size = lin.losses.shape[0]
    if size < 2:
        return lin
    count = min(size, max(FEWEST, size // ONE_IN))
    # A tensor, not a list: a compiled function need not know how many there are.
    chosen = torch.arange(count, device=lin.losses.device) * (size - 1) // (count - 1)
    part = select(batch, batch_dim, chosen)
    alone, together, seen = _runs(model_fn, buffers, batch_dim, has_aux)
    with torch.no_grad():
        of_part = together(params, part)
    own = alone(params, part).detach() if seen.dropouts else lin.losses[chosen].detach()
    differ = _differ(own, of_part, seen.eps)
    if readable(differ):
        if bool(differ.any()):
            with torch.no_grad():
                random = bool(_differ(of_part, together(params, part), seen.eps).any())
            if not random:
                tried = chosen.tolist()
                _raise_coupled(tried[int(differ.nonzero()[0])], f"examples {tried}")
        return lin
    doubt = torch.where(differ.any(), torch.nan, 0.0).to(lin.losses.dtype)
    return lin._replace(
        losses=lin.losses + doubt,
        gram=lambda *metric: lin.gram(*metric) + doubt,
        combine=lambda weights: lin.combine(weights + doubt),
    )


def readable(tensor: Tensor) -> bool:
    """Tell whether the value of a tensor can be read here and now without waiting for a device."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        bool(tensor.any())
    except RuntimeError:  # under an outer torch.vmap
        return False
    return True


class Seen(TorchFunctionMode):
    """What a run did: the dropouts left out, and eps of the coarsest dtype that it computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.dropouts: list[str] = []
        self.eps = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.is_floating_point():
            self.eps = max(self.eps, torch.finfo(output.dtype).eps)
        return output


def _runs(
    model_fn: ModelFn, buffers: Buffers, batch_dim: Any, has_aux: bool
) -> tuple[Losses, Losses, Seen]:
    """Return the losses of examples run alone, and run together, both without dropout.

    The third result fills with what was seen on the way.
    """
    seen = Seen()
    without_dropout = _without_dropout(seen.dropouts)

    def tapped(params: Params, batch: Batch, by_example: bool) -> Tensor:
        run, _ = losses_function(model_fn, buffers, has_aux=has_aux, by_example=by_example)
        named = dict(zip(pytrees.names(params), pytrees.leaves(params), strict=True))
        rules = {**VMAP_RULES, **ONE_EXAMPLE_RULES} if by_example else RECURRENT_RULES
        tap = Tap(named, {**rules, **without_dropout})
        with nullcontext() if by_example else seen, tap:
            return run(params, batch)[0]

    def alone(params: Params, batch: Batch) -> Tensor:
        # Differentiated, as in a linearization: some kernels have batching rules only then.
        def one(example: Batch) -> Tensor:
            values, restore = pytrees.flatten(params)
            if not values:
                return tapped(params, example, True)
            return torch.func.vjp(lambda *v: tapped(restore(v), example, True), *values)[0]

        return for_each_example(one, batch, batch_dim)

    return alone, lambda params, batch: tapped(params, batch, False), seen


def _gradients(losses: Losses, params: Params, batch: Batch) -> list[Tensor]:
    """Gradient of a sum of losses with uneven weights."""
    values, restore = pytrees.flatten(params)
    if not values:
        return []
    values = [v.detach() for v in values]
    result: Any = torch.func.vjp(lambda *v: losses(restore(v), batch), *values)
    out, pullback = result
    weights = torch.linspace(1, 2, out.numel(), dtype=out.dtype, device=out.device)
    return [grad.detach() for grad in pullback(weights.reshape(out.shape))]


def _tolerance(tensor: Tensor, eps: float) -> float:
    """What sums in another order may differ by: 3 √eps of the coarsest dtype computed in."""
    dtype, device = tensor.dtype, tensor.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return 3 * max(eps, torch.finfo(dtype).eps, torch.finfo(tensor.dtype).eps) ** 0.5


def _differ(alone: Tensor, together: Tensor, eps: float) -> Tensor:
    """Tell which examples have other losses."""
    if alone.shape != together.shape:
        raise ValueError(
            "expected losses with one entry per example along their first axis because batch_dim "
            f"is given, got losses of shape {tuple(together.shape)} for a batch of "
            f"{alone.shape[0]} examples"
        )
    largest = torch.where(together.isfinite(), together, 0).abs().amax()
    close = (alone - together).abs() <= _tolerance(alone, eps) * largest
    same = close | (~alone.isfinite() & ~together.isfinite())
    return ~same.reshape(same.shape[0], -1).all(1)


def _raise_coupled(i: int, others: str) -> None:
    raise ValueError(
        "expected losses that depend on one example each because batch_dim is given, but the loss "
        f"of example {i} is another when it is run together with {others}; use batch_dim=None if "
        "examples are coupled (batch statistics, attention across the batch), and take means over "
        "the batch out of the losses if they are not"
    )


def _without_dropout(dropouts: list[str]) -> dict[Any, Rule]:
    def kept(
        tap: Tap,
        func: Any,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if training and p > 0:
            dropouts.append(func.__name__)
        return input

    functions = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
    return dict.fromkeys([*functions, F.feature_alpha_dropout, torch.dropout], kept)

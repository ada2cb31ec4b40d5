"""A random sketch of J by forward mode: the Gramian in the memory of inference."""

from __future__ import annotations  # Dynamo does not trace the annotations of inner functions

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from jdfunc import algebra, pytrees
from jdfunc import random as jdrandom
from jdfunc.checks import check_buffers, check_model, check_positive
from jdfunc.linearizations.bound import (
    Bound,
    Push,
    bound,
    checked_weights,
    each,
    pulled,
    transposed,
    wide_dtype,
)
from jdfunc.linearizations.linearized import begun, detached, tracked
from jdfunc.taps.rules import RECURRENT_RULES, VMAP_RULES
from jdfunc.taps.tap import Tap
from jdfunc.types import Batch, Buffers, Linearization, Linearize, Metric, ModelFn, Params


def sketched(rank: int, key: jdrandom.Key, *, chunk_size: int = 1) -> Linearize:
    """Estimate G by a sketch J S with random signs S, [n, rank], never held: unbiased.

    G̃ = (J S)(J S)ᵀ / rank, with S made of ±1 drawn from the key, one tangent at a time, and J S
    by forward mode, which keeps nothing of the forward pass. ``combine`` is exact: one gradient
    of the weighted losses.

    With gradients g_i, rows of J, and r for rank:

    - E[G̃] = G, and Var[G̃_ij] = (|g_i|² |g_j|² + G_ij² − 2 Σ_c g_ic² g_jc²) / r.
    - All |G̃_ij − G_ij| ≤ ε |g_i| |g_j| with probability 1 − 2 m² exp(−r (ε²/4 − ε³/6)): for
      m = 10, ε = ½ and 99 in a hundred, r = 238.
    - (1 − ε) G ≼ G̃ ≼ (1 + ε) G with probability 1 − 2 · 9^m exp(−r (ε²/16 − ε³/48)).

    G̃ is positive semidefinite of rank r at most: take r well above m, else weightings see
    conflicts away that are there. A new key at every step, ``jdfunc.random.fold_in(key, step)``,
    makes the errors of steps independent.

    Args:
        rank: columns of S.
        key: an int, or an int64 tensor without axes (with one under `torch.vmap`). Equal keys give
            equal S on every device.
        chunk_size: tangents taken together, by `torch.vmap`.

    Returns:
        A function for the ``linearize`` argument of a step. Its `Linearization` has no ``rows``,
        and its ``gram`` takes no metric. ``losses`` are of one run of the model; the Gramian
        runs it again for every chunk, and ``combine`` once more, on the same random draws.

    Raises:
        ValueError: rank or chunk_size is not positive, or the key has axes. From the Linearization:
            params are not floating point; the losses depend on none of them; examples are coupled
            where ``batch_dim`` is given; a metric is given; or an embedding scales gradients by
            frequency, which is no derivative.
        TypeError: rank is no int, the key is neither an int nor int64, ``model_fn`` is no function,
            or does not return a tensor.

    Cost: rank forward passes and tangents of them, each about twice a forward pass; memory of one
    forward pass and chunk_size · n elements. Operations without a forward-mode derivative are
    pulled back twice in its place, with a warning, and so is a compiled step, without one: equal
    numbers, in the memory of a gradient.

    References:
        Achlioptas, Database-friendly random projections, 2003, Theorem 1.1 (signs, and the
        constants of the second bound); Vershynin, High-Dimensional Probability, 2018, Lemma 4.4.3
        and Corollary 4.2.13 (nets, for the third).

    Example:
        >>> def model_fn(params, buffers, batch):
        ...     return batch @ params["w"]
        >>> X = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> sketched(64, 0)(model_fn, {"w": torch.zeros(2)}, X).gram()  # G is [[5, 2], [2, 1]]
        tensor([[5.8750, 2.2188],
                [2.2188, 1.0000]])
    """
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"expected rank to be an int, got {type(rank).__name__}")
    check_positive(rank=rank, chunk_size=chunk_size)
    if isinstance(key, Tensor) and key.ndim:
        raise ValueError(
            f"expected one key, an int64 tensor of shape (), got shape {tuple(key.shape)}; map "
            "over keys with torch.vmap"
        )
    keys = jdrandom.bits(key, rank)

    def linearize(
        model_fn: ModelFn,
        params: Params,
        batch: Batch,
        *,
        buffers: Buffers | None = None,
        batch_dim: Any = None,
        has_aux: bool = False,
    ) -> Linearization:
        check_model(model_fn, params)
        given, params = check_buffers(buffers), detached(params)
        differentiable = tracked(params, given, batch)

        def begin(batch_dim: Any) -> Linearization:
            eager = not torch.compiler.is_compiling()
            model = bound(
                model_fn,
                params,
                given,
                batch,
                batch_dim,
                has_aux=has_aux,
                differentiable=differentiable,
                rules={
                    **dict.fromkeys((F.embedding, F.embedding_bag), _derived_embedding),
                    **RECURRENT_RULES,
                },
                around=partial(_as_in_reverse, differentiable) if eager else nullcontext,
            )
            return _linearization(model, keys, chunk_size)

        return begun(begin, model_fn, params, given, batch, batch_dim, has_aux)

    return linearize


def _linearization(model: Bound, keys: Tensor, chunk_size: int) -> Linearization:
    if torch.compiler.is_compiling():
        # One run for all: the compiler would merge the forward passes of several, and keep them.
        losses, pull, aux = pulled(model)
        push = transposed(pull, losses, model)
    else:
        again = _replay(model)
        losses, aux = model.run(model.values)

        def pull(w: Tensor) -> list[Tensor]:
            with again():
                return pulled(model)[1](w)

        def push(v: list[Tensor], /) -> Tensor:
            try:
                with again():
                    return model.push(v)
            except NotImplementedError as error:
                _warn(error)
            with again():
                losses, pull, _ = pulled(model)
                return _twice_pulled(transposed(pull, losses, model), v)

    def gram(metric: Metric | None = None) -> Tensor:
        if metric is not None:
            raise ValueError(
                "expected no metric with sketched: a sketch of J F⁻¹ Jᵀ takes a root of F⁻¹; use "
                "jdfunc.matrix_free, jdfunc.structured or jdfunc.dense"
            )
        shape, wide = (*losses.shape, *reversed(losses.shape)), wide_dtype(model.values)
        if not model.values or not losses.numel():
            return losses.new_zeros(shape, dtype=wide)

        def product(key: Tensor) -> Tensor:
            return push(_signs(key, model.values))

        chunks = keys.to(losses.device).split(chunk_size)
        sketch = torch.cat([each(product, chunk) for chunk in chunks]).to(wide)
        sketch = sketch.reshape(len(keys), losses.numel())
        return algebra.reversed_half(
            algebra.gram(sketch.mT) / len(keys), losses.shape, losses.shape
        )

    def combine(weights: Tensor) -> Params:
        return model.restore(pull(checked_weights(weights, losses)))

    return Linearization(losses, gram, combine, None, model.restore_aux(aux))


def _signs(key: Tensor, like: list[Tensor]) -> list[Tensor]:
    """One column of S: a random sign for every element of every tensor, a bit of the key each."""
    return [_signs_of(jdrandom.fold_in(key, k), tensor) for k, tensor in enumerate(like)]


def _signs_of(key: Tensor, like: Tensor) -> Tensor:
    n = like.numel()
    words = jdrandom.bits(key, -(-n // 64))
    places = torch.arange(8, device=key.device)
    octets = ((words[..., None] >> 8 * places) & 255).to(torch.uint8)  # a byte an element, not 8
    ones = (octets[..., None] >> places.to(torch.uint8)) & 1
    return ones.flatten()[:n].to(like.dtype).mul_(2).sub_(1).reshape(like.shape)


def _replay(model: Bound) -> Callable[[], AbstractContextManager[None]]:
    """What runs a model once more on the random draws that come next, and then puts them back."""
    device = model.values[0].device if model.values else torch.device("cpu")
    module = torch.get_device_module(device)
    others = [] if device.type == "cpu" else [device]
    state, states = torch.get_rng_state(), [module.get_rng_state(other) for other in others]

    @contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng(others, device_type=others[0].type if others else "cuda"):
            torch.set_rng_state(state)
            for other, of_other in zip(others, states, strict=True):
                module.set_rng_state(of_other, other)
            yield

    return again


def _derived_embedding(tap: Tap, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Rule of embeddings, whose gradients need not be derivatives: padding, and frequencies."""
    if kwargs.get("scale_grad_by_freq") or (len(args) > 4 and args[4]):
        raise ValueError(
            "expected a model whose gradients are derivatives, got an embedding with "
            "scale_grad_by_freq=True, which a sketch by forward mode cannot see; use "
            "jdfunc.matrix_free or jdfunc.dense"
        )
    output = VMAP_RULES[func](tap, func, input, *args, **kwargs)
    padding = kwargs.get("padding_idx", args[1] if len(args) > 1 else None)
    if func is not F.embedding or padding is None:
        return output
    rows = (args[0] if args else kwargs["weight"]).shape[0]
    return torch.where((input == padding % rows)[..., None], output.detach(), output)


class _Constants(TorchFunctionMode):
    """Makes constants of what reverse mode takes for constant, and forward mode does not."""

    def __init__(self, keep_graph: bool) -> None:
        super().__init__()
        self.keep_graph = keep_graph

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Under no_grad everything; and module parameters that the model brings, lest there be a
        # graph, which holds all activations.
        kinds = Parameter if torch.is_grad_enabled() else Tensor
        if self.keep_graph and kinds is Parameter:
            return func(*args, **(kwargs or {}))
        args, kwargs = pytrees.map(
            lambda x: x.detach() if isinstance(x, kinds) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


@contextmanager
def _as_in_reverse(keep_graph: bool) -> Iterator[None]:
    """Run a model with the constants of reverse mode."""
    with torch.enable_grad(), _Constants(keep_graph):
        yield


def _twice_pulled(push: Push, v: list[Tensor]) -> Tensor:
    try:
        return push(v)
    except NotImplementedError as error:
        raise ValueError(
            "expected operations with a forward-mode derivative or a second derivative, which "
            f"sketched needs, got one without ({error}); use jdfunc.matrix_free or jdfunc.dense"
        ) from error


def _warn(error: NotImplementedError) -> None:
    warnings.warn(
        f"an operation of the model has no forward-mode derivative, so its sketch is taken by two "
        f"pullbacks: equal numbers, but the memory of a gradient ({error})",
        stacklevel=5,
    )

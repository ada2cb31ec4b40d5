"""What curvature is made of: the rows of pseudo-losses, kept as activations and cotangents.

With vectors v_k such that Σ_k v_k v_kᵀ is the Hessian of an example's loss in its outputs f, the
pseudo-losses ℓ_k = ⟨v_k, f⟩ have gradients J_fᵀ v_k, and the Gauss-Newton matrix is the sum of
their squares. So whatever holds a Jacobian's rows holds all that its blocks need.
"""

from __future__ import annotations  # Dynamo does not trace the annotations of inner functions

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.curvature.operate.trees import unrounded
from jdfunc.examples import for_each_example, select, warn_if_data_dependent
from jdfunc.factored.leaves import OneHot, Outer, Side, materialise
from jdfunc.taps.linearize import Named, sides, tapped
from jdfunc.taps.rules import ONE_EXAMPLE_RULES, RULES
from jdfunc.taps.tap import Tap, Use

#: ``(params, buffers, inputs) -> outputs``
ApplyFn = Callable[[Any, Any, Any], Any]
#: ``(outputs, targets, key) -> (f [1, ...], vectors [V, 1, ...], what is added to a divisor)``
VectorsFn = Callable[[Any, Any, Tensor], tuple[Tensor, Tensor, Tensor]]

#: ``inputs -> [b, s]``
PositionMask = Callable[[Any], Tensor]


class UseOf(NamedTuple):
    """What one use of a parameter as a matrix is, without its tensors.

    Attributes:
        param: its name.
        activations: the side of the activations, 0 for the left and 1 for the right.
        bias: the parameter that is added to its output.
        function: the function that used it.
        padded: how many cotangents before and after are zero, where it took a part.
    """

    param: str
    activations: int
    bias: str | None
    function: str
    padded: tuple[int, int] = (0, 0)


class Captured(NamedTuple):
    """The rows of n examples' pseudo-losses.

    Attributes:
        uses: activations [n, 1, h, s, d] and cotangents [n, V, h, s, e] of every use that was kept,
            in the order of the model's calls; () for cotangents that were not pulled back.
        rows: by parameter, dense rows [n, V, *param.shape] of all else.
        counts: what each example adds to the divisor of a mean, [n].
        mask: which positions count in A, [n, s]; () if all do.
    """

    uses: list[tuple[Side, Any]]
    rows: Named
    counts: Tensor
    mask: Tensor | tuple[()]


def captured(
    apply: ApplyFn,
    params: Any,
    buffers: Any,
    batch: tuple[Any, Any, Tensor],
    batch_dim: Any,
    vectors: VectorsFn,
    *,
    wanted: Sequence[str],
    kept: Collection[str],
    position_mask: PositionMask | None = None,
    backward: bool = True,
) -> tuple[Captured, list[UseOf]]:
    """Run examples one at a time, by `torch.vmap`, and pull their pseudo-losses back.

    Args:
        apply: the model, ``(params, buffers, inputs) -> outputs``.
        params: its parameters.
        buffers: its buffers.
        batch: inputs, targets, and one key for each example.
        batch_dim: the example axis of each of the three.
        vectors: makes the pseudo-losses of one example.
        wanted: the parameters to differentiate with respect to, by name.
        kept: those whose uses are kept; the rows of the others are made dense.
        position_mask: ``inputs -> [b, s]``, which positions count in A.
        backward: whether to pull back; else uses have no cotangents, and there are no rows.

    Returns:
        What was captured, and what its uses are.
    """
    found: list[UseOf] = []

    def one(example: tuple[Any, Any, Tensor]) -> Captured:
        inputs, targets, key = example
        given, run = bound(apply, params, buffers, inputs, wanted)

        def pseudo_losses(named: Named) -> tuple[Tensor, list[Tensor]]:
            f, v, count = vectors(run(named), targets, key.squeeze(0))
            # A product of matrices, whose pullback of V units takes V C numbers, and not V² C.
            with unrounded([v]):
                losses = v.flatten(1) @ f.flatten().to(v.dtype)
            masks = [] if position_mask is None else [position_mask(inputs).squeeze(0)]
            return losses, [count, *masks]

        if not backward:
            return _forward(pseudo_losses, given, kept, found)
        return tapped(
            pseudo_losses,
            given,
            factored=True,
            one_example=True,
            differentiable=False,
            settle=partial(_settled, kept, found),
        )

    return _each_example(one, batch, batch_dim), found


def _settled(
    kept: Collection[str],
    found: list[UseOf],
    losses: Tensor,
    aux: list[Tensor],
    uses: Sequence[Use],
    cotangents: dict[int, Tensor],
    rows: Named,
) -> Captured:
    """Lay the uses that are kept out as pairs, and add those of other parameters to their rows."""
    found.clear()
    pairs, dense = [], dict(rows)
    for k, use in enumerate(uses):
        if k not in cotangents:  # the output of this use does not reach the losses
            continue
        left, right = sides(use, cotangents[k], 1)
        if use.name in kept:
            found.append(_use_of(use))
            pairs.append((left, right) if use.activations_first else (right, left))
        else:
            made = materialise(Outer(left, right, use.param))
            dense[use.name] = dense[use.name] + made if use.name in dense else made
    return Captured(pairs, dense, aux[0], aux[1] if len(aux) > 1 else ())


def _forward(
    losses_fn: Callable[[Named], tuple[Tensor, list[Tensor]]],
    given: Named,
    kept: Collection[str],
    found: list[UseOf],
) -> Captured:
    """Run the model and lay the activations of the uses that are kept out."""

    def forward(named: Named) -> tuple[Tensor, Captured]:
        tap = Tap(named, {**RULES, **ONE_EXAMPLE_RULES}, named)
        with tap:
            losses, aux = losses_fn(named)
        uses = [use for use in tap.uses if use.name in kept]
        found[:] = [_use_of(use) for use in uses]
        pairs: list[Any] = [(_rows_axis(use.activations(use.given)), ()) for use in uses]
        return losses, Captured(pairs, {}, aux[0], aux[1] if len(aux) > 1 else ())

    result: Any = torch.func.vjp(forward, given, has_aux=True)
    return result[2]


def bound(
    apply: ApplyFn, params: Any, buffers: Any, inputs: Any, wanted: Sequence[str]
) -> tuple[Named, Callable[[Named], Any]]:
    """Return the wanted parameters by name, and the model as a function of them."""
    values, restore = pytrees.flatten(params)
    names = pytrees.names(params)
    named = dict(zip(names, values, strict=True))

    def run(given: Named) -> Any:
        own = pytrees.map(Tensor.clone, buffers) if buffers else buffers
        return apply(restore([given.get(name, named[name]) for name in names]), own, inputs)

    return {name: named[name] for name in wanted}, run


def _each_example(one: Callable[[Any], Captured], batch: Any, batch_dim: Any) -> Captured:
    """Run examples by `torch.vmap`, or one by one if the model branches on values."""
    # Autograd does not follow tensors of inference mode; and no graph is held by what is captured.
    with torch.inference_mode(False), torch.no_grad():
        return _by_vmap_or_one_by_one(one, batch, batch_dim)


def _by_vmap_or_one_by_one(one: Callable[[Any], Captured], batch: Any, batch_dim: Any) -> Captured:
    try:
        return for_each_example(one, batch, batch_dim)
    except RuntimeError as error:
        warn_if_data_dependent(error)
    runs = []
    for k in range(batch[2].shape[0]):
        example = select(batch, batch_dim, torch.arange(k, k + 1, device=batch[2].device))
        runs.append(pytrees.map(lambda leaf: leaf[None], one(example)))
    return pytrees.map(lambda *leaves: torch.cat(leaves), *runs)


def _rows_axis(side: Side) -> Side:
    return OneHot(side.indices[None]) if isinstance(side, OneHot) else side[None]


def _use_of(use: Use) -> UseOf:
    side = 0 if use.activations_first else 1
    return UseOf(use.name, side, use.bias, use.function, use.padded)


def outer(pair: tuple[Side, Any], use: UseOf, param: Tensor) -> Outer:
    """Return the rows that one use adds to those of its parameter."""
    activation, cotangent = pair
    if use.activations == 0:
        return Outer(activation, cotangent, param)
    assert isinstance(activation, Tensor)  # one-hot vectors stand on the left
    return Outer(cotangent, activation, param)

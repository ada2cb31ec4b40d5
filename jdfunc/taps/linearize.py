"""One run of a model under the tap: losses, and what is needed of every parameter's rows.

For each parameter the cotangents of its recognised uses, beside their activations; and, where
autograd finds a path from the losses to the parameter that no rule took, dense rows of that path.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from jdfunc import pytrees
from jdfunc.checks import check_depends
from jdfunc.factored.leaves import OneHot, Outer, Side, elements, materialise
from jdfunc.taps.rules import ONE_EXAMPLE_RULES, RULES, VMAP_RULES
from jdfunc.taps.tap import Rule, Tap, Use

LossesFn = Callable[[dict[str, Tensor]], tuple[Tensor, list[Tensor]]]
Named = dict[str, Tensor]
Rules = dict[Any, Rule]
#: ``(losses, aux, uses, cotangents, rows) -> pytree of tensors``
Settle = Callable[[Tensor, list[Tensor], Sequence[Use], dict[int, Tensor], Named], Any]


class Tapped(NamedTuple):
    """What one run leaves: tensors only, so that `torch.vmap` can stack the runs of examples.

    Attributes:
        losses: [*rows].
        aux: the tensors of what the model returned beside its losses.
        uses: by parameter, the pairs (left, right) of its recognised uses; the side of the
            activations has row axes of size one.
        rows: by parameter, dense rows [*rows, *param.shape] of all its other uses.
    """

    losses: Tensor
    aux: list[Tensor]
    uses: dict[str, list[tuple[Side, Side]]]
    rows: Named


def tapped(
    losses_fn: LossesFn,
    params: Named,
    *,
    factored: bool,
    one_example: bool,
    differentiable: bool = True,
    chunk_size: int | None = None,
    settle: Settle | None = None,
) -> Any:
    """Run ``losses_fn`` on named params under the tap, and pull every loss back.

    Args:
        losses_fn: ``params -> (losses [*rows], tensors of aux)``.
        params: the parameters by name.
        factored: whether to keep uses; all rows are dense otherwise.
        one_example: whether this runs for one example of many, under `torch.vmap`.
        differentiable: whether the rows may be differentiated in turn, which holds memory.
        chunk_size: how many losses are pulled back at a time; all at once if None.
        settle: makes the result, a pytree of tensors, of losses, aux, uses, their cotangents by
            number, and other rows by name; `settled` if None.

    Returns:
        The losses and the pieces of their Jacobian.
    """
    settle = settled if settle is None else settle
    if not params:
        return settle(*losses_fn(params), [], {}, {})
    rules = {**(RULES if factored else VMAP_RULES), **(ONE_EXAMPLE_RULES if one_example else {})}
    if torch.compiler.is_compiling():
        return _traced(losses_fn, params, rules, factored, chunk_size, settle)
    outside = torch.is_grad_enabled()
    with torch.enable_grad():  # without, some kernels keep nothing for the transform's backward
        create_graph = differentiable and outside
        found = _eager(losses_fn, params, rules, factored, create_graph, chunk_size, settle)
    return found if outside else pytrees.map(Tensor.detach, found)


def _eager(
    losses_fn: LossesFn,
    params: Named,
    rules: Rules,
    factored: bool,
    create_graph: bool,
    chunk_size: int | None,
    settle: Settle,
) -> Any:
    """Ask autograd, inside the transform, for the gradient at the outputs of the uses."""
    # No probe is added to the model, and no shape is needed beforehand.
    names = list(params)

    def run(values: list[Tensor], shadows: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        given = dict(zip(names, values, strict=True))
        edges = []

        def observe(output: Tensor) -> Tensor:
            edges.append(get_gradient_edge(output))  # an edge outlives what is written in place
            return output

        shadow = dict(zip(names, shadows, strict=True)) if factored else None
        tap = Tap(given, rules, shadow, observe)
        with tap:
            losses, aux = losses_fn(given)
        check_depends(losses, params)
        _check_unwritten(tap.uses)
        inputs = [*edges, *values]

        def pullback(cotangent: Tensor) -> dict[int, Tensor]:
            grads = torch.autograd.grad(
                losses,
                inputs,
                cotangent,
                retain_graph=create_graph or losses.numel() > 1,
                create_graph=create_graph,
                allow_unused=True,
            )
            return {k: grad for k, grad in enumerate(grads) if grad is not None}

        pulled = _pull_each(pullback, losses, chunk_size)
        rows = {n: pulled[k] for k, n in enumerate(names, len(edges)) if k in pulled}
        cotangents = {k: grad for k, grad in pulled.items() if k < len(edges)}
        tensors, restore = pytrees.flatten(settle(losses, aux, tap.uses, cotangents, rows))
        restores.append(restore)  # torch's own walk through deep trees is slow
        return losses, tensors

    restores: list[Callable[[Sequence[Tensor]], Any]] = []
    values = list(params.values())
    result: Any = torch.func.vjp(run, values, values, has_aux=True)
    return restores[-1](result[2])


def _traced(
    losses_fn: LossesFn,
    params: Named,
    rules: Rules,
    factored: bool,
    chunk_size: int | None,
    settle: Settle,
) -> Any:
    """Differentiate with respect to zero probes added to the outputs of the uses."""
    # For the compiler, which cannot trace autograd inside a transform. It drops the first run,
    # which is there for the shapes of the probes and to see which parameters have other uses.
    surveys: list[Tap] = []
    shapes: list[Tensor] = []

    def measure(output: Tensor) -> Tensor:
        shapes.append(output)
        return output

    def look(params: Named) -> Tensor:
        survey = Tap(params, rules, params if factored else None, measure)
        with survey:
            losses, _ = losses_fn(params)
        surveys.append(survey)
        return losses

    torch.func.vjp(look, params)
    (survey,) = surveys
    probes = [output.new_zeros(()).expand(output.shape) for output in shapes]
    recognised = {use.name for use in survey.uses} - set(survey.other_uses)
    others = {name: param for name, param in params.items() if name not in recognised}

    def run(probes: list[Tensor], others: Named) -> tuple[Tensor, Any]:
        given = {name: others.get(name, param) for name, param in params.items()}
        waiting = iter(probes)
        tap = Tap(given, rules, params if factored else None, lambda y: y + next(waiting))
        with tap:
            losses, aux = losses_fn(given)
        return losses, (losses, aux, [use.given for use in tap.uses])

    result: Any = torch.func.vjp(run, probes, others, has_aux=True)
    _, pullback, (losses, aux, givens) = result
    cotangents, rows = _pull_each(pullback, losses, chunk_size)
    uses = [use._replace(given=x) for use, x in zip(survey.uses, givens, strict=True)]
    return settle(losses, aux, uses, dict(enumerate(cotangents)), rows)


def _pull_each(pullback: Callable[[Tensor], Any], losses: Tensor, chunk_size: int | None) -> Any:
    """Pull every loss back: results [*rows, ...]."""
    m = losses.numel()
    if m <= 1:
        one = pullback(torch.ones_like(losses))
        return pytrees.map(
            lambda grad: grad.expand(1, *grad.shape)[:m].reshape((*losses.shape, *grad.shape)), one
        )
    units = torch.eye(m, dtype=losses.dtype, device=losses.device)
    units = units.reshape(m, *losses.shape)
    each = torch.vmap(pullback, chunk_size=chunk_size)(units)
    return pytrees.map(lambda grads: grads.reshape((*losses.shape, *grads.shape[1:])), each)


def settled(
    losses: Tensor,
    aux: list[Tensor],
    uses: Sequence[Use],
    cotangents: dict[int, Tensor],
    rows: Named,
) -> Tapped:
    """Lay the uses out as their two sides, or as dense rows where these take less memory."""
    uses_of: dict[str, list[tuple[Side, Side]]] = {}
    dense, m = dict(rows), losses.numel()
    for k, use in enumerate(uses):
        if k not in cotangents:  # the output of this use does not reach the losses
            continue
        if use.direct is not None:
            cotangent = cotangents[k]
            apart = use.direct.elements(cotangent.shape) + cotangent.numel()
            if m * use.param.numel() < apart:
                wide = torch.promote_types(cotangent.dtype, torch.float32)
                row = partial(use.direct.rows, use.given.to(wide))
                made = _each_row(row, losses.ndim)(cotangent.to(wide)).to(use.param.dtype)
                dense[use.name] = dense[use.name] + made if use.name in dense else made
                continue
        pair = sides(use, cotangents[k], losses.ndim)
        outer = Outer(pair[0], pair[1], use.param)
        if not isinstance(outer.left, OneHot) and m * use.param.numel() < elements(outer):
            made = materialise(outer)
            dense[use.name] = dense[use.name] + made if use.name in dense else made
        else:
            uses_of.setdefault(use.name, []).append(pair)
    return Tapped(losses, aux, uses_of, dense)


def _each_row(function: Callable[[Tensor], Tensor], row_ndim: int) -> Callable[[Tensor], Tensor]:
    for _ in range(row_ndim):
        function = torch.vmap(function)
    return function


def sides(use: Use, cotangent: Tensor, row_ndim: int) -> Any:
    """Lay activations and cotangents of a use out as left and right."""
    laid_out = _each_row(use.cotangents, row_ndim)(cotangent)
    activation, shared = use.activations(use.given), (None,) * row_ndim
    if isinstance(activation, OneHot):
        activation = OneHot(activation.indices[shared])
    else:
        activation = activation[shared]
    return (activation, laid_out) if use.activations_first else (laid_out, activation)


def _check_unwritten(uses: Sequence[Use]) -> None:
    """Check that no activation was written in place after its use: it would be a wrong number."""
    for use in uses:
        if use.given._version != use.version:
            raise ValueError(
                f"expected the input of {use.function} with parameter {use.name!r} to be left as "
                "it was, but the model wrote to it in place afterwards (autograd refuses this "
                "too); use the out-of-place operation"
            )

"""The plan: what `structured` does with every parameter, and what it costs."""

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdfunc import algebra, pytrees
from jdfunc.checks import check_buffers
from jdfunc.examples import Run, for_each_example, losses_function
from jdfunc.factored.leaves import elements, uses_of
from jdfunc.factored.products import gram_cost
from jdfunc.independence import check_batch_independence
from jdfunc.linearizations import structured
from jdfunc.taps.rules import ONE_EXAMPLE_RULES, RULES
from jdfunc.taps.tap import Tap
from jdfunc.types import Batch, Buffers, ModelFn, Params


class ParamPlan(NamedTuple):
    """What is done with one parameter.

    Attributes:
        name: dotted name in the pytree of params.
        shape: of the parameter.
        uses: how often each function that a rule knows uses it.
        other_uses: how often each other function does.
        held: "factored", "dense", or "unused".
        gramian: the form of its Gramian: "pairwise", "materialised", or "dense".
        held_bytes: memory of its rows as they are held.
        temporary_bytes: memory of its Gramian's temporaries, before they are cut into blocks.
        multiply_adds: of its Gramian, and of its part of Jᵀw.
    """

    name: str
    shape: tuple[int, ...]
    uses: dict[str, int]
    other_uses: dict[str, int]
    held: str
    gramian: str
    held_bytes: int
    temporary_bytes: int
    multiply_adds: int


class Plan(NamedTuple):
    """What `structured` does with every parameter; prints as a table."""

    rows: tuple[int, ...]
    params: tuple[ParamPlan, ...]

    def __str__(self) -> str:
        head = (
            "parameter",
            "shape",
            "used by",
            "rows",
            "Gramian",
            "held",
            "temporary",
            "mult-adds",
        )
        lines = [
            (
                p.name,
                "×".join(map(str, p.shape)) or "scalar",
                _counts({**p.uses, **p.other_uses}) or "nothing",
                p.held,
                p.gramian,
                _bytes(p.held_bytes),
                _bytes(p.temporary_bytes),
                _short(p.multiply_adds),
            )
            for p in self.params
        ]
        held = sum(p.held_bytes for p in self.params)
        work = sum(p.multiply_adds for p in self.params)
        total = (f"losses {list(self.rows)}", "", "", "", "", _bytes(held), "", _short(work))
        widths = [max(map(len, column)) for column in zip(head, *lines, total, strict=True)]
        rule = ["-" * width for width in widths]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, rule, *lines, rule, total)
        )


def plan(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    *,
    buffers: Buffers | None = None,
    batch_dim: Any = None,
    has_aux: bool = False,
) -> Plan:
    """Say what `structured` does with every parameter: print this first when a model is slow.

    The account is checked: the rows of all parameters, summed, must be the gradient that plain
    autograd finds; and where ``batch_dim`` is given, `check_batch_independence` must pass.

    Args:
        model_fn: as for `structured`.
        params: as for `structured`.
        batch: as for `structured`.
        buffers: as for `structured`.
        batch_dim: as for `structured`.
        has_aux: as for `structured`.

    Returns:
        A `Plan`: one `ParamPlan` for every parameter; ``print`` it.

    Raises:
        ValueError: as `structured` and `check_batch_independence`.
        AssertionError: the account does not add up, which is an error of jdfunc or a model that
            draws random numbers.
        TypeError: as `structured`.

    Cost: a linearization, and two or three more forward and backward passes.

    Example:
        >>> def model_fn(params, buffers, batch):
        ...     return torch.nn.functional.linear(batch, params["w"]).square().sum(1)
        >>> print(plan(model_fn, {"w": torch.ones(9, 8)}, torch.eye(8), batch_dim=0))
        parameter   shape  used by  rows      Gramian   held   temporary  mult-adds
        ----------  -----  -------  --------  --------  -----  ---------  ---------
        w           9×8    linear   factored  pairwise  544 B  768 B      1.7 k
        ----------  -----  -------  --------  --------  -----  ---------  ---------
        losses [8]                                      544 B             1.7 k
    """
    lin = structured(model_fn, params, batch, buffers=buffers, batch_dim=batch_dim, has_aux=has_aux)
    if batch_dim is not None:
        check_batch_independence(
            model_fn, params, batch, buffers=buffers, batch_dim=batch_dim, has_aux=has_aux
        )
    run, _ = losses_function(model_fn, check_buffers(buffers), has_aux=has_aux, by_example=False)
    _assert_accounted(lin.combine(torch.ones_like(lin.losses)), run, params, batch)
    tap = _survey(model_fn, params, batch, check_buffers(buffers), batch_dim, has_aux)
    leaves = zip(pytrees.names(params), pytrees.leaves(lin.rows, algebra.is_rows), strict=True)
    uses = Counter((use.name, use.function) for use in tap.uses)
    plans = []
    for name, leaf in leaves:
        known = {function: n for (owner, function), n in uses.items() if owner == name}
        others = dict(Counter(tap.other_uses.get(name, [])))
        plans.append(_param_plan(name, leaf, known, others, lin.losses))
    return Plan(tuple(lin.losses.shape), tuple(plans))


def _survey(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    buffers: Buffers,
    batch_dim: Any,
    has_aux: bool,
) -> Tap:
    """Run the model under a tap that keeps the uses of every parameter."""
    by_example = batch_dim is not None
    run, _ = losses_function(model_fn, buffers, has_aux=has_aux, by_example=by_example)
    values, restore = pytrees.flatten(params)
    names, taps = pytrees.names(params), []

    def losses_fn(example: Batch, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        rules = {**RULES, **(ONE_EXAMPLE_RULES if by_example else {})}
        taps.append(Tap(named, rules, named))
        with taps[-1]:
            return run(restore(values), example)[0]

    def one(example: Batch) -> Tensor:
        return torch.func.vjp(lambda *v: losses_fn(example, *v), *values)[0]

    if by_example:
        for_each_example(one, batch, batch_dim)
    else:
        one(batch)
    return taps[-1]


def _param_plan(
    name: str, leaf: Any, uses: dict[str, int], other_uses: dict[str, int], losses: Tensor
) -> ParamPlan:
    m = losses.numel()
    if isinstance(leaf, Tensor):
        shape = tuple(leaf.shape[losses.ndim :])
        work = (m * m + m) * math.prod(shape)
        nbytes = leaf.numel() * leaf.element_size()
        return ParamPlan(name, shape, uses, other_uses, "dense", "dense", nbytes, 0, work)
    param, itemsize = uses_of(leaf)[0].param, uses_of(leaf)[0].right.element_size()
    pairwise, materialised = gram_cost(leaf)
    cheaper = pairwise.total <= materialised.total
    cost = pairwise if cheaper else materialised
    positions = sum(use.right.shape[-2] for use in uses_of(leaf))
    return ParamPlan(
        name=name,
        shape=tuple(param.shape),
        uses=uses,
        other_uses=other_uses,
        held="factored" if positions else "unused",
        gramian="pairwise" if cheaper else "materialised",
        held_bytes=elements(leaf) * itemsize,
        temporary_bytes=cost.elements * itemsize,
        multiply_adds=cost.multiply_adds + m * positions * param.numel(),
    )


def _assert_accounted(direction: Params, run: Run, params: Params, batch: Batch) -> None:
    """Check that the rows sum to the gradient of the sum of losses that plain autograd finds."""
    values, restore = pytrees.flatten(params)
    leaves = [v.detach().clone().requires_grad_() for v in values]
    losses, _ = run(restore(leaves), batch)
    grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    wanted = [torch.zeros_like(v) if g is None else g for v, g in zip(values, grads, strict=True)]
    scale = max((float(g.abs().max()) for g in wanted if g.numel()), default=0.0)
    for name, got, want in zip(
        pytrees.names(params), pytrees.leaves(direction), wanted, strict=True
    ):
        error = float((got - want).abs().max()) if want.numel() else 0.0
        assert error <= 3 * torch.finfo(want.dtype).eps ** 0.5 * scale, (
            f"the rows of {name!r} do not sum to its gradient: off by {error} at scale {scale}"
        )


def _counts(uses: dict[str, int]) -> str:
    return ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in uses.items())


def _bytes(n: int) -> str:
    return f"{n} B" if n < 1024 else f"{n / 2**10:.1f} KiB" if n < 2**20 else f"{n / 2**20:.1f} MiB"


def _short(n: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)

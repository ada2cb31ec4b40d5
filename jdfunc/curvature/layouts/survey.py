"""The survey that makes a layout: one run on examples, and an account of every parameter."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jdfunc import pytrees, random
from jdfunc.checks import check_buffers, check_params, check_positive
from jdfunc.curvature.estimate.capture import ApplyFn, Captured, UseOf, captured
from jdfunc.curvature.layouts.account import check_rules, checked_outputs, pseudo_loss
from jdfunc.curvature.layouts.layout import (
    Layer,
    Layout,
    ParamRule,
    Rest,
    diagonal,
    full_block,
    kron,
    unused,
)
from jdfunc.examples import num_examples
from jdfunc.factored.leaves import OneHot, Side
from jdfunc.types import Buffers, Params

Named = dict[str, Tensor]


def curvature_layout(
    apply: ApplyFn,
    params: Params,
    buffers: Buffers | None,
    example_inputs: Any,
    *,
    rules: Mapping[str, ParamRule] | None = None,
    batch_dim: Any = 0,
    dense_max: int = 1024,
    max_side: int = 8192,
) -> Layout:
    """Find the block of F that every parameter belongs to: print it first.

    Weights of linear layers, products, matching einsums, convolutions and embeddings get a product
    of two factors, from the same uses that `structured` keeps; a bias goes with its weight, unless
    it is added by hand (``x @ W + b``), which is a parameter like any other. Every other parameter
    gets the exact block of its own rows, together with the others of its module, or its diagonal
    where that is too large.

    The account is checked: the gradient rebuilt from what was captured, one example at a time, must
    be the one that autograd finds for the batch; and a bias goes with a weight only if its gradient
    is the sum of the cotangents of that weight's uses.

    Args:
        apply: the model, ``(params, buffers, inputs) -> outputs``, deterministic, each example on
            its own. Outputs [b, ...], or a pytree of them.
        params: pytree of floating-point tensors. Leave those out that need no curvature (buffers).
        buffers: handed to ``apply``; an empty dict if None.
        example_inputs: one batch of inputs, any pytree; two examples are enough.
        rules: by parameter: `kron`, `full_block`, `diagonal` or `excluded`; what fits if not given.
        batch_dim: the example axis of the inputs, or a pytree prefix of axes and None.
        dense_max: the largest dense block of parameters that are no layer's weight.
        max_side: the widest side of a layer whose factor is held in full; a wider one, such as a
            vocabulary, has a diagonal factor and the identity for a basis.

    Returns:
        A `Layout`.

    Raises:
        ValueError: the outputs depend on no parameter, a BatchNorm is in training mode, the account
            does not add up (dropout, coupled examples), or a rule names no parameter.
        TypeError: ``apply`` is no function.

    Example:
        >>> def apply(params, buffers, x):
        ...     return torch.nn.functional.linear(x, params["w"], params["b"]) * params["scale"]
        >>> params = {"w": torch.ones(3, 2), "b": torch.zeros(3), "scale": torch.ones(())}
        >>> print(curvature_layout(apply, params, None, torch.eye(2)))
        parameter  shape   rule   block  used by
        ---------  ------  -----  -----  -----------------
        b          3       bias   w      linear
        scale      scalar  dense  scale  its own gradients
        w          3×2     kron   3 ⊗ 2  linear
    """
    if not callable(apply) or isinstance(apply, torch.nn.Module):
        raise TypeError(
            f"expected apply to be a function (params, buffers, inputs) -> outputs, got {apply!r}"
        )
    check_positive(dense_max=dense_max, max_side=max_side)
    check_params(params)
    buffers, rules = check_buffers(buffers), dict(rules or {})
    named = dict(zip(pytrees.names(params), pytrees.leaves(params), strict=True))
    check_rules(rules, named)
    n = num_examples(example_inputs, batch_dim)
    if n == 0:
        raise ValueError("expected example inputs of at least one example, got none")
    batch = (example_inputs, (), random.bits(0, n))
    wanted = [name for name in named if rules.get(name, kron).covered]
    if not wanted:
        raise ValueError("expected parameters to find curvature of, got none, or all excluded")
    cap, uses = captured(
        apply,
        params,
        buffers,
        batch,
        (batch_dim, None, 0),
        lambda outputs, targets, key: (*pseudo_loss(outputs, key), key.new_zeros(())),
        wanted=wanted,
        kept=wanted,
    )
    outputs = checked_outputs(cap, uses, apply, params, buffers, batch, wanted)
    layers = _layers(cap, uses, named, rules, max_side)
    placed = {name for layer in layers for name in (layer.name, layer.bias)}
    others = [name for name in named if name not in placed]
    rests = _rests(others, cap, uses, named, rules, dense_max)
    names = {layer.name for layer in layers}
    pairs = [pair for pair, use in zip(cap.uses, uses, strict=True) if use.param in names]
    return Layout(
        apply,
        batch_dim,
        tuple(named),
        tuple(layers),
        tuple(rests),
        outputs,
        sum(_bytes(a) for a, _ in pairs),
        sum(_bytes(g) for _, g in pairs),
    )


def _layers(
    cap: Captured,
    uses: list[UseOf],
    named: Named,
    rules: dict[str, ParamRule],
    max_side: int,
) -> list[Layer]:
    """Return the parameters that are used as a matrix and in no other way, with their biases."""
    layers: list[Layer] = []
    for name in dict.fromkeys(use.param for use in uses):
        own = [(pair, use) for pair, use in zip(cap.uses, uses, strict=True) if use.param == name]
        sizes = [_matrix_shape(pair, use, named[name]) for pair, use in own]
        if not rules.get(name, kron).product or name in cap.rows or len(set(sizes)) > 1:
            continue
        of = tuple(use for _, use in own)
        (h, i, j), sliced = sizes[0], _tile(of, sizes[0])
        if sliced:
            h, i = len(of), i // len(of)
        one_hot = all(isinstance(a, OneHot) for (a, _), _ in own)
        bias = _bias(own, cap.rows, rules, layers)
        layers.append(
            Layer(
                name=name,
                shape=tuple(named[name].shape),
                matrix=(h, i, j),
                bias=bias,
                bias_shape=() if bias is None else tuple(named[bias].shape),
                uses=tuple(u._replace(bias=bias if u.bias == bias else None) for u in of),
                diagonal=(one_hot or i > max_side, j > max_side),
                sliced=sliced,
            )
        )
    return layers


def _matrix_shape(pair: tuple[Side, Tensor], use: UseOf, param: Tensor) -> tuple[int, int, int]:
    activation, cotangent = pair
    h, free = cotangent.shape[2], cotangent.shape[-1]
    other = param.numel() // max(1, h * free)
    return (h, other, free) if use.activations == 0 else (h, free, other)


def _tile(uses: tuple[UseOf, ...], matrix: tuple[int, int, int]) -> bool:
    """Tell whether uses took equal parts of a parameter, one after the other and each once."""
    starts, size = sorted(use.padded[0] for use in uses), matrix[1]
    width = size // len(uses)
    return (
        len(uses) > 1
        and matrix[0] == 1
        and all(use.activations == 1 for use in uses)  # parts of the first axis are contiguous
        and starts == list(range(0, size, width))
        and all(sum(use.padded) == size - width for use in uses)
    )


def _bias(
    own: list[tuple[tuple[Side, Tensor], UseOf]],
    rows: Named,
    rules: dict[str, ParamRule],
    layers: list[Layer],
) -> str | None:
    """Return the bias whose rows are the sums of the cotangents of these uses, if there is one."""
    taken = {layer.bias for layer in layers}
    names = {use.bias for _, use in own} - {None} - taken
    for name in sorted(str(n) for n in names):
        if not rules.get(name, kron).product or name not in rows:
            continue
        sums = [g.sum(-2) for (_, g), use in own if use.bias == name]  # [n, V, h, e]
        if any(s[0, 0].numel() != rows[name][0, 0].numel() for s in sums):
            continue
        total = sum(sums[1:], sums[0]).reshape(rows[name].shape)
        scale = float(rows[name].abs().max())
        if torch.allclose(
            total.to(rows[name].dtype),
            rows[name],
            rtol=0,
            atol=scale * torch.finfo(total.dtype).eps ** 0.5,
        ):
            return name
    return None


def _rests(
    others: list[str],
    cap: Captured,
    uses: list[UseOf],
    named: Named,
    rules: dict[str, ParamRule],
    dense_max: int,
) -> list[Rest]:
    """Return the blocks of all other parameters; those of one module together if they fit."""
    used = {use.param for use in uses} | set(cap.rows)
    groups: dict[tuple[str, ...], tuple[ParamRule, str]] = {}
    together: dict[str, list[str]] = {}
    for name in others:
        rule = rules.get(name, kron)
        if not rule.covered:
            groups[(name,)] = (rule, "")
        elif name not in used:
            groups[(name,)] = (unused, "nothing")
        elif rule is diagonal or (rule is kron and named[name].numel() > dense_max):
            groups[(name,)] = (diagonal, "its own gradients")
        else:
            together.setdefault(name.rpartition(".")[0], []).append(name)
    for members in together.values():
        fits = sum(named[name].numel() for name in members) <= dense_max
        for group in [tuple(members)] if fits else [(name,) for name in members]:
            groups[group] = (full_block, "its own gradients")
    return [
        Rest(group, tuple(tuple(named[name].shape) for name in group), rule, why)
        for group, (rule, why) in groups.items()
    ]


def _bytes(side: Side) -> int:
    """Return the memory of one example's part of a side."""
    tensor = side.indices if isinstance(side, OneHot) else side
    return tensor[0].numel() * tensor.element_size() if tensor.shape[0] else 0

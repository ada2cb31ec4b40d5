"""The account of a layout: what was captured, example by example, must be the batch's gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jdfunc import pytrees, random
from jdfunc.curvature.estimate.capture import ApplyFn, Captured, UseOf, bound, outer
from jdfunc.curvature.layouts.layout import ParamRule
from jdfunc.factored import leaves as factored
from jdfunc.types import Buffers, Params


def check_rules(rules: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Check that rules are rules, for parameters that there are."""
    unknown = sorted(set(rules) - set(names))
    if unknown:
        raise ValueError(f"expected rules for parameters, got {unknown}; there are {list(names)}")
    wrong = [f"{name}={rule!r}" for name, rule in rules.items() if not isinstance(rule, ParamRule)]
    if wrong:
        raise TypeError(
            f"expected rules kron, full_block, diagonal or excluded, got {', '.join(wrong)}"
        )


def pseudo_loss(outputs: Any, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of one example in a row, and one random vector."""
    f = _joined(outputs, 1)
    return f, random.normal(key, f.shape[1]).to(f.dtype)[None, None]


def _joined(outputs: Any, n: int) -> Tensor:
    """Return all outputs of n examples as [n, numbers]."""
    tensors = pytrees.leaves(outputs)
    kinds = sorted({type(x).__name__ for x in tensors if not isinstance(x, Tensor)})
    if kinds:
        raise TypeError(
            f"expected outputs that are tensors, or a pytree of them, got {', '.join(kinds)}; let "
            "apply return the tensors themselves"
        )
    leaves = [x for x in tensors if x.is_floating_point()]
    if not leaves:
        raise ValueError("expected floating-point outputs, got none")
    for x in leaves:
        if x.shape[:1] != (n,):
            raise ValueError(
                "expected outputs with one entry per example along their first axis, got shape "
                f"{tuple(x.shape)} for a batch of {n}"
            )
    return torch.cat([x.reshape(n, -1) for x in leaves], 1)


def checked_outputs(
    cap: Captured,
    uses: list[UseOf],
    apply: ApplyFn,
    params: Params,
    buffers: Buffers,
    batch: tuple[Any, Any, Tensor],
    wanted: list[str],
) -> Any:
    """Check that uses and rows sum to the gradient of the whole batch; return outputs of one."""
    given, run = bound(apply, params, buffers, batch[0], wanted)

    def total(named: dict[str, Tensor]) -> Tensor:
        outputs = run(named)
        f = _joined(outputs, batch[2].shape[0])
        kept.append(pytrees.map(lambda x: torch.empty_like(x[:1], device="meta"), outputs))
        return (random.normal(batch[2], f.shape[1]).to(f.dtype) * f).sum()

    kept: list[Any] = []
    with torch.inference_mode(False), torch.no_grad():
        gradient = torch.func.grad(total)(given)
    scale = max((float(g.abs().max()) for g in gradient.values() if g.numel()), default=0.0)
    for name, want in gradient.items():
        if not bool(torch.isfinite(want).all()):
            raise ValueError(f"expected finite gradients, got NaN or inf in that of {name!r}")
        got = torch.zeros_like(want)
        if name in cap.rows:
            got = got + cap.rows[name].sum((0, 1))
        for pair, use in zip(cap.uses, uses, strict=True):
            if use.param == name:
                rows = outer(pair, use, want)
                got = got + factored.combine(rows, want.new_ones(factored.rows_shape(rows)))
        error = float((got - want).abs().max()) if want.numel() else 0.0
        if not error <= 10 * torch.finfo(want.dtype).eps ** 0.5 * scale:
            raise ValueError(
                f"expected a deterministic model whose outputs depend on one example each, but the "
                f"gradients of {name!r}, example by example, do not sum to that of the batch: off "
                f"by {error:.1e} at scale {scale:.1e}; call module.eval() (dropout), or check what "
                "couples the examples"
            )
    return kept[0]

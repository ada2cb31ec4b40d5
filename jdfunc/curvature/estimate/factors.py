"""Kronecker factors of a chunk of examples: second moments of activations and of cotangents.

With examples n, positions s and vectors v,

    A = Σ_n Σ_s a_ns a_nsᵀ,    B = Σ_v Σ_n Σ_s g_vns g_vnsᵀ,

sums that batches add to; what divides them is counted beside them. Martens and Grosse, Optimizing
Neural Networks with Kronecker-factored Approximate Curvature, 2015, arXiv:1503.05671.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jdfunc.curvature.blocks import Factors
from jdfunc.curvature.estimate.capture import Captured, UseOf
from jdfunc.curvature.estimate.pairs import (
    Pair,
    activation_moment,
    check_reached,
    pairs_of,
    second_moment,
    side_moment,
    wide,
)
from jdfunc.curvature.estimate.sharing import Sharing, expand
from jdfunc.curvature.layouts.layout import Layer, Layout, Rest


class Moments(NamedTuple):
    """The factors of one layer, not yet divided.

    Attributes:
        roles: the two factors, for each side on which activations stand.
        positions: how many vectors each role's factor of the activations is a sum over, [h].
        expanded: the same with every position on its own, where sharing sums positions.
    """

    roles: tuple[Factors, ...]
    positions: tuple[Tensor, ...]
    expanded: tuple[Factors, ...] = ()


def factor_sums(
    layout: Layout,
    cap: Captured,
    uses: Sequence[UseOf],
    sharing: Sharing,
    *,
    joint_bias: bool,
    expanded: bool,
    first: bool,
    dtype: torch.dtype | None,
) -> dict[str, Moments | Tensor]:
    """Sum the second moments of every block over a chunk of examples.

    Args:
        layout: of the model.
        cap: what was captured.
        uses: what its uses are.
        sharing: `expand` or `reduce`.
        joint_bias: whether a bias shares the block of its weight.
        expanded: whether the factors of every position on its own are wanted too.
        first: whether these are the first vectors of their examples; activations count only then.
        dtype: of the sums; that of the cotangents, float32 at least, if None.

    Returns:
        By block: `Moments` of a layer; Σ rows rowsᵀ [1, p, p], or Σ rows² [1, p], of the rest.
    """
    sums: dict[str, Moments | Tensor] = {}
    for layer in layout.layers:
        pairs = pairs_of(layer, cap, uses, joint_bias, dtype)
        found = [_role(layer, role, pairs, sharing, joint_bias, first) for role in layer.roles]
        moments = Moments(tuple(f for f, _ in found), tuple(n for _, n in found))
        if expanded:
            both = [_role(layer, role, pairs, expand, joint_bias, first)[0] for role in layer.roles]
            moments = moments._replace(expanded=tuple(both))
        sums[layer.name] = moments
    for rest in layout.rests:
        if rest.rule.covered:
            rows = rows_of(rest, cap, dtype)
            sums[rest.params[0]] = second_moment(rows[None], diagonal=not rest.rule.full)
    return sums


def rows_of(rest: Rest, cap: Captured, dtype: torch.dtype | None) -> Tensor:
    """Return the rows of the parameters of a block, one after the other: [n·V, p]."""
    for name in rest.params:
        check_reached(name, int(name in cap.rows), 1)
    rows = [
        cap.rows[name].reshape(-1, max(1, cap.rows[name][0, 0].numel())) for name in rest.params
    ]
    joined = torch.cat(rows, 1)
    return wide(joined, dtype)


def _role(
    layer: Layer,
    role: int,
    pairs: Sequence[Pair],
    sharing: Sharing,
    joint_bias: bool,
    first: bool,
) -> tuple[Factors, Tensor]:
    """Return the factors of the uses whose activations stand on one side, and their count."""
    own = sharing.pairs([p for p, side in zip(pairs, layer.sides, strict=True) if side == role])
    h, *sizes = layer.block(joint_bias).shape
    flat = [layer.diagonal[side] for side in (role, 1 - role)]
    if first:
        moments = [activation_moment(pair, sizes[role], diagonal=flat[0]) for pair in own]
        a_factor, counts = sum(moments[1:], moments[0]), [pair.counts(h) for pair in own]
        count = sum(counts[1:], counts[0])
    else:
        shape = (h, sizes[role]) if flat[0] else (h, sizes[role], sizes[role])
        a_factor = own[0].cotangent.new_zeros(shape)
        count = torch.zeros(h, dtype=torch.float64, device=a_factor.device)
    if isinstance(own[0].cotangent, Tensor):
        moments = [side_moment(pair.cotangent, diagonal=flat[1]) for pair in own]
        b_factor = sum(moments[1:], moments[0])
    else:  # no backward pass: B is the identity
        b_factor = a_factor.new_ones((h, sizes[1 - role]))
    return (Factors(a_factor, b_factor) if role == 0 else Factors(b_factor, a_factor)), count

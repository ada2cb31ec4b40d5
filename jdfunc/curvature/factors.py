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
from jdfunc.curvature.capture import Captured, UseOf
from jdfunc.curvature.layout import Layer, Layout, Rest
from jdfunc.curvature.sharing import Sharing, expand
from jdfunc.factored.leaves import OneHot, Side, positions, stacked

Pair = tuple[Side, Tensor]


class Moments(NamedTuple):
    """The factors of one layer, not yet divided.

    Attributes:
        roles: the two factors, for each side on which activations stand.
        positions: how many vectors each role's factor of the activations is a sum over.
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


def pairs_of(
    layer: Layer,
    cap: Captured,
    uses: Sequence[UseOf],
    joint_bias: bool,
    dtype: torch.dtype | None,
) -> list[Pair]:
    """Return activations, with the ones of a joint bias, and cotangents of each use of a layer."""
    pairs, own = [], iter(layer.uses)
    for (activation, cotangent), use in zip(cap.uses, uses, strict=True):
        if use.param != layer.name:
            continue
        added = next(own).bias is not None
        if isinstance(activation, Tensor):
            wide = torch.promote_types(activation.dtype, torch.float32) if dtype is None else dtype
            activation = activation.to(wide)
            if layer.joint(joint_bias):  # 0 for a use of a tied weight without the bias
                one = activation.new_full((*activation.shape[:-1], 1), float(added))
                activation = torch.cat([activation, one], -1)
        if isinstance(cotangent, Tensor):
            wide = torch.promote_types(cotangent.dtype, torch.float32) if dtype is None else dtype
            cotangent = cotangent.to(wide)
        pairs.append((activation, cotangent))
    return pairs


def rows_of(rest: Rest, cap: Captured, dtype: torch.dtype | None) -> Tensor:
    """Return the rows of the parameters of a block, one after the other: [n·V, p]."""
    rows = [
        cap.rows[name].reshape(-1, max(1, cap.rows[name][0, 0].numel())) for name in rest.params
    ]
    joined = torch.cat(rows, 1)
    return joined.to(torch.promote_types(joined.dtype, torch.float32) if dtype is None else dtype)


def _role(
    layer: Layer,
    role: int,
    pairs: Sequence[Pair],
    sharing: Sharing,
    joint_bias: bool,
    first: bool,
) -> tuple[Factors, Tensor]:
    """Return the factors of the uses whose activations stand on one side, and their count."""
    own = [pair for pair, use in zip(pairs, layer.uses, strict=True) if use.activations == role]
    width = layer.block(joint_bias).shape[1 + role]
    activations = sharing.activations([a for a, _ in own])
    if not first:
        activations = [
            OneHot(a.indices[:0]) if isinstance(a, OneHot) else a[:0] for a in activations
        ]
    moments = [side_moment(a, width, diagonal=layer.diagonal[role]) for a in activations]
    a_factor = sum(moments[1:], moments[0])
    count = sum(_examples(a) * positions(a) for a in activations)
    if own[0][1] == ():  # no backward pass: B is the identity
        b_factor = a_factor.new_ones((layer.matrix[0], layer.matrix[2 - role]))
    else:
        cotangents = sharing.cotangents([g for _, g in own])
        gg = [second_moment(stacked(g), diagonal=layer.diagonal[1 - role]) for g in cotangents]
        b_factor = sum(gg[1:], gg[0])
    number = torch.full((), float(count), dtype=torch.float64, device=a_factor.device)
    return (Factors(a_factor, b_factor) if role == 0 else Factors(b_factor, a_factor)), number


def _examples(side: Side) -> int:
    return (side.indices if isinstance(side, OneHot) else side).shape[0]


def side_moment(side: Side, width: int, *, diagonal: bool) -> Tensor:
    """Return the second moment of a side, [h, d, d], or its diagonal [h, d]."""
    if isinstance(side, Tensor):
        return second_moment(stacked(side), diagonal=diagonal)
    indices = side.indices.flatten()
    ones = torch.ones(indices.shape, dtype=torch.get_default_dtype(), device=indices.device)
    counts = ones.new_zeros(width).index_add(0, indices, ones)[None]
    return counts if diagonal else torch.diag_embed(counts)


def second_moment(vectors: Tensor, *, diagonal: bool) -> Tensor:
    """Return Σ x xᵀ of vectors [h, n, d]: [h, d, d], or its diagonal [h, d]."""
    return vectors.square().sum(1) if diagonal else vectors.mT @ vectors

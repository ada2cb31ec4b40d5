"""Pairs of activations and cotangents: their second moments, and their rotations.

Sides are [n, V, h, s, d]: examples, vectors, groups, positions, features. Convolutions lay them out
with positions innermost, everything else with features innermost, and both stay as they are: a copy
costs as much as a product here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.curvature.estimate.capture import Captured, UseOf
from jdfunc.curvature.layouts.layout import Layer
from jdfunc.factored import products
from jdfunc.factored.leaves import OneHot, Side, positions, stacked

#: A second moment of wider sides is computed in strips, since it is symmetric; but not of few
#: vectors, for which strips are too thin.
WIDE = 256


class Pair(NamedTuple):
    """One use of a layer, seen from both sides.

    Attributes:
        activation: [n, 1, h, s, d].
        cotangent: [n, V, h, s, e]; () if nothing was pulled back.
        one: what stands behind every activation for a joint bias, 1, or 0 for a use of a tied
            weight without the bias; None if nothing does.
        present: 1 at positions that count in A and 0 at others, [n, 1, h, s] or [n, 1, 1, s]; None
            if all do.
    """

    activation: Side
    cotangent: Any
    one: float | None
    present: Tensor | None = None

    def augmented(self) -> Side:
        """The activations that count, with what stands behind them, and zeros elsewhere."""
        side = with_ones(self.activation, self.one)
        if self.present is None or isinstance(side, OneHot):
            return side
        return side * self.present[..., None].to(side.dtype)

    def counts(self, groups: int) -> Tensor:
        """Over how many examples and positions the activations go, float64 [h]."""
        side = self.activation
        tensor = side.indices if isinstance(side, OneHot) else side
        if self.present is not None:
            return self.present.double().sum((0, 1, 3)).repeat(groups // self.present.shape[2])
        number = float(tensor.shape[0] * positions(side))
        return torch.full((groups,), number, dtype=torch.float64, device=tensor.device)


def pairs_of(
    layer: Layer,
    cap: Captured,
    uses: Sequence[UseOf],
    joint_bias: bool,
    dtype: torch.dtype | None,
) -> list[Pair]:
    """Return the pairs of a layer, in the order of its uses, in float32 at least."""
    pairs, own, joint = [], iter(layer.uses), layer.joint(joint_bias)
    for (activation, cotangent), use in zip(cap.uses, uses, strict=True):
        if use.param == layer.name:
            one = float(next(own).bias is not None) if joint else None
            a = wide(activation, dtype) if isinstance(activation, Tensor) else activation
            g = wide(cotangent, dtype) if isinstance(cotangent, Tensor) else cotangent
            mask = cap.mask[:, None, None] if isinstance(cap.mask, Tensor) else None
            fits = mask is not None and mask.shape[-1] == positions(a)
            pairs.append(Pair(a, g, one, mask if fits else None))
    check_reached(layer.name, len(pairs), len(layer.uses))
    return [_grouped(layer, pairs)] if layer.sliced else pairs


def check_reached(name: str, found: int, wanted: int) -> None:
    """Check that as many uses of a parameter reach the loss as reached the outputs."""
    if found != wanted:
        raise ValueError(
            f"expected {wanted} uses of {name!r} that reach the loss, as in the layout, got "
            f"{found}; where the likelihood reads some of the outputs only, make the layout from a "
            "model that returns these, or exclude the parameters of the others"
        )


def _grouped(layer: Layer, pairs: list[Pair]) -> Pair:
    """Join uses of parts of a parameter as groups; shorter ones have zeros behind them."""
    starts, e = [use.padded[0] for use in layer.uses], layer.matrix[1]
    order = sorted(range(len(pairs)), key=lambda k: starts[k])
    sides = [with_ones(pairs[k].activation, pairs[k].one) for k in order]
    dense = [side for side in sides if isinstance(side, Tensor)]  # all: none is an embedding
    longest = max(side.shape[-2] for side in dense)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[-2])) for x in parts], 2)

    present = [side.new_ones((*side.shape[:-1], 1)) for side in dense]
    masks = [pairs[k].present for k in order]
    kept = [x if m is None else x * m[..., None] for x, m in zip(present, masks, strict=True)]
    counted = joined(kept)[..., 0]
    if not isinstance(pairs[0].cotangent, Tensor):
        return Pair(joined(dense), (), None, counted)
    parts = [pairs[k].cotangent[..., starts[k] : starts[k] + e] for k in order]
    return Pair(joined(dense), joined(parts), None, counted)


def wide(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor in a dtype; in its own, float32 at least, if None."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32) if dtype is None else dtype)


def with_ones(side: Side, one: float | None) -> Side:
    """Return activations with what stands behind them."""
    if one is None or isinstance(side, OneHot):
        return side
    return torch.cat([side, torch.full_like(side[..., :1], one)], -1)


# ------------------------------------------------------------------------------ second moments


def activation_moment(pair: Pair, width: int, *, diagonal: bool) -> Tensor:
    """Return Σ [a, one] [a, one]ᵀ over all positions, [h, d, d], or its diagonal [h, d]."""
    a, one = pair.activation, pair.one
    if isinstance(a, OneHot):
        return _frequencies(a.indices, pair.present, width, diagonal)
    if pair.present is not None:
        a, one = pair.augmented(), None
        assert isinstance(a, Tensor)
    moment = side_moment(a, diagonal=diagonal)
    if one is None:
        return moment
    if one == 0:
        return F.pad(moment, (0, 1) if diagonal else (0, 1, 0, 1))
    count = moment.new_full((moment.shape[0], 1), float(a[:, 0, 0, :, 0].numel()))
    if diagonal:
        return torch.cat([moment, count], -1)
    sums = a.sum((0, 1, 3))[..., None]  # [h, d, 1]
    below = torch.cat([sums.mT, count[..., None]], -1)
    return torch.cat([torch.cat([moment, sums], -1), below], -2)


def _frequencies(indices: Tensor, present: Tensor | None, width: int, diagonal: bool) -> Tensor:
    ones = torch.ones(indices.shape, dtype=torch.get_default_dtype(), device=indices.device)
    ones = ones if present is None else ones * present
    counts = ones.new_zeros(width).index_add(0, indices.flatten(), ones.flatten())[None]
    return counts if diagonal else torch.diag_embed(counts)


def side_moment(side: Tensor, *, diagonal: bool) -> Tensor:
    """Return Σ x xᵀ over examples, vectors and positions, [h, d, d], or its diagonal [h, d]."""
    s, d = side.shape[-2:]
    if diagonal or not positions_innermost(side) or 2 * s < d:
        return second_moment(stacked(side), diagonal=diagonal)
    if side.shape[2] > 1 or d < WIDE:
        return (side.mT @ side).sum((0, 1))
    x = side.flatten(0, 2)

    def block(rows: slice, columns: slice) -> Tensor:
        return (x[..., rows].mT @ x[..., columns]).sum(0)

    return products.by_blocks(block, d, d, d * d, symmetric=True, strips=4)[None]


def second_moment(vectors: Tensor, *, diagonal: bool) -> Tensor:
    """Return Σ x xᵀ of vectors [h, n, d]: [h, d, d], or its diagonal [h, d]."""
    if diagonal:
        return vectors.square().sum(1)
    if vectors.shape[0] == 1 and WIDE <= vectors.shape[-1] <= vectors.shape[1]:
        columns = vectors[0].mT
        return products.product(columns, columns, symmetric=True)[None]
    return vectors.mT @ vectors


def positions_innermost(side: Tensor) -> bool:
    """Tell whether a side is laid out [..., d, s], as convolutions do."""
    return side.stride(-2) == 1 and side.stride(-1) != 1 and side.shape[-2] > 1


# ----------------------------------------------------------------------------------- rotations


def turned(side: Tensor, vectors: Tensor, one: float | None = None) -> Tensor:
    """Return [side, one] @ vectors, [n, V, h, s, r], for vectors [h, d, r]."""
    vectors = vectors.to(side.dtype)
    if one is not None:
        rotated = turned(side, vectors[:, :-1])
        return rotated + vectors[:, -1:] if one else rotated
    if vectors.shape[0] > 1:
        grouped = side.movedim(2, 0)
        return (grouped.flatten(1, 3) @ vectors).unflatten(1, grouped.shape[1:4]).movedim(0, 2)
    if positions_innermost(side):
        return (vectors[0].mT @ side.mT).mT
    return side @ vectors[0]

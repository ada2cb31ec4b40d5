"""Sharing: what a layer's second moments are taken of, where it is used at many positions.

Eschenhagen et al., Kronecker-Factored Approximate Curvature for Modern Neural Network
Architectures, 2023, arXiv:2311.00636.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from jdfunc.factored.leaves import OneHot, Side, positions

Sides = list[Side]


class Sharing(NamedTuple):
    """How positions are brought together.

    Attributes:
        activations: from those of every use, [n, 1, h, s, d], to those whose second moment is
            the mean.
        cotangents: from those of every use, [n, V, h, s, e], to those whose second moment is
            summed.
        sums: whether positions are summed, so that few examples leave a null space.
    """

    activations: Callable[[Sides], Sides]
    cotangents: Callable[[list[Tensor]], list[Tensor]]
    sums: bool


def _mean_over_positions(sides: Sides) -> Sides:
    if all(isinstance(side, OneHot) for side in sides):  # frequencies, whatever the sharing
        return sides
    like = next(side for side in sides if isinstance(side, Tensor))
    dense = [
        F.one_hot(s.indices, like.shape[-1]).to(like.dtype) if isinstance(s, OneHot) else s
        for s in sides
    ]
    count = sum(positions(side) for side in sides)
    return [_total(dense) / max(1, count)]


def _total(sides: list[Tensor]) -> Tensor:
    totals = [side.sum(-2, keepdim=True) for side in sides]
    return sum(totals[1:], totals[0])


#: Every position on its own: A = 1/(N s) Σ a aᵀ, B = w Σ g gᵀ.
expand = Sharing(lambda sides: sides, lambda cotangents: cotangents, sums=False)

#: An example's positions together: A = 1/N Σ ā āᵀ with ā the mean, B = w Σ ḡ ḡᵀ with ḡ the sum.
reduce = Sharing(_mean_over_positions, lambda cotangents: [_total(cotangents)], sums=True)

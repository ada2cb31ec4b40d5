"""Sharing: what a layer's second moments are taken of, where it is used at many positions.

Eschenhagen et al., Kronecker-Factored Approximate Curvature for Modern Neural Network
Architectures, 2023, arXiv:2311.00636.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from jdfunc.curvature.estimate.pairs import Pair
from jdfunc.factored.leaves import Side, positions


class Sharing(NamedTuple):
    """How the positions of an example are brought together.

    Attributes:
        pairs: from the pairs of all uses of a layer to those whose second moments are taken.
        sums: whether positions are summed, so that few examples leave a null space.
    """

    pairs: Callable[[list[Pair]], list[Pair]]
    sums: bool


def _reduced(pairs: list[Pair]) -> list[Pair]:
    sums = [p.cotangent.sum(-2, keepdim=True) for p in pairs if isinstance(p.cotangent, Tensor)]
    cotangent = sum(sums[1:], sums[0]) if sums else pairs[0].cotangent
    sides = [pair.augmented() for pair in pairs]
    tensors = [side for side in sides if isinstance(side, Tensor)]
    if not tensors:  # frequencies, whatever the sharing
        silent = [pair._replace(cotangent=pair.cotangent[..., :0, :]) for pair in pairs[1:]]
        return [pairs[0]._replace(cotangent=cotangent), *silent]
    like = tensors[0]
    dense = [_dense(side, pair, like) for side, pair in zip(sides, pairs, strict=True)]
    totals = [side.sum(-2, keepdim=True) for side in dense]
    counts = [_positions(pair, like) for pair in pairs]
    count = sum(counts[1:], counts[0]).clamp(min=1)[..., None, None]
    return [Pair(sum(totals[1:], totals[0]) / count, cotangent, None)]


def _dense(side: Side, pair: Pair, like: Tensor) -> Tensor:
    if isinstance(side, Tensor):
        return side
    hot = F.one_hot(side.indices, like.shape[-1]).to(like.dtype)
    return hot if pair.present is None else hot * pair.present[..., None].to(like.dtype)


def _positions(pair: Pair, like: Tensor) -> Tensor:
    """Return how many positions of each example count, broadcasting to [n, 1, h]."""
    if pair.present is not None:
        return pair.present.sum(-1).to(like.dtype)
    return like.new_full((1, 1, 1), positions(pair.activation))


#: Every position on its own: A = 1/(N s) Σ a aᵀ, B = w Σ g gᵀ.
expand = Sharing(lambda pairs: pairs, sums=False)

#: An example's positions together: A = 1/N Σ ā āᵀ with ā their mean, B = w Σ ḡ ḡᵀ with ḡ their sum.
reduce = Sharing(_reduced, sums=True)

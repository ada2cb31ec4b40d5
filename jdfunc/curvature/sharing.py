"""Sharing: what a layer's second moments are taken of, where it is used at many positions.

Eschenhagen et al., Kronecker-Factored Approximate Curvature for Modern Neural Network
Architectures, 2023, arXiv:2311.00636.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.curvature.pairs import Pair, with_ones
from jdfunc.factored.leaves import OneHot, positions


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
    sides = [with_ones(pair.activation, pair.one) for pair in pairs]
    tensors = [side for side in sides if isinstance(side, Tensor)]
    if not tensors:  # frequencies, whatever the sharing
        silent = [pair._replace(cotangent=pair.cotangent[..., :0, :]) for pair in pairs[1:]]
        return [pairs[0]._replace(cotangent=cotangent), *silent]
    width, dtype = tensors[0].shape[-1], tensors[0].dtype
    dense = [F.one_hot(s.indices, width).to(dtype) if isinstance(s, OneHot) else s for s in sides]
    totals = [side.sum(-2, keepdim=True) for side in dense]
    total, lengths = sum(totals[1:], totals[0]), pairs[0].lengths
    if lengths is None:
        return [Pair(total / max(1, sum(positions(side) for side in sides)), cotangent, None)]
    count = torch.tensor(lengths, dtype=dtype, device=total.device).clamp(min=1)
    return [Pair(total / count[:, None, None], cotangent, None)]


#: Every position on its own: A = 1/(N s) Σ a aᵀ, B = w Σ g gᵀ.
expand = Sharing(lambda pairs: pairs, sums=False)

#: An example's positions together: A = 1/N Σ ā āᵀ with ā their mean, B = w Σ ḡ ḡᵀ with ḡ their sum.
reduce = Sharing(_reduced, sums=True)

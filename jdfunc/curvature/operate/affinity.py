"""The inner product of two curvatures: how much two tasks use the same directions."""

from __future__ import annotations

import torch
from torch import Tensor

from jdfunc.curvature.blocks import Factors, Spectrum
from jdfunc.curvature.operate.curvature import Curvature

__all__ = ["affinity"]


def affinity(first: Curvature, second: Curvature) -> Tensor:
    """tr(F₁ F₂), exact for what the blocks hold; of one curvature its squared Frobenius norm.

    Never negative, and 0 where no direction has curvature in both. Divided by both Frobenius norms
    it is the cosine of the angle between the two, in [0, 1].

    Args:
        first: F₁, such as that of one head of `several`.
        second: F₂, of the same blocks.

    Returns:
        A tensor without axes.

    Raises:
        ValueError: the curvatures have different blocks.

    Cost: products of factors or bases, d³ for each side of width d. No eigenvalue problem.

    Example:
        >>> from jdfunc.curvature import Block, exact
        >>> layout = (Block(("w",), ((1, 2),), ((1, 1, 2),)),)
        >>> F1 = Factors(torch.ones(1, 1), torch.tensor([[1.0, 2.0]]))
        >>> F2 = Spectrum(None, None, torch.tensor([[[3.0, 0.5]]]))
        >>> first, second = (Curvature(layout, {"w": F}, exact(1.0)) for F in (F1, F2))
        >>> affinity(first, second)
        tensor(4.)
    """
    if first.layout != second.layout:
        raise ValueError(
            f"expected two curvatures of the same blocks, got {[b.name for b in first.layout]} and "
            f"{[b.name for b in second.layout]}, or others of these names; build both from one "
            "layout and with the same joint_bias"
        )
    traces = [_trace(first.blocks[b.name], second.blocks[b.name]) for b in first.layout]
    return sum(traces[1:], traces[0]) if traces else torch.zeros(())


def _trace(first: Factors | Spectrum, second: Factors | Spectrum) -> Tensor:
    """tr(F₁ F₂) of one block."""
    if isinstance(first, Factors) and isinstance(second, Factors):
        sides = zip((first.left, first.right), (second.left, second.right), strict=True)
        left, right = (_inner(*pair) for pair in sides)
        return (left * right).sum()
    if isinstance(first, Factors):
        first, second = second, first
    assert isinstance(first, Spectrum)
    if isinstance(second, Factors):  # Σ λ_ab (q_aᵀ L q_a) (p_bᵀ R p_b)
        left, right = _inside(first.left, second.left), _inside(first.right, second.right)
        return torch.einsum("hab, ha, hb ->", first.eigenvalues, left, right)
    values = _turned(first.left, second.left, first.eigenvalues)
    values = _turned(first.right, second.right, values.mT).mT
    return (values * second.eigenvalues).sum()


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """tr(S₁ S₂) of symmetric factors [h, d, d], or diagonal ones [h, d]: [h]."""
    if first.ndim == second.ndim:
        return (first * second).flatten(1).sum(1)
    first, second = (s if s.ndim == 2 else s.diagonal(0, -2, -1) for s in (first, second))
    return (first * second).sum(1)


def _inside(basis: Tensor | None, factor: Tensor) -> Tensor:
    """The diagonal of Qᵀ S Q, [h, r]."""
    if basis is None:
        return factor if factor.ndim == 2 else factor.diagonal(0, -2, -1)
    if factor.ndim == 2:
        return (basis.square() * factor[..., None]).sum(-2)
    return (basis * (factor @ basis)).sum(-2)


def _turned(first: Tensor | None, second: Tensor | None, values: Tensor) -> Tensor:
    """(Q₂ᵀ Q₁)² λ: eigenvalues along one side, seen from another basis."""
    if first is None and second is None:
        return values
    if first is None or second is None:
        turn = second.mT if first is None and second is not None else first
    else:
        turn = second.mT @ first
    assert turn is not None
    return turn.square() @ values

"""Damping: what is added to a block of F before its powers are taken.

A rule is a function ``(block, spectrum) -> eigenvalues``, those of the damped block or, where that
is still a product, those of its two sides. A is the factor of the activations, B that of the
gradients; λ are the eigenvalues of the block, λ_A λ_B in KFAC.

    exact       F + d                  λ + d
    relative    F + c mean(λ)          λ + c mean(λ)
    plain       (A + d_A) ⊗ (B + d_B)  (λ_A + d_A)(λ_B + d_B)
    heuristic   plain with d_A = π √d, d_B = √d / π, π² = mean(λ_A) / mean(λ_B)
    pseudo      F                      λ, where it is not zero up to rounding
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from jdfunc.curvature.blocks import Block, Spectrum

__all__ = [
    "Damped",
    "Damping",
    "PerBlock",
    "exact",
    "heuristic",
    "per_block",
    "plain",
    "pseudo",
    "relative",
    "undamped",
]


class Damped(NamedTuple):
    """Eigenvalues of a damped block, or of one side of it.

    Attributes:
        values: in the span of the bases, [h, r, q]; [h, r] for a side.
        outside: those outside the span, [h] or []; None for zero.
    """

    values: Tensor
    outside: Tensor | None = None


#: ``(block, spectrum) -> eigenvalues``: of the block, or of its left and its right side.
Damping = Callable[[Block, Spectrum], Damped | tuple[Damped, Damped]]


def exact(d: float | Tensor) -> Damping:
    """F + d: every eigenvalue and d.

    Args:
        d: not negative, in the units of F: a number, or a tensor without axes, which can change
            without a new compilation and is not checked, since that would wait for the device.

    Returns:
        A damping rule.

    Example:
        >>> block = Block(("w",), ((2,),), ((1, 1, 2),))
        >>> exact(0.5)(block, Spectrum(None, None, torch.tensor([[[0.0, 1.0]]]))).values
        tensor([[[0.5000, 1.5000]]])
    """
    _check(d=d)

    def rule(block: Block, spectrum: Spectrum) -> Damped:
        return _plus(spectrum.eigenvalues, _tensor(d, spectrum))

    return rule


def relative(c: float | Tensor) -> Damping:
    """F + c·mean(λ): damping that follows the scale of each block, c without units.

    The mean is over all eigenvalues of the block, zeros outside a thin basis among them. A block of
    zeros stays zero, and has no inverse: negative powers of it are zero.

    Args:
        c: not negative; a number, or a tensor without axes.

    Returns:
        A damping rule.

    Example:
        >>> block = Block(("w",), ((2,),), ((1, 1, 2),))
        >>> relative(0.5)(block, Spectrum(None, None, torch.tensor([[[0.0, 2.0]]]))).values
        tensor([[[0.5000, 2.5000]]])
    """
    _check(c=c)

    def rule(block: Block, spectrum: Spectrum) -> Damped:
        mean = spectrum.eigenvalues.sum() / max(1, math.prod(block.shape))
        return _plus(spectrum.eigenvalues, _tensor(c, spectrum) * mean)

    return rule


def plain(d: float | Tensor, d_B: float | Tensor | None = None) -> Damping:
    """(A + d_A) ⊗ (B + d_B): each factor of KFAC with its own damping.

    A block that is no product (a bias alone, the parameters of a norm) is F + d_B.

    Args:
        d: d_A, of the activations; d_B too, if that is not given. A number, or a tensor without
            axes; not negative.
        d_B: of the gradients.

    Returns:
        A damping rule. Called with the spectrum of a product whose factors are not known, as in
        EKFAC, it raises ValueError.

    Example:
        >>> block = Block(("w",), ((1, 2),), ((1, 1, 2),), activations=1)
        >>> A, B = torch.tensor([[0.0, 1.0]]), torch.tensor([[4.0]])
        >>> left, right = plain(0.5)(block, Spectrum(None, None, B[..., None] * A, (B, A)))
        >>> left.values * right.values
        tensor([[2.2500, 6.7500]])
    """
    d_B = d if d_B is None else d_B
    _check(d_A=d, d_B=d_B)

    def rule(block: Block, spectrum: Spectrum) -> Damped | tuple[Damped, Damped]:
        if block.activations is None:
            return _plus(spectrum.eigenvalues, _tensor(d_B, spectrum))
        return _sides(block, spectrum, _tensor(d, spectrum), _tensor(d_B, spectrum))

    return rule


def heuristic(d: float | Tensor, minimum: float | Tensor = 0.0) -> Damping:
    """`plain` with d shared out by the mean eigenvalues of the factors, per group.

    d_A = max(π √d, minimum) and d_B = max(√d / π, minimum), with π² = mean(λ_A) / mean(λ_B); π = 1
    where one of them is zero. A block that is no product is F + d.

    Args:
        d: not negative; a number, or a tensor without axes.
        minimum: of d_A and of d_B.

    Returns:
        A damping rule, which raises ValueError as that of `plain` does.

    References:
        Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature, 2015, arXiv:1503.05671, Section 6.3.

    Example:
        >>> block = Block(("w",), ((1, 1),), ((1, 1, 1),), activations=1)
        >>> A, B = torch.tensor([[1.0]]), torch.tensor([[4.0]])
        >>> left, right = heuristic(1.0)(block, Spectrum(None, None, A[..., None] * B, (B, A)))
        >>> left.values, right.values
        (tensor([[6.]]), tensor([[1.5000]]))
    """
    _check(d=d, minimum=minimum)

    def rule(block: Block, spectrum: Spectrum) -> Damped | tuple[Damped, Damped]:
        root = _tensor(d, spectrum)
        if block.activations is None:
            return _plus(spectrum.eigenvalues, root)
        root, least = root.sqrt(), _tensor(minimum, spectrum)
        sizes, right = block.shape[1:], block.activations
        sides = _known_sides(block, spectrum)
        a, b = (sides[k].sum(-1) / max(1, sizes[k]) for k in (right, 1 - right))
        some = (a != 0) & (b != 0)  # NaN goes on
        ratio = torch.where(some, a, 1.0).sqrt() / torch.where(some, b, 1.0).sqrt()
        d_A, d_B = torch.maximum(ratio * root, least), torch.maximum(root / ratio, least)
        return _sides(block, spectrum, d_A, d_B)

    return rule


def pseudo(rtol: float | None = None) -> Damping:
    """F without damping, its rank being decided: negative powers are those of Moore and Penrose.

    Eigenvalues up to ``rtol`` times the largest of the block count as zero; where the factors are
    known, those of each factor are compared with its own largest.

    Args:
        rtol: not negative; None for the rounding unit times the larger side of the block.

    Returns:
        A damping rule.

    Example:
        >>> block = Block(("w",), ((2,),), ((1, 1, 2),))
        >>> pseudo(1e-3)(block, Spectrum(None, None, torch.tensor([[[1e-4, 1.0]]]))).values
        tensor([[[0., 1.]]])
    """
    if rtol is not None:
        _check(rtol=rtol)

    def cut(values: Tensor, sizes: tuple[int, ...]) -> Damped:
        if not values.numel():
            return Damped(values)
        share = torch.finfo(values.dtype).eps * max(sizes) if rtol is None else rtol
        return Damped(torch.where(values <= share * values.amax(), 0.0, values))

    def rule(block: Block, spectrum: Spectrum) -> Damped | tuple[Damped, Damped]:
        sizes = block.shape[1:]
        if spectrum.sides is None:
            return cut(spectrum.eigenvalues, sizes)
        left, right = spectrum.sides
        return cut(left, sizes[:1]), cut(right, sizes[1:])

    return rule


class PerBlock(NamedTuple):
    """Damping rules by the name of a parameter of the block: see `per_block`."""

    rules: Mapping[str, Damping]
    otherwise: Damping

    def __call__(self, block: Block, spectrum: Spectrum) -> Damped | tuple[Damped, Damped]:
        """Apply the rule of the block."""
        own = [name for name in block.params if name in self.rules]
        if len(own) > 1:
            raise ValueError(f"expected one damping rule for a block, got one for each of {own}")
        rule = self.rules[own[0]] if own else self.otherwise
        return rule(block, spectrum)


def per_block(rules: Mapping[str, Damping], otherwise: Damping) -> Damping:
    """Damping rules for blocks of their own: a prior precision per layer, say.

    Args:
        rules: a rule by the name of a parameter of the block. A name that no block has is refused
            where the rule is used.
        otherwise: the rule of the other blocks.

    Returns:
        A damping rule.

    Example:
        >>> rule = per_block({"head.weight": exact(1.0)}, otherwise=relative(1e-3))
    """
    return PerBlock(dict(rules), otherwise)


def _plus(values: Tensor, d: Tensor) -> Damped:
    """Values [h, *axes] and d, [h] or []."""
    return Damped(values + d.reshape(*d.shape, *(1 for _ in values.shape[1:])), d)


def _sides(block: Block, spectrum: Spectrum, d_A: Tensor, d_B: Tensor) -> tuple[Damped, Damped]:
    left, right = _known_sides(block, spectrum)
    d_left, d_right = (d_B, d_A) if block.activations == 1 else (d_A, d_B)
    return _plus(left, d_left), _plus(right, d_right)


def _known_sides(block: Block, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    if spectrum.sides is None:
        raise ValueError(
            f"expected factors to damp in block {block.name!r}, got corrected eigenvalues (EKFAC), "
            "which are no product; use exact, relative, or per_block to choose for each block"
        )
    return spectrum.sides


def _tensor(number: float | Tensor, spectrum: Spectrum) -> Tensor:
    values = spectrum.eigenvalues
    return torch.as_tensor(number, dtype=values.dtype, device=values.device)


def _check(**numbers: float | Tensor) -> None:
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            if number.ndim:
                raise ValueError(
                    f"expected {name} to be a number or a tensor without axes, got shape "
                    f"{tuple(number.shape)}"
                )
        elif isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"expected {name} to be a number, got {number!r}")
        elif not 0 <= number < math.inf:
            raise ValueError(f"expected {name} to be finite and not negative, got {number}")


#: F itself: eigenvalues that are zero, and no others, have no inverse.
undamped = pseudo(0.0)

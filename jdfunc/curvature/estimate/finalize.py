"""From sums to blocks: each divided by what was counted."""

from collections.abc import Mapping

import torch
from torch import Tensor

from jdfunc.curvature.blocks import Factors, Spectrum
from jdfunc.curvature.estimate.basis import Basis, Normalised, joined
from jdfunc.curvature.estimate.factors import Moments
from jdfunc.curvature.layouts.layout import Layer, Layout


def normalised(
    layout: Layout, factors: Mapping[str, Moments | Tensor], w: Tensor, *, forward_only: bool
) -> dict[str, Normalised]:
    """Divide factors: activations by their number, cotangents and rows by the mean's divisor.

    Args:
        layout: of the model.
        factors: sums.
        w: what quadratic quantities are multiplied by, [].
        forward_only: whether the factors of the cotangents are the identity.

    Returns:
        By block: the factors of every role of a layer, a matrix, or a diagonal.
    """
    found: dict[str, Normalised] = {}
    for layer in layout.layers:
        moments = factors[layer.name]
        assert isinstance(moments, Moments)
        pairs = zip(layer.roles, moments.roles, moments.positions, strict=True)
        found[layer.name] = tuple(
            _divided(pair, role, count, w, forward_only) for role, pair, count in pairs
        )
    for rest in layout.rests:
        held = factors.get(rest.params[0])
        if isinstance(held, Tensor):
            found[rest.params[0]] = (
                torch.ones_like(held) if forward_only else held * w.to(held.dtype)
            )
    return found


def _divided(factors: Factors, role: int, count: Tensor, w: Tensor, forward_only: bool) -> Factors:
    """A / positions, and w B or the identity."""
    scale = torch.where(count > 0, 1 / torch.where(count > 0, count, 1), 0)
    sides = [factors.left, factors.right]
    scale = scale.reshape(-1, *(1,) * (sides[role].ndim - 1))
    sides[role] = sides[role] * scale.to(sides[role].dtype)
    other = sides[1 - role]
    sides[1 - role] = torch.ones_like(other) if forward_only else other * w.to(other.dtype)
    return Factors(*sides)


def kron_blocks(
    layout: Layout, factors: Mapping[str, Normalised], joint_bias: bool
) -> dict[str, Factors | Spectrum]:
    """Return the blocks of KFAC: the factors of layers, exact blocks or diagonals of the rest.

    Args:
        layout: of the model.
        factors: divided.
        joint_bias: whether a bias shares the block of its weight.

    Returns:
        By block: its factors.
    """
    blocks: dict[str, Factors | Spectrum] = {}
    for layer in layout.layers:
        roles = factors[layer.name]
        assert not isinstance(roles, Tensor)
        blocks[layer.name] = joined(roles)
        if layer.bias is not None and not layer.joint(joint_bias):
            blocks[layer.bias] = _bias_factors(layer, roles)
    for rest in layout.rests:
        held = factors.get(rest.params[0])
        if isinstance(held, Tensor):
            blocks[rest.params[0]] = Factors(held.new_ones(1, 1), held)
    return blocks


def _bias_factors(layer: Layer, roles: tuple[Factors, ...]) -> Factors:
    """The factor of the cotangents alone."""
    side = layer.bias_activations()
    pair = roles[layer.roles.index(side)]
    b = pair[1 - side]
    one = b.new_ones(b.shape[0], 1)
    return Factors(b, one) if side == 1 else Factors(one, b)


def spectral_blocks(
    layout: Layout,
    basis: Mapping[str, Basis],
    eigenvalues: Mapping[str, Tensor],
    w: Tensor,
    joint_bias: bool,
) -> dict[str, Factors | Spectrum]:
    """Return the blocks of EKFAC: the eigenvalues that belong to the bases.

    Args:
        layout: of the model.
        basis: of every block.
        eigenvalues: sums.
        w: what they are multiplied by, [].
        joint_bias: whether a bias shares the block of its weight.

    Returns:
        By block: its spectrum.
    """

    def side(vectors: Tensor | tuple[()]) -> Tensor | None:
        return None if isinstance(vectors, tuple) else vectors

    blocks: dict[str, Factors | Spectrum] = {}
    for name, (left, right) in basis.items():
        values = eigenvalues[name]
        blocks[name] = Spectrum(side(left), side(right), values * w.to(values.dtype))
    for layer in layout.layers:
        if layer.bias is None or layer.joint(joint_bias):
            continue
        values = eigenvalues[layer.bias] * w.to(eigenvalues[layer.bias].dtype)
        left, right = basis[layer.name]
        on_left = layer.bias_activations() == 1
        blocks[layer.bias] = Spectrum(
            side(left) if on_left else None, None if on_left else side(right), values
        )
    return blocks


def zero_blocks(layout: Layout, like: Tensor) -> dict[str, Factors | Spectrum]:
    """Return the blocks of parameters without curvature.

    Args:
        layout: of the model.
        like: gives the dtype and device.

    Returns:
        By block: a spectrum of zeros.
    """
    return {
        rest.params[0]: Spectrum(None, None, like.new_zeros(rest.block().shape))
        for rest in layout.rests
        if not rest.rule.covered
    }


def reexpressed(
    eigenvalues: Mapping[str, Tensor],
    old: Mapping[str, Basis],
    new: Mapping[str, Basis],
    layout: Layout,
    joint_bias: bool,
) -> dict[str, Tensor]:
    """Carry eigenvalues over to another basis: (T_L²) λ (T_R²)ᵀ with T = Q_newᵀ Q_old.

    Args:
        eigenvalues: in the old bases.
        old: the old bases.
        new: the new ones.
        layout: of the model.
        joint_bias: whether a bias shares the block of its weight.

    Returns:
        The eigenvalues in the new bases.
    """

    def turned(values: Tensor, name: str, *, left: bool = True, right: bool = True) -> Tensor:
        before, after = old[name], new[name]
        if left and not isinstance(before.left, tuple) and not isinstance(after.left, tuple):
            values = (after.left.mT @ before.left).square().to(values.dtype) @ values
        if right and not isinstance(before.right, tuple) and not isinstance(after.right, tuple):
            turn = (after.right.mT @ before.right).square().to(values.dtype)
            values = values @ turn.mT
        return values

    carried = {name: turned(eigenvalues[name], name) for name in new}
    for layer in layout.layers:
        if layer.bias is not None and not layer.joint(joint_bias):
            left = layer.bias_activations() == 1
            carried[layer.bias] = turned(
                eigenvalues[layer.bias], layer.name, left=left, right=not left
            )
    return carried

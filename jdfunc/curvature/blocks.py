"""The blocks of a curvature matrix F: which parameters they cover, and how each block is held.

The parameters of a block form one matrix M [h, i, j], one [i, j] for each of h groups, and F maps M
to a matrix of the same shape. A block is a product of two factors, or a spectrum in a product of
two bases:

    Factors     F M = L M Rᵀ
    Spectrum    F M = Q_L ((Q_Lᵀ M Q_R) ∘ λ) Q_Rᵀ

Dense and diagonal blocks, embeddings and biases are such blocks too: with M [1, 1, p] the right
side alone is any symmetric p × p matrix, and a side without a basis is diagonal.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Block(NamedTuple):
    """What one block covers: names and sizes, no tensors.

    Attributes:
        params: the parameters, by name.
        shapes: their shapes.
        parts: the shape (h, i, j) of the part of M that each of them is.
        axis: of M along which the parts are joined, -1 or -2.
        activations: the side of the activations in a layer, 0 for the left and 1 for the right;
            None where the block is no product (a bias alone, the parameters of a norm).
    """

    params: tuple[str, ...]
    shapes: tuple[Shape, ...]
    parts: tuple[Shape, ...]
    axis: int = -1
    activations: int | None = None

    @property
    def name(self) -> str:
        """The name of the block: that of its first parameter."""
        return self.params[0]

    @property
    def shape(self) -> Shape:
        """The shape (h, i, j) of M."""
        h, i, j = self.parts[0]
        joined = sum(part[self.axis] for part in self.parts)
        return (h, i, joined) if self.axis == -1 else (h, joined, j)


class Factors(NamedTuple):
    """A product L ⊗ R of symmetric positive semidefinite factors, for each group.

    Attributes:
        left: L [h, i, i], or [h, i] if it is diagonal.
        right: R [h, j, j], or [h, j] if it is diagonal.
    """

    left: Tensor
    right: Tensor


class Spectrum(NamedTuple):
    """Eigenvalues λ in a product of two bases, for each group; zero outside their span.

    Attributes:
        left: Q_L [h, i, r], orthonormal columns, r ≤ i; None for the identity.
        right: Q_R [h, j, q], likewise.
        eigenvalues: λ [h, r, q], none negative.
        sides: the eigenvalues of the two factors, [h, r] and [h, q], where λ is their product.
    """

    left: Tensor | None
    right: Tensor | None
    eigenvalues: Tensor
    sides: tuple[Tensor, Tensor] | None = None


def matrix_of(block: Block, named: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix M [*columns, h, i, j] that the parameters of a block form.

    Args:
        block: the block.
        named: tensors [*columns, *param.shape] by the names of the parameters.

    Returns:
        M.
    """
    matrices = []
    for name, shape, part in zip(block.params, block.shapes, block.parts, strict=True):
        columns = named[name].shape[: named[name].ndim - len(shape)]
        matrices.append(named[name].reshape(*columns, *part))
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, block.axis)


def params_of(block: Block, matrix: Tensor) -> dict[str, Tensor]:
    """Return the parameters of a block that a matrix M [*columns, h, i, j] is made of.

    Args:
        block: the block.
        matrix: M.

    Returns:
        Tensors [*columns, *param.shape] by name.
    """
    columns = matrix.shape[:-3]
    pieces = matrix.split([part[block.axis] for part in block.parts], block.axis)
    return {
        name: piece.reshape((*columns, *shape))
        for name, shape, piece in zip(block.params, block.shapes, pieces, strict=True)
    }

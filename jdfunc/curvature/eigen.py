"""Eigendecompositions of factors: symmetrised, and retried in double precision."""

from collections.abc import Mapping

import torch
from torch import Tensor

#: Jitters of the retries, in mean diagonal elements.
JITTERS = (1e-10, 1e-9, 1e-8, 1e-7)
#: Larger matrices are decomposed one by one: stacking them costs memory and saves nothing.
LARGE = 512


def eigh(matrix: Tensor, dtype: torch.dtype | None = torch.float64) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending and none negative, and eigenvectors of symmetric matrices.

    Where values can be looked at (eager mode), a decomposition that fails is tried again in double
    precision, with a jitter on the diagonal, and at last on the CPU; compiled or under
    `torch.vmap`, there is one attempt.

    Args:
        matrix: [..., d, d], symmetric up to rounding.
        dtype: to compute in; that of the matrix, float32 at least, if None.

    Returns:
        ``(values [..., d], vectors [..., d, d])`` in the dtype of the matrix.

    Raises:
        ValueError: the matrix holds NaN or inf.
    """
    if looks(matrix) and not bool(torch.isfinite(matrix).all()):
        raise ValueError("expected a finite matrix, got NaN or inf")
    return _decomposed(matrix, dtype)


def _decomposed(matrix: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Decompose the symmetric part of a finite matrix."""
    least = torch.promote_types(matrix.dtype, torch.float32)
    wide = matrix.to(least if dtype is None else dtype)
    wide = (wide + wide.mT).mul_(0.5)
    values, vectors = _retried(wide) if looks(wide) else torch.linalg.eigh(wide)
    return values.clamp(min=0).to(matrix.dtype), vectors.contiguous().to(matrix.dtype)


def _retried(matrix: Tensor) -> tuple[Tensor, Tensor]:
    found = _attempt(matrix)
    if found is not None:
        return found
    double = matrix.double()
    mean = double.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=double.dtype, device=double.device)
    for jitter in (0.0, *JITTERS):
        found = _attempt(double + jitter * mean * eye)
        if found is not None:
            return found
    found = _attempt(double.cpu())
    if found is None:
        raise ValueError("expected a matrix whose eigenvalues can be found, got one without end")
    return found[0].to(matrix.device), found[1].to(matrix.device)


def _attempt(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return None
    return (values, vectors) if bool(torch.isfinite(values.sum() + vectors.sum())) else None


def looks(tensor: Tensor) -> bool:
    """Whether values may decide: in eager mode, outside transforms."""
    transformed = torch._C._are_functorch_transforms_active()
    return not (transformed or torch.compiler.is_compiling() or tensor.device.type == "meta")


def eigh_all(
    matrices: Mapping[str, Tensor], dtype: torch.dtype | None = torch.float64
) -> dict[str, tuple[Tensor, Tensor]]:
    """Decompose many matrices [h, d, d]; small ones of one size in one call.

    Args:
        matrices: by name.
        dtype: to compute in.

    Returns:
        `eigh` of each, by name.

    Raises:
        ValueError: a matrix holds NaN or inf: the message has its name.
    """
    for name, matrix in matrices.items():
        check_finite(name, matrix)
    groups: dict[tuple[int, torch.dtype], list[str]] = {}
    for name, matrix in matrices.items():
        groups.setdefault((matrix.shape[-1], matrix.dtype), []).append(name)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for names in groups.values():
        if len(names) == 1 or matrices[names[0]].shape[-1] > LARGE:
            found |= {name: _decomposed(matrices[name], dtype) for name in names}
            continue
        sizes = [matrices[name].shape[0] for name in names]
        values, vectors = _decomposed(torch.cat([matrices[name] for name in names]), dtype)
        parts = zip(names, values.split(sizes), vectors.split(sizes), strict=True)
        found |= {name: (value, vector) for name, value, vector in parts}
    return found


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that what a factor is made of is finite, where values can be looked at."""
    if looks(tensor) and not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"expected finite factors, got NaN or inf in that of {name!r}: look at the losses and "
            "at the gradients of the batches that went into it"
        )


def completed(reduced: Tensor, full: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Eigenvectors of one matrix, and within its null space those of another.

    A second moment of fewer vectors than their length leaves the eigenvectors of its null space to
    the library; the gradients have mass there, so that the choice matters. Both parts come from one
    decomposition of a matrix that has the range of the first in its upper spectrum.

    Args:
        reduced: [..., d, d], positive semidefinite.
        full: [..., d, d], positive semidefinite: decides in the null space of ``reduced``.
        dtype: to compute in.

    Returns:
        Orthonormal columns [..., d, d].
    """
    values, vectors = eigh(reduced.to(dtype), dtype)
    largest = values[..., -1:]
    inside = values > largest * values.shape[-1] * torch.finfo(dtype).eps
    range_of = (vectors * inside[..., None, :]) @ vectors.mT
    null = torch.eye(values.shape[-1], dtype=dtype, device=values.device) - range_of
    upper = (vectors * torch.where(inside, 2 + values / _positive(largest), 0)[..., None, :]) @ (
        vectors.mT
    )
    full = full.to(dtype)
    scale = full.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    lower = null @ (full / _positive(scale)) @ null
    return eigh(upper + lower, dtype)[1].to(reduced.dtype)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1)

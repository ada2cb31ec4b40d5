"""Numbers that F is summed up by: tensors without axes, nothing waits for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.curvature.blocks import Factors, Spectrum
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.damping import Damping, undamped
from jdfunc.curvature.operate.parts import logdet as logdet_of
from jdfunc.curvature.operate.powers import check_damping, diagonalised

__all__ = ["det", "eigenvalues", "frobenius_norm", "logdet", "trace"]


def trace(curv: Curvature) -> Tensor:
    """The trace of F: Σ tr L tr R over groups, or Σ λ. No eigenvalue problem.

    Args:
        curv: F.

    Returns:
        A tensor without axes.
    """
    return _total([_trace(held) for held in _held(curv)])


def frobenius_norm(curv: Curvature) -> Tensor:
    """The Frobenius norm of F: of |L| |R| over groups, or of λ. No eigenvalue problem.

    Args:
        curv: F.

    Returns:
        A tensor without axes.
    """
    norms = [_norm(held) for held in _held(curv)]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def logdet(curv: Curvature, damping: Damping | None = None) -> Tensor:
    """The logarithm of the determinant of F + damping, the complement of thin bases included.

    Args:
        curv: F.
        damping: a rule; none if None. Without damping, −inf if F is singular, which it is as soon
            as a parameter has no curvature.

    Returns:
        A tensor without axes. Units log F for each parameter.

    Raises:
        ValueError: the damping does not fit the blocks, or factors are not finite.
    """
    rule = undamped if damping is None else damping
    check_damping(curv.layout, rule)
    spectra = diagonalised(curv.layout, curv.blocks)
    logs = [logdet_of(block, rule(block, spectra[block.name])) for block in curv.layout]
    return _total(logs)


def det(curv: Curvature, damping: Damping | None = None) -> Tensor:
    """The determinant of F + damping, exp of `logdet`: 0 or inf beyond the range of the dtype.

    Args:
        curv: F.
        damping: a rule; none if None.

    Returns:
        A tensor without axes.
    """
    return logdet(curv, damping).exp()


def eigenvalues(curv: Curvature) -> dict[str, Tensor]:
    """The eigenvalues of F, without damping.

    Args:
        curv: F.

    Returns:
        Those of every block [h, i, j] by name, as many as it has parameters, in no order; zeros are
        appended for what thin bases leave out.
    """
    spectra = diagonalised(curv.layout, curv.blocks)
    found = {}
    for block in curv.layout:
        _, i, j = block.shape
        values = spectra[block.name].eigenvalues
        found[block.name] = F.pad(values, (0, j - values.shape[-1], 0, i - values.shape[-2]))
    return found


def _held(curv: Curvature) -> list[Factors | Spectrum]:
    return [curv.blocks[block.name] for block in curv.layout]


def _trace(held: Factors | Spectrum) -> Tensor:
    if isinstance(held, Spectrum):
        return held.eigenvalues.sum()
    left, right = (
        (s if s.ndim == 2 else s.diagonal(0, -2, -1)).sum(-1) for s in (held.left, held.right)
    )
    return (left * right).sum()


def _norm(held: Factors | Spectrum) -> Tensor:
    if isinstance(held, Spectrum):
        return torch.linalg.vector_norm(held.eigenvalues)
    left, right = (torch.linalg.vector_norm(s.flatten(1), dim=-1) for s in (held.left, held.right))
    return torch.linalg.vector_norm(left * right)


def _total(numbers: list[Tensor]) -> Tensor:
    return sum(numbers[1:], numbers[0]) if numbers else torch.zeros(())

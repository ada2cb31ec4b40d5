"""The dtype of a small problem, and the ridge that the rounding of its Gramian calls for."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["compute_dtype", "effective_ridge", "poison"]


def compute_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype that the device computes in."""
    return torch.float32 if device.type == "mps" else torch.float64


def effective_ridge(ridge: float, dtype: torch.dtype, m: int) -> float:
    """The ridge asked for, or what rounding a Gramian to this dtype requires; 0 stays 0."""
    eps = torch.finfo(dtype).eps
    rounding = 4 * eps if dtype in (torch.float32, torch.float64) else m * eps / 2
    return max(ridge, rounding) if ridge > 0 else 0.0


def poison(gramian: Float[Tensor, "*batch m m"]) -> Float[Tensor, "*batch"]:
    """Zero, or NaN for a batch element that is not finite."""
    return (0 * gramian).sum((-2, -1))

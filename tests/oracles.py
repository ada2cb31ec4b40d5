"""Slow and obvious truth in plain autograd: rows of J one loss at a time, then G = J Jᵀ and Jᵀw.

Nothing here imports the package under test. Parameters are any pytree, usually a flat dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ModelFn = Callable[[Any, Any, Any], Tensor]


def losses_of(model_fn: ModelFn, params: Any, buffers: Any, batch: Any) -> Tensor:
    """Losses [*rows] of one batched call, on copies of the arguments."""
    with torch.no_grad():
        return model_fn(_copy(params), _copy(buffers), _copy(batch))


def jacobian_rows(model_fn: ModelFn, params: Any, buffers: Any, batch: Any) -> Any:
    """Pytree like params of rows [*rows, *param.shape]: one backward pass per loss."""
    leaves, spec = pytree.tree_flatten(params)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        losses = model_fn(pytree.tree_unflatten(leaves, spec), _copy(buffers), _copy(batch))
    rows: list[list[Tensor]] = [[] for _ in leaves]
    for loss in losses.reshape(-1):
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        else:
            grads = (None,) * len(leaves)
        for row, leaf, grad in zip(rows, leaves, grads, strict=True):
            if grad is not None and grad.is_sparse:
                grad = grad.to_dense()
            row.append(torch.zeros_like(leaf) if grad is None else grad.detach())
    stacked = [
        torch.stack(row).reshape(*losses.shape, *leaf.shape)
        for row, leaf in zip(rows, leaves, strict=True)
    ]
    return pytree.tree_unflatten(stacked, spec)


def flat_jacobian(rows: Any, ndim: int) -> Tensor:
    """J as one matrix [m, n] from a pytree of rows whose losses have `ndim` dimensions."""
    leaves = pytree.tree_leaves(rows)
    m = leaves[0].shape[:ndim].numel()
    return torch.cat([leaf.reshape(m, -1) for leaf in leaves], dim=1)


def cross_gramian(rows1: Any, rows2: Any, shape1: torch.Size, shape2: torch.Size) -> Tensor:
    """J₁ J₂ᵀ as [*rows1, *reversed(rows2)]."""
    flat = flat_jacobian(rows1, len(shape1)) @ flat_jacobian(rows2, len(shape2)).T
    k1, k2 = len(shape1), len(shape2)
    order = [*range(k1), *reversed(range(k1, k1 + k2))]
    return flat.reshape([*shape1, *shape2]).permute(order)


def gramian(model_fn: ModelFn, params: Any, buffers: Any, batch: Any) -> Tensor:
    """Generalised Gramian [m1, ..., mk, mk, ..., m1] of the losses."""
    shape = losses_of(model_fn, params, buffers, batch).shape
    rows = jacobian_rows(model_fn, params, buffers, batch)
    return cross_gramian(rows, rows, shape, shape)


def combine_rows(rows: Any, weights: Tensor) -> Any:
    """Jᵀw as a pytree like params, weights shaped like the losses."""

    def contract(leaf: Tensor) -> Tensor:
        shape = leaf.shape[weights.ndim :]
        return (weights.reshape(-1) @ leaf.reshape(weights.numel(), -1)).reshape(shape)

    return pytree.tree_map(contract, rows)


def combine(model_fn: ModelFn, params: Any, buffers: Any, batch: Any, weights: Tensor) -> Any:
    """Jᵀw from the losses."""
    return combine_rows(jacobian_rows(model_fn, params, buffers, batch), weights)


def assert_close(actual: Any, expected: Any, *, tolerance: float = 1e-10, what: str = "") -> None:
    """Same structure and shapes; largest error below `tolerance` times the largest expected entry.

    The scale is that of the whole tree, so a leaf of rounding noise is not compared with itself.
    """
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert actual_spec == expected_spec, f"{what}: structure {actual_spec}, wanted {expected_spec}"
    assert expected_leaves, f"{what}: nothing to compare"
    scale = max(float(leaf.abs().max()) if leaf.numel() else 0.0 for leaf in expected_leaves)
    keyed = pytree.tree_flatten_with_path(expected)[0]
    for (path, wanted), got in zip(keyed, actual_leaves, strict=True):
        name = f"{what}{pytree.keystr(path)}"
        assert isinstance(got, Tensor), f"{name}: {type(got).__name__}, wanted a tensor"
        assert got.shape == wanted.shape, f"{name}: {tuple(got.shape)} != {tuple(wanted.shape)}"
        assert got.dtype == wanted.dtype, f"{name}: {got.dtype}, wanted {wanted.dtype}"
        if wanted.numel():
            error = float((got.detach().double() - wanted.double()).abs().max())
            assert error <= tolerance * max(scale, 1e-30), (
                f"{name}: error {error:.3e} at scale {scale:.3e}"
            )


def snapshot(tree: Any) -> list[tuple[Tensor, int]]:
    """Copies and version counters of every tensor in a tree, for `assert_untouched`."""
    return [
        (leaf.detach().clone(), leaf._version)
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, Tensor)
    ]


def assert_untouched(tree: Any, before: list[tuple[Tensor, int]]) -> None:
    """Bit-identical tensors, never written to, without a .grad."""
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    assert len(leaves) == len(before)
    for leaf, (copy, version) in zip(leaves, before, strict=True):
        assert torch.allclose(leaf.detach(), copy, rtol=0, atol=0, equal_nan=True)
        assert leaf._version == version, "written in place (and perhaps restored)"
        assert leaf.grad is None


def _copy(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)

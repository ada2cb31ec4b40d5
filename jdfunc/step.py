"""The step: linearise, weigh, combine."""

from typing import Any, Literal

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.linearizations import structured
from jdfunc.linearizations.scaled import scaled
from jdfunc.rules import as_rule
from jdfunc.types import (
    Batch,
    Buffers,
    JDInfo,
    Linearize,
    Metric,
    ModelFn,
    Params,
    State,
)
from jdfunc.weightings.cone import upgrad

OnNonfinite = Literal["propagate", "raise"]


def jd_step(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    *,
    buffers: Buffers | None = None,
    weighting: Any = upgrad,
    batch_dim: Any = None,
    linearize: Linearize = structured,
    metric: Metric | None = None,
    has_aux: bool = False,
    on_nonfinite: OnNonfinite = "propagate",
    loss_scale: float | Tensor | None = None,
) -> Any:
    """One direction of Jacobian descent: Jᵀ w, with weights w from the Gramian J Jᵀ.

    To be subtracted from the params, by hand or by any optimiser (`assign_grads`).

    Args:
        model_fn: pure function ``(params, buffers, batch) -> losses``, losses of any shape [*rows].
        params: pytree of floating-point tensors, where J is taken. Never modified.
        batch: handed to ``model_fn``.
        buffers: handed to ``model_fn``; an empty dict if None.
        weighting: ``gramian [m, m] -> weights [m]``; losses of another shape are flattened for it.
            Or a method that reads something else: see `value_and_jd_step`.
        batch_dim: None, always right; or the example axis, if losses[i] depends on example i alone
            (see `structured`).
        linearize: how J is held: `structured`, `dense`, `matrix_free`, `sketched(rank, key)`.
        metric: F⁻¹ as a function of a pytree like the params: then G = J F⁻¹ Jᵀ and the direction
            is F⁻¹ Jᵀ w. The identity if None.
        has_aux: ``model_fn`` returns ``(losses, aux)``.
        on_nonfinite: "propagate": NaN or inf in losses or gradients make the direction NaN;
            "raise": they raise, which waits for the device.
        loss_scale: what losses are multiplied by before they are differentiated; J, G and the
            direction are divided by it in float32 at least. For models that compute in float16,
            whose gradients of small losses are zero else: a power of two, 2.0**16 say. A tensor
            without axes can change without a new compilation. See `scaled`.

    Returns:
        The direction, a pytree like ``params`` in their dtypes, units loss/param;
        ``(direction, aux)`` if ``has_aux``. No losses, or no parameters: zeros, or an empty tree.

    Raises:
        ValueError: see `value_and_jd_step`; or the weighting carries a state, which this function
            has no place for.
        TypeError: see `value_and_jd_step`.

    References:
        Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024, arXiv:2406.16232.

    Example:
        >>> def model_fn(params, buffers, batch):
        ...     return torch.stack([(batch * params["w"]).sum(), -params["w"][0]])
        >>> params, batch = {"w": torch.tensor([1.0, 2.0])}, torch.tensor([1.0, 1.0])
        >>> jd_step(model_fn, params, batch, weighting=upgrad)
        {'w': tensor([-0.2500,  0.7500])}
    """
    info, grads = value_and_jd_step(
        model_fn,
        params,
        batch,
        buffers=buffers,
        weighting=weighting,
        batch_dim=batch_dim,
        linearize=linearize,
        metric=metric,
        has_aux=has_aux,
        on_nonfinite=on_nonfinite,
        loss_scale=loss_scale,
    )
    if pytrees.leaves(info.state):
        raise ValueError(
            "expected a weighting without state, a function gramian -> weights; carry the state of "
            "this one with value_and_jd_step(..., weighting=..., state=info.state)"
        )
    return (grads, info.aux) if has_aux else grads


def value_and_jd_step(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    *,
    buffers: Buffers | None = None,
    weighting: Any = upgrad,
    state: State | None = None,
    batch_dim: Any = None,
    linearize: Linearize = structured,
    metric: Metric | None = None,
    has_aux: bool = False,
    on_nonfinite: OnNonfinite = "propagate",
    loss_scale: float | Tensor | None = None,
) -> tuple[JDInfo, Params]:
    """`jd_step`, with all that it computed on the way.

    Args:
        model_fn: pure function ``(params, buffers, batch) -> losses``, losses of any shape [*rows].
        params: pytree of floating-point tensors, where J is taken. Never modified.
        batch: handed to ``model_fn``.
        buffers: handed to ``model_fn``; an empty dict if None.
        weighting: ``gramian [m, m] -> weights [m]``; a `Weighting`, which may carry a state; a
            method of the losses alone (`scalarized`), of the rows (`aggregated`, `excess_mtl`), of
            averaged rows (`on_rows`), or of one Gramian for each group of parameters (`grouped`).
        state: the state of the weighting, ``info.state`` of the step before; started anew if None.
        batch_dim: as in `jd_step`.
        linearize: as in `jd_step`.
        metric: as in `jd_step`.
        has_aux: ``model_fn`` returns ``(losses, aux)``.
        on_nonfinite: as in `jd_step`.
        loss_scale: as in `jd_step`.

    Returns:
        ``(info, direction)``: `JDInfo` (losses, gramian, weights, state, aux), and a pytree like
        ``params``.

    Raises:
        ValueError: params are not floating point, the losses depend on none of them, examples are
            coupled where ``batch_dim`` is given, a value is not finite and ``on_nonfinite`` is
            "raise", or ``loss_scale`` is not one positive number.
        TypeError: ``model_fn``, ``weighting``, ``linearize`` or ``metric`` is no function, the
            losses are not a tensor, or ``loss_scale`` is no number.

    Example:
        >>> def model_fn(params, buffers, batch):
        ...     return (params["w"] - batch).square()
        >>> info, grads = value_and_jd_step(
        ...     model_fn, {"w": torch.tensor([1.0])}, torch.tensor([0.0, 3.0])
        ... )
        >>> info.losses, info.gramian
        (tensor([1., 4.]), tensor([[ 4., -8.],
                [-8., 16.]]))
    """
    if on_nonfinite not in ("propagate", "raise"):
        raise ValueError(f'expected on_nonfinite "propagate" or "raise", got {on_nonfinite!r}')
    if not callable(linearize):
        raise TypeError(
            f"expected linearize to be a function such as jdfunc.structured, got {linearize!r}"
        )
    metric = _prepared(metric)
    rule = as_rule(weighting)
    if loss_scale is not None:
        linearize = scaled(linearize, loss_scale)
    lin = linearize(model_fn, params, batch, buffers=buffers, batch_dim=batch_dim, has_aux=has_aux)
    found = rule.update(lin, state, metric)
    if loss_scale is not None:  # methods that read rows found them in float32
        direction = pytrees.map(lambda g, p: g.to(p.dtype), found.direction, params)
        found = found._replace(direction=direction)
    if on_nonfinite == "raise":
        _check_finite(lin.losses, found.direction if found.gramian is None else found.gramian)
    info = JDInfo(lin.losses, found.gramian, found.weights, found.state, lin.aux)
    return info, found.direction


def gramian(
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    *,
    buffers: Buffers | None = None,
    batch_dim: Any = None,
    linearize: Linearize = structured,
    metric: Metric | None = None,
    loss_scale: float | Tensor | None = None,
) -> Tensor:
    """Gramian of the losses, G = J F⁻¹ Jᵀ.

    Args:
        model_fn: pure function ``(params, buffers, batch) -> losses``, losses of any shape [*rows].
        params: pytree of floating-point tensors, where J is taken.
        batch: handed to ``model_fn``.
        buffers: handed to ``model_fn``; an empty dict if None.
        batch_dim: as in `jd_step`.
        linearize: how J is held: `structured`, `dense`, `matrix_free`, `sketched(rank, key)`.
        metric: F⁻¹ as a function of a pytree like the params; the identity if None.
        loss_scale: as in `jd_step`.

    Returns:
        G, shape [*rows, *reversed(rows)]: [m, m] for a vector of losses. Float32 at least. Units
        loss²/param².

    Raises:
        ValueError: as in `value_and_jd_step`.
        TypeError: as in `value_and_jd_step`.

    Example:
        >>> def model_fn(params, buffers, batch):
        ...     return batch @ params["w"]
        >>> X = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> gramian(model_fn, {"w": torch.zeros(2)}, X, batch_dim=0)
        tensor([[5., 2.],
                [2., 1.]])
    """
    metric = _prepared(metric)
    if loss_scale is not None:
        linearize = scaled(linearize, loss_scale)
    lin = linearize(model_fn, params, batch, buffers=buffers, batch_dim=batch_dim)
    return lin.gram() if metric is None else lin.gram(metric)


def nonfinite_rows(info: JDInfo) -> Tensor:
    """Tell which losses, or their gradients, hold NaN or inf: to skip a step, or name a task.

    Read from the losses and the diagonal of the Gramian, so that nothing passes over J and nothing
    waits for the device. A gradient whose squared norm overflows the dtype of the Gramian counts.

    Where several losses are pulled back from one run (``batch_dim=None``), a NaN in the forward
    pass, or an infinite derivative, makes rows of other losses NaN too, as 0 · NaN is NaN: those
    are named as well, and ``info.losses`` tells where it began. A gradient that overflows on its
    way down, as in float16, leaves the other rows as they are.

    Args:
        info: what `value_and_jd_step` reported.

    Returns:
        bool [*rows], on the device of the losses.

    Raises:
        ValueError: the weighting needed no Gramian, so none was computed.

    Example:
        >>> def model_fn(params, buffers, batch):
        ...     return batch * params["w"]
        >>> params, batch = {"w": torch.tensor([1.0])}, torch.tensor([1.0, torch.inf, 2.0])
        >>> info, grads = value_and_jd_step(model_fn, params, batch, batch_dim=0)
        >>> nonfinite_rows(info)
        tensor([False,  True, False])
    """
    grams = list(info.gramian.values()) if isinstance(info.gramian, dict) else [info.gramian]
    if any(g is None for g in grams):
        raise ValueError(
            "expected a step that computed a Gramian, got None: its method reads losses or rows "
            "alone; look at info.losses and at the direction"
        )
    bad, k = ~torch.isfinite(info.losses), info.losses.ndim
    for g in grams:
        square = g.permute((*range(k), *range(2 * k - 1, k - 1, -1)))  # [*rows, *rows]
        own = square.reshape(bad.numel(), bad.numel()).diagonal()
        bad = bad | ~torch.isfinite(own).reshape(bad.shape)
    return bad


def _prepared(metric: Any) -> Metric | None:
    """Return the metric; of a curvature its inverse, whose eigenvalues are then found once."""
    if metric is not None and not callable(metric):
        raise TypeError(
            "expected metric to be a function, F⁻¹ of a pytree like the params, or a curvature, "
            f"got {type(metric).__name__}; of an estimator's state, est.finalize(state) makes one"
        )
    inverse = getattr(metric, "inverse", None)
    return metric if inverse is None else inverse()


def _check_finite(losses: Tensor, gradients: Any) -> None:
    bad = (~torch.isfinite(losses)).nonzero().tolist()
    if bad:
        raise ValueError(f"expected finite losses, got NaN or inf at {bad[:5]} of {len(bad)}")
    if not all(bool(torch.isfinite(leaf).all()) for leaf in pytrees.leaves(gradients)):
        raise ValueError("expected finite gradients, got NaN or inf in the Gramian of the losses")

"""The aliases, protocols and result types that cross folders. No code."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor

# Pytrees: nested dicts, lists, tuples and NamedTuples.
Params = Any  # of floating-point tensors
Buffers = Any  # of tensors
Batch = Any  # of tensors, and whatever else the model reads
Rows = Any  # like Params; leaves [*rows, *param.shape], or factored
State = Any  # of tensors

#: ``(params, buffers, batch) -> losses [*rows]``, or ``(losses, aux)`` where ``has_aux=True``.
ModelFn = Callable[[Params, Buffers, Batch], Any]

#: ``v -> F⁻¹ v`` on a pytree like the params, F symmetric positive definite.
Metric = Callable[[Params], Params]


class RowMetric(Protocol):
    """A metric that knows how to multiply rows, factored ones too: ``gram`` is J₁ F⁻¹ J₂ᵀ."""

    def __call__(self, tree: Params, /) -> Params:
        """F⁻¹ of a pytree like the params."""
        ...

    def gram(
        self, rows: Rows, other: Rows | None = None, *, row_ndim: int, max_block_bytes: int
    ) -> Tensor:
        """As `jdfunc.gram` without a metric."""
        ...


class Linearization(NamedTuple):
    """A model linearised at its params: the losses and their Jacobian J.

    Attributes:
        losses: the losses, shape [*rows].
        gram: ``gram()`` is the Gramian J Jᵀ, [*rows, *reversed(rows)], and ``gram(metric)`` is
            J F⁻¹ Jᵀ; computed when called.
        combine: ``combine(weights)`` is Jᵀ w, a pytree like the params, for weights [*rows].
        rows: J as a pytree like the params whose leaves are rows, dense or factored; None where
            the linearization holds no rows.
        aux: what the model returned beside its losses; ``()`` if nothing.
    """

    losses: Float[Tensor, "*rows"]
    gram: Callable[..., Tensor]
    combine: Callable[[Tensor], Params]
    rows: Rows | None
    aux: Any = ()


class RowUpdate(Protocol):
    """One step of a method that reads rows: pure."""

    def __call__(
        self, rows: Rows, state: State, *, losses: Tensor | None = None
    ) -> tuple[Any, State]:
        """What the rows give, and the next state."""
        ...


class RowTransform(NamedTuple):
    """Two pure functions from rows to rows, with a state: averages of gradients over steps.

    Attributes:
        init: ``init(rows) -> state``.
        update: ``update(rows, state, *, losses=None) -> (rows, state)``.
    """

    init: Callable[[Rows], State]
    update: RowUpdate


class JacobianWeighting(NamedTuple):
    """Two pure functions from rows to weights, with a state: for what no Gramian tells.

    Attributes:
        init: ``init(rows) -> state``.
        update: ``update(rows, state, *, losses=None) -> (weights, state)``.
    """

    init: Callable[[Rows], State]
    update: RowUpdate


class Linearize(Protocol):
    """How the Jacobian is held: ``structured``, ``dense``, or a function of the same form."""

    def __call__(
        self,
        model_fn: ModelFn,
        params: Params,
        batch: Batch,
        *,
        buffers: Buffers | None = None,
        batch_dim: Any = None,
        has_aux: bool = False,
    ) -> Linearization:
        """Linearise ``model_fn`` at ``params``."""
        ...


class JDInfo(NamedTuple):
    """What a step reports: nothing here is needed to go on but ``state``.

    Attributes:
        losses: [*rows].
        gramian: J F⁻¹ Jᵀ, [*rows, *reversed(rows)]; None where the weighting needed none; a dict
            of them for `grouped`.
        weights: [*rows]; None for an aggregator, whose direction is no combination of the rows.
        state: the weighting's next state; ``()`` for a stateless weighting.
        aux: what the model returned beside its losses; ``()`` if nothing.
    """

    losses: Float[Tensor, "*rows"]
    gramian: Any
    weights: Any
    state: State
    aux: Any

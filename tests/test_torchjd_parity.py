"""jd_step equals torchjd 0.18.0, its autojac and its autogram engine, with the parity options."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jdfunc as jd

aggregation = pytest.importorskip("torchjd.aggregation")
from torchjd.autogram import Engine  # noqa: E402
from torchjd.autojac import backward, jac_to_grad  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, 6)
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        scores = self.query(x) @ self.key(x).mT / 6**0.5
        return self.head(self.norm(x + scores.softmax(-1) @ self.value(x)).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 3))


def _conv_batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    )


class Setup(NamedTuple):
    """A model, the shape of one input, and the batch_dims its instance-wise losses allow."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_dims: tuple[int | None, ...]


SETUPS = {
    "mlp": Setup(_mlp, (5,), (0, None)),
    "conv_batch_norm": Setup(_conv_batch_norm, (1, 6, 5), (None,)),
    "attention": Setup(_Attention, (4, 5), (0, None)),
}


def instance_losses(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def task_losses(logits: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, y, reduction="none")
    return torch.stack([loss.mean(), (1 - loss).square().mean(), logits[:, 0].mean()])


def constant_weights(m: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(-0.5, 2, m, dtype=dtype)


# name -> (m, dtype) -> (jdfunc weighting, torchjd aggregator, torchjd weighting)
PARITY: dict[str, Callable[[int, torch.dtype], tuple[Any, Any, Any]]] = {
    "upgrad": lambda m, dtype: (
        partial(jd.upgrad, norm_eps=1e-4, reg_eps=1e-4),
        aggregation.UPGrad(),
        aggregation.UPGradWeighting(),
    ),
    "upgrad_preference": lambda m, dtype: (
        partial(jd.upgrad, preference=_preference(m, dtype), norm_eps=1e-4, reg_eps=1e-4),
        aggregation.UPGrad(_preference(m, dtype)),
        aggregation.UPGradWeighting(_preference(m, dtype)),
    ),
    "dualproj": lambda m, dtype: (
        partial(jd.dualproj, norm_eps=1e-4, reg_eps=1e-4),
        aggregation.DualProj(),
        aggregation.DualProjWeighting(),
    ),
    "mean": lambda m, dtype: (jd.mean, aggregation.Mean(), aggregation.MeanWeighting()),
    "sum": lambda m, dtype: (jd.weightings.sum, aggregation.Sum(), aggregation.SumWeighting()),
    "constant": lambda m, dtype: (
        partial(jd.constant, weights=constant_weights(m, dtype)),
        aggregation.Constant(constant_weights(m, dtype)),
        aggregation.ConstantWeighting(constant_weights(m, dtype)),
    ),
}


def _preference(m: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(1, m + 1, dtype=dtype) / m


def _problem(setup: Setup, losses: Any, dtype: torch.dtype, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = setup.make().to(dtype)
        x, y = torch.randn(7, *setup.shape, dtype=dtype), torch.randint(0, 3, (7,))
    apply_fn, params, buffers = jd.model_to_function(model)

    def model_fn(params: Any, buffers: Any, batch: Any) -> Tensor:
        logits, _ = apply_fn(params, buffers, batch[0])
        return losses(logits, batch[1])

    return model, model_fn, params, buffers, (x, y)


def _grads(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in model.named_parameters()}


def by_autojac(model: nn.Module, losses: Tensor, aggregator: Any) -> dict[str, Tensor]:
    backward(losses)
    jac_to_grad(model.parameters(), aggregator)
    return _grads(model)


def by_autogram(
    model: nn.Module, compute_losses: Callable[[], Tensor], weighting: Any, batch_dim: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    engine = Engine(model, batch_dim=batch_dim)
    losses = compute_losses()
    gramian = engine.compute_gramian(losses)
    losses.backward(weighting(gramian))
    return gramian, _grads(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("weighting", PARITY)
@pytest.mark.parametrize("kind", ["instance", "task"])
@pytest.mark.parametrize("setup", SETUPS)
def test_autojac(setup: str, kind: str, weighting: str, dtype: torch.dtype) -> None:
    losses = instance_losses if kind == "instance" else task_losses
    batch_dims = SETUPS[setup].batch_dims if kind == "instance" else (None,)
    model, model_fn, params, buffers, batch = _problem(SETUPS[setup], losses, dtype)
    ours, aggregator, _ = PARITY[weighting](7 if kind == "instance" else 3, dtype)
    wanted = by_autojac(model, losses(model(batch[0]), batch[1]), aggregator)
    for batch_dim in batch_dims:
        got = jd.jd_step(
            model_fn, params, batch, buffers=buffers, weighting=ours, batch_dim=batch_dim
        )
        oracles.assert_close(got, wanted, tolerance=TOLERANCE[dtype], what=f"{batch_dim}: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("weighting", ["upgrad", "dualproj"])
@pytest.mark.parametrize("setup", SETUPS)
def test_autogram(setup: str, weighting: str, dtype: torch.dtype) -> None:
    for batch_dim in SETUPS[setup].batch_dims:
        model, model_fn, params, buffers, batch = _problem(SETUPS[setup], instance_losses, dtype)
        ours, _, theirs = PARITY[weighting](7, dtype)
        gramian, wanted = by_autogram(
            model, lambda: instance_losses(model(batch[0]), batch[1]), theirs, batch_dim  # noqa: B023
        )  # fmt: skip
        info, got = jd.value_and_jd_step(
            model_fn, params, batch, buffers=buffers, weighting=ours, batch_dim=batch_dim
        )
        tolerance = TOLERANCE[dtype]
        oracles.assert_close(info.gramian, gramian, tolerance=tolerance, what="G")
        oracles.assert_close(info.weights, theirs(gramian), tolerance=10 * tolerance, what="w")
        oracles.assert_close(got, wanted, tolerance=tolerance, what="grads ")


@pytest.mark.parametrize("linearize", ["dense", "structured"])
@pytest.mark.parametrize("setup", SETUPS)
def test_both_linearizations(setup: str, linearize: str) -> None:
    losses = task_losses
    model, model_fn, params, buffers, batch = _problem(SETUPS[setup], losses, torch.float64)
    ours, aggregator, _ = PARITY["upgrad"](3, torch.float64)
    wanted = by_autojac(model, losses(model(batch[0]), batch[1]), aggregator)
    got = jd.jd_step(
        model_fn,
        params,
        batch,
        buffers=buffers,
        weighting=ours,
        linearize=getattr(jd, linearize),
    )
    oracles.assert_close(got, wanted)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("setup", SETUPS)
def test_mgda_is_where_frank_wolfe_is_going(setup: str, seed: int) -> None:
    """Ours is the converged point: optimal, no longer than theirs, and near it."""
    model, model_fn, params, buffers, batch = _problem(
        SETUPS[setup], task_losses, torch.float64, seed
    )
    info, grads = jd.value_and_jd_step(model_fn, params, batch, buffers=buffers, weighting=jd.mgda)
    theirs = aggregation.MGDAWeighting(epsilon=1e-9, max_iters=1000)(info.gramian)
    ours_norm = info.weights @ info.gramian @ info.weights
    theirs_norm = theirs @ info.gramian @ theirs
    assert ours_norm <= theirs_norm * (1 + 1e-12)
    assert ours_norm >= theirs_norm * (1 - 1e-2)
    slack = info.gramian @ info.weights - ours_norm  # KKT: no row is nearer to the origin
    assert slack.min() >= -1e-9 * info.gramian.diagonal().max()
    assert info.weights.min() >= 0
    assert abs(float(info.weights.sum()) - 1) < 1e-12
    total = sum(float(g.square().sum()) for g in grads.values())
    assert abs(total - float(ours_norm)) <= 1e-10 * max(total, 1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("setup", SETUPS)
def test_mgda_by_frank_wolfe(setup: str, seed: int) -> None:
    """The published, truncated algorithm, step for step."""
    from jdfunc.solvers import frank_wolfe

    model, model_fn, params, buffers, batch = _problem(
        SETUPS[setup], task_losses, torch.float64, seed
    )
    solver = partial(frank_wolfe, epsilon=1e-3, max_iters=100)
    ours = jd.jd_step(
        model_fn, params, batch, buffers=buffers, weighting=partial(jd.mgda, solver=solver)
    )
    wanted = by_autojac(
        model, task_losses(model(batch[0]), batch[1]), aggregation.MGDA(epsilon=1e-3, max_iters=100)
    )
    oracles.assert_close(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_five_steps_of_training(dtype: torch.dtype) -> None:
    """Through an optimiser: trajectories stay together, BatchNorm statistics included."""
    setup = SETUPS["conv_batch_norm"]
    theirs, _, _, _, (x, y) = _problem(setup, task_losses, dtype)
    ours, _, _, _, _ = _problem(setup, task_losses, dtype)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (theirs, ours)]
    weighting, aggregator, _ = PARITY["upgrad"](3, dtype)
    for _ in range(5):
        optimisers[0].zero_grad()
        by_autojac(theirs, task_losses(theirs(x), y), aggregator)
        optimisers[0].step()

        apply_fn, params, buffers = jd.model_to_function(ours)

        def model_fn(params: Any, buffers: Any, batch: Any) -> Any:
            logits, new_buffers = apply_fn(params, buffers, batch[0])  # noqa: B023
            return task_losses(logits, batch[1]), new_buffers

        grads, new_buffers = jd.jd_step(
            model_fn, params, (x, y), buffers=buffers, weighting=weighting, has_aux=True
        )
        jd.assign_grads(ours, grads)
        optimisers[1].step()
        for name, buffer in ours.named_buffers():
            buffer.copy_(new_buffers[name])
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
        oracles.assert_close(b, a, tolerance=tolerance)

"""Steps and weightings under torch.vmap: every member of a batch is what a loop gives."""

from __future__ import annotations

from functools import partial
from typing import Any

import oracles
import pytest
import torch
from subjects import batch_of, examples, examples_and_tasks, subject, tasks
from torch import Tensor
from torch.utils import _pytree as pytree

import jdfunc as jd
from jdfunc.linearizations import matrix_free

F64 = torch.float64
LINEARIZE = {"structured": jd.structured, "dense": jd.dense, "matrix_free": matrix_free}
LOSSES = {"tasks": (tasks, None), "examples": (examples, 0), "both": (examples_and_tasks, 0)}
linearizations = pytest.mark.parametrize("linearize", LINEARIZE)


def at(tree: Any, k: int) -> Any:
    return pytree.tree_map(lambda x: x[k], tree)


def stacked(params: Any, members: int = 3) -> Any:
    generator = torch.Generator().manual_seed(7)
    return pytree.tree_map(
        lambda p: p + 0.1 * torch.randn(members, *p.shape, generator=generator, dtype=p.dtype),
        params,
    )


def step_of(model: str, losses: str, **options: Any) -> Any:
    found = subject(model, F64)
    make, batch_dim = LOSSES[losses]
    options = {"batch_dim": batch_dim, "has_aux": losses == "tasks", **options}
    return found, partial(jd.value_and_jd_step, make(found), **options)


@linearizations
@pytest.mark.parametrize(
    ("model", "losses"),
    [
        ("mlp", "both"),
        ("batch_norm", "tasks"),
        ("conv", "examples"),
        ("attention", "tasks"),
        ("attention", "examples"),
        ("embedding_norm", "tasks"),
        ("embedding_norm", "examples"),
    ],
)
def test_an_ensemble_with_all_that_is_reported(model: str, losses: str, linearize: str) -> None:
    """Losses, Gramians, weights, buffers and directions of stacked params and buffers."""
    weighting = jd.flattened(jd.upgrad)
    found, step = step_of(model, losses, linearize=LINEARIZE[linearize], weighting=weighting)
    batch, members = batch_of(found, 5), stacked(found.params)
    buffers = pytree.tree_map(lambda b: torch.stack([b, b + 1, b]), found.buffers)
    run = lambda p, b: step(p, batch, buffers=b)  # noqa: E731
    info, grads = torch.vmap(run)(members, buffers)
    for k in range(3):
        wanted, direction = run(at(members, k), at(buffers, k))
        oracles.assert_close(at(grads, k), direction, tolerance=1e-9)
        oracles.assert_close(info.gramian[k], wanted.gramian, tolerance=1e-11)
        oracles.assert_close(info.losses[k], wanted.losses, tolerance=1e-12)
        oracles.assert_close(info.weights[k], wanted.weights, tolerance=1e-9)
        if found.buffers:
            oracles.assert_close(at(info.aux, k), wanted.aux, tolerance=1e-12)


@linearizations
@pytest.mark.parametrize("method", ["upgrad", "dualproj", "aligned_mtl"])
def test_a_pareto_front_in_one_call(linearize: str, method: str) -> None:
    """A step of each of many preferences; J is linearised once, for all of them."""
    front = torch.linspace(0.1, 0.8, 4, dtype=F64)
    preferences = torch.stack([front, torch.full_like(front, 0.1), 0.9 - front], 1)

    found, step = step_of("mlp", "tasks", linearize=LINEARIZE[linearize])
    batch = batch_of(found, 5)

    def run(preference: Tensor) -> Any:
        weighting = partial(getattr(jd, method), preference=preference)
        info, grads = step(found.params, batch, weighting=weighting)
        return grads, info.weights

    grads, weights = torch.vmap(run)(preferences)
    assert torch.unique(weights, dim=0).shape[0] > 1
    for k, preference in enumerate(preferences):
        direction, wanted = run(preference)
        oracles.assert_close(at(grads, k), direction, tolerance=1e-9)
        oracles.assert_close(weights[k], wanted, tolerance=1e-9)


@linearizations
def test_params_and_preferences_in_two_nested_maps(linearize: str) -> None:
    preferences = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]], dtype=F64)
    found = subject("mlp", F64)
    batch, members = batch_of(found, 5), stacked(found.params, 2)

    def run(params: Any, preference: Tensor) -> Any:
        return jd.jd_step(
            tasks(found),
            params,
            batch,
            has_aux=True,
            linearize=LINEARIZE[linearize],
            weighting=partial(jd.upgrad, preference=preference),
        )[0]

    nested = torch.vmap(torch.vmap(run, in_dims=(None, 0)), in_dims=(0, None))
    grads = nested(members, preferences)
    for i in range(2):
        for k in range(2):
            wanted = run(at(members, i), preferences[k])
            oracles.assert_close(at(at(grads, i), k), wanted, tolerance=1e-9)


@linearizations
def test_batches_of_data(linearize: str) -> None:
    """One model on several batches, and the params of a chunked vmap."""
    found, step = step_of("conv", "examples", linearize=LINEARIZE[linearize])
    batches = [batch_of(found, 4), tuple(x.flip(0) for x in batch_of(found, 4))]
    both = pytree.tree_map(lambda *x: torch.stack(x), *batches)
    for chunk_size in (None, 1):
        run = torch.vmap(lambda b: step(found.params, b)[1], chunk_size=chunk_size)
        grads = run(both)
        for k, batch in enumerate(batches):
            oracles.assert_close(at(grads, k), step(found.params, batch)[1], tolerance=1e-9)


@linearizations
@pytest.mark.parametrize("kernel", [torch.nn.GRU, torch.nn.LSTM, torch.nn.RNN])
def test_recurrent_kernels(kernel: Any, linearize: str) -> None:
    """Taken apart in every run, in that of the guard as well, since torch cannot map them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kernel(3, 2, batch_first=True).double()
    params = {k: v.detach() for k, v in module.named_parameters()}
    x, members = torch.linspace(-1, 1, 36, dtype=F64).reshape(4, 3, 3), stacked(params)

    def model_fn(p: Any, b: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (x,))[0].square().sum((1, 2))

    for batch_dim in (None, 0):
        run = partial(
            jd.jd_step, model_fn, batch=x, batch_dim=batch_dim, linearize=LINEARIZE[linearize]
        )
        grads = torch.vmap(run)(members)
        for k in range(3):
            oracles.assert_close(at(grads, k), run(at(members, k)), tolerance=1e-9)


@pytest.mark.parametrize("weighting", [jd.moco(), jd.ema(jd.upgrad, 0.5)])
def test_states_of_an_ensemble(weighting: Any) -> None:
    """Stateful weightings carry one state for each member."""
    found, step = step_of("mlp", "tasks", weighting=weighting)
    batch, members = batch_of(found, 5), stacked(found.params)
    first = torch.vmap(lambda p: step(p, batch)[0].state)(members)
    second = torch.vmap(lambda p, s: step(p, batch, state=s))(members, first)
    for k in range(3):
        alone = step(at(members, k), batch)[0].state
        info, grads = step(at(members, k), batch, state=alone)
        oracles.assert_close(at(second[1], k), grads, tolerance=1e-9)
        oracles.assert_close(at(second[0].weights, k), info.weights, tolerance=1e-9)

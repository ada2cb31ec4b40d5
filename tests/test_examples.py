"""The example axis: which it is, examples alone and together, models it is not followed in."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jdfunc as jd
from jdfunc.examples import (
    batch_dims,
    for_each_example,
    losses_function,
    num_examples,
    select,
    warn_if_data_dependent,
)

F64 = torch.float64


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


class Pair(NamedTuple):
    """A batch."""

    x: Any
    y: Any


# --- batch_dims, num_examples, select ---------------------------------------------------------

A, B, C = torch.zeros(5, 4), torch.zeros(5), torch.zeros(4, 5)

BATCHES: list[tuple[Any, Any, list[Any]]] = [
    (A, 0, [0]),
    (C, 1, [1]),
    (C, -1, [-1]),
    ((A, B), 0, [0, 0]),
    ((C, B), -1, [-1, -1]),
    ({"b": B, "a": A}, 0, [0, 0]),
    (Pair(A, [B, (A,)]), 0, [0, 0, 0]),
    ((A, torch.tensor(2.0)), 0, [0, None]),  # a tensor without axes is shared
    ((A, 3.0, "mode", True), 0, [0, None, None, None]),  # as is what is no tensor
    ((A, C), (0, None), [0, None]),
    ((A, C), (0, 1), [0, 1]),
    ((A, [B, A]), (0, 0), [0, 0, 0]),  # a prefix
    ((C, [C, (C,)]), (None, 1), [None, 1, 1]),
    ({"b": C, "a": A}, {"a": 0, "b": -1}, [0, -1]),  # leaves in the order of sorted keys
    ({"b": C, "a": A}, {"a": 0, "b": None}, [0, None]),
    (Pair(A, {"u": C, "v": C}), Pair(0, None), [0, None, None]),
]


@pytest.mark.parametrize(("batch", "batch_dim", "dims"), BATCHES)
def test_batch_dims(batch: Any, batch_dim: Any, dims: list[Any]) -> None:
    assert batch_dims(batch, batch_dim) == dims
    assert num_examples(batch, batch_dim) == 5


@pytest.mark.parametrize(
    ("batch", "batch_dim", "error", "message"),
    [
        (A, 2, ValueError, r"got 2 for a tensor of shape \(5, 4\)"),
        (A, -3, ValueError, r"got -3 for a tensor of shape \(5, 4\)"),
        ((A, B), 1, ValueError, r"got 1 for a tensor of shape \(5,\)"),
        ((A, torch.zeros(())), (0, 0), ValueError, r"got 0 for a tensor of shape \(\)"),
        ((A, C), 0, ValueError, r"\[4, 5\]"),
        ((A, C), (None, None), ValueError, "no tensor with an example axis"),
        ([], 0, ValueError, "no tensor with an example axis"),
        ((A, 3.0), (0, 0), TypeError, "0 for a float"),
        (A, "0", TypeError, "'0'"),
        (A, 0.0, TypeError, r"0\.0"),
        (A, True, TypeError, "True"),
        ((A, B), (0, True), TypeError, "True"),
        ((A, B), (0,), ValueError, "pytree prefix"),
        ((A, B), [0, 0], ValueError, "pytree prefix"),
        ({"a": A}, {"b": 0}, ValueError, "pytree prefix"),
        (A, (0,), ValueError, "pytree prefix"),
    ],
)
def test_batch_dims_refused(batch: Any, batch_dim: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        batch_dims(batch, batch_dim)


def test_the_first_and_last_axis_are_axes() -> None:
    for dim in (-2, -1, 0, 1):
        assert batch_dims(A, dim) == [dim]


def test_select() -> None:
    x, shared, index = randn(5, 4), randn(5, 5), torch.tensor([3, 0, 3])
    batch = {"x": x, "t": x.T, "shared": shared, "flag": True}
    got = select(batch, {"x": 0, "t": -1, "shared": None, "flag": None}, index)
    assert torch.equal(got["x"], x[[3, 0, 3]])
    assert torch.equal(got["t"], x[[3, 0, 3]].T)
    assert got["shared"] is shared
    assert got["flag"] is True
    assert select((x, 1.5), 0, torch.tensor([4]))[1] == 1.5
    assert num_examples(select(x, 1, torch.tensor([2])), 1) == 1


# --- for_each_example -------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "shape"), [(0, (1, 4, 3)), (1, (4, 1, 3)), (-1, (4, 3, 1)), (-2, (4, 1, 3)), (-3, (1, 4, 3))])  # fmt: skip # noqa: E501
def test_each_example_is_a_batch_of_one(dim: int, shape: tuple[int, ...]) -> None:
    x = randn(*(5 if n == 1 else n for n in shape))
    seen = []

    def function(batch: Any) -> Any:
        seen.append(tuple(batch["x"].shape))
        assert batch["shared"] is shared
        assert batch["flag"] == "on"
        return batch["x"].squeeze(dim) * batch["shared"]

    shared = randn()
    dims = {"x": dim, "shared": None, "flag": None}
    got = for_each_example(function, {"x": x, "shared": shared, "flag": "on"}, dims)
    assert seen == [shape]  # one run of the function for all examples
    torch.testing.assert_close(got, x.movedim(dim, 0) * shared)


def test_random_draws_are_independent() -> None:
    got = for_each_example(lambda x: torch.rand(3), randn(4, 2), 0)
    assert got.shape == (4, 3)
    assert got.unique().numel() == 12


def test_losses_function() -> None:
    """Losses lose their axis of one example; aux that has none keeps its shape."""

    def model_fn(params: Any, buffers: Any, batch: Tensor) -> Any:
        return batch @ params, {"mean": batch.mean(1), "total": batch.sum(), "name": "x"}

    one, params = randn(1, 3), randn(3)
    for by_example, axis in ((True, ()), (False, (1,))):
        run, restore = losses_function(model_fn, {}, has_aux=True, by_example=by_example)
        losses, tensors = run(params, one)
        assert losses.shape == axis
        aux = restore(tensors)
        assert aux["mean"].shape == axis
        assert aux["total"].shape == ()
        assert aux["name"] == "x"


@pytest.mark.parametrize("losses", [lambda x: x.sum(), lambda x: x.sum(0), lambda x: x[:0, 0]])
def test_losses_function_refuses_losses_of_another_shape(losses: Any) -> None:
    run, _ = losses_function(lambda p, b, x: losses(x), {}, has_aux=False, by_example=True)
    with pytest.raises(ValueError, match="for a batch of one"):
        run({}, randn(1, 3))


# --- check_batch_independence -----------------------------------------------------------------


def linear(params: Any, buffers: Any, x: Tensor) -> Tensor:
    return F.linear(x, params["w"]).tanh()


PARAMS = {"w": torch.linspace(-1, 2, 12, dtype=F64).reshape(3, 4)}


def gradient_only(params: Any, buffers: Any, x: Tensor) -> Tensor:
    """Losses of one example each, whose gradients are coupled."""
    y = linear(params, buffers, x).sum(1)
    mean = y.mean()
    return y + (mean - mean.detach())


GOOD: dict[str, Any] = {
    "plain": lambda p, b, x: linear(p, b, x).sum(1),
    "per_task": lambda p, b, x: linear(p, b, x),
    "sequence_first": lambda p, b, x: linear(p, b, x.T.contiguous().T).sum(1),
    "folded": lambda p, b, x: linear(p, b, x.repeat(2, 1)).unflatten(0, (2, -1)).sum((0, 2)),
    "dropout": lambda p, b, x: F.dropout(linear(p, b, x), 0.5).sum(1),
    "dropout_twice": lambda p, b, x: F.alpha_dropout(F.dropout(linear(p, b, x), 0.3)).sum(1),
    "feature_dropout": lambda p, b, x: F.dropout1d(linear(p, b, x)[..., None], 0.5).sum((1, 2)),
    "constant": lambda p, b, x: 0 * linear(p, b, x).sum(1) + 3,
    "zero": lambda p, b, x: 0 * linear(p, b, x).sum(1),
    "detached": lambda p, b, x: linear(p, b, x).sum(1) * linear(p, b, x).sum(1).detach(),
    "nan_everywhere": lambda p, b, x: linear(p, b, x).sum(1) * torch.nan,
}
BAD: dict[str, Any] = {
    "minus_mean": lambda p, b, x: linear(p, b, x).sum(1) - linear(p, b, x).mean(),
    "softmax_over_the_batch": lambda p, b, x: linear(p, b, x).softmax(0).sum(1),
    "neighbour": lambda p, b, x: linear(p, b, x + x.roll(1, 0)).sum(1),
    "last_looks_at_first": lambda p, b, x: linear(p, b, torch.cat([x[:-1], x[-1:] + x[:1]])).sum(1),
    "one_task_of_three": lambda p, b, x: (
        linear(p, b, x) - linear(p, b, x).mean(0) * torch.eye(3)[2]
    ),  # noqa: E501
    "divided_by_the_batch": lambda p, b, x: linear(p, b, x).sum(1) / x.shape[0],
    "dropout_then_mean": lambda p, b, x: F.dropout(linear(p, b, x - x.mean(0))).sum(1),
    "nan_for_many": lambda p, b, x: linear(p, b, x).sum(1) * (torch.nan if x.shape[0] > 1 else 1),
}


@pytest.mark.parametrize("name", GOOD)
def test_independent(name: str) -> None:
    x = randn(6, 4)
    jd.check_batch_independence(GOOD[name], PARAMS, x)
    if name != "nan_everywhere":
        assert jd.gramian(GOOD[name], PARAMS, x, batch_dim=0).isfinite().all()


@pytest.mark.parametrize("name", BAD)
def test_coupled(name: str) -> None:
    x = randn(6, 4)
    with pytest.raises(ValueError, match="depend on one example each.* batch_dim"):
        jd.check_batch_independence(BAD[name], PARAMS, x)
    for linearize in (jd.structured, jd.dense):
        with pytest.raises(ValueError, match="depend on one example each.* batch_dim"):
            linearize(BAD[name], PARAMS, x, batch_dim=0)


def test_the_pair_is_named() -> None:
    """Every loss looks at the largest example of the batch, which is the fourth."""

    def model_fn(p: Any, b: Any, x: Tensor) -> Tensor:
        return linear(p, b, x).sum(1) + x.detach().sum(1).max()

    x = torch.tensor([[4.0], [3.0], [2.0], [5.0], [1.0]], dtype=F64).expand(5, 4)
    with pytest.raises(ValueError, match="loss of example 0 .*together with example 3;"):
        jd.check_batch_independence(model_fn, PARAMS, x)
    with pytest.raises(ValueError, match="loss of example 1 .*together with example 0;"):
        jd.check_batch_independence(model_fn, PARAMS, x[:3])


def test_coupling_without_a_pair() -> None:
    """Three are a crowd: no pair shows it."""

    def model_fn(p: Any, b: Any, x: Tensor) -> Tensor:
        y = linear(p, b, x).sum(1)
        return y + y.mean() * (x.shape[0] > 2)

    with pytest.raises(ValueError, match="example 0 .*with the others"):
        jd.check_batch_independence(model_fn, PARAMS, randn(4, 4))


def test_coupled_gradients_of_equal_losses() -> None:
    with pytest.raises(ValueError, match="gradients of the 6 examples .*differ, though losses"):
        jd.check_batch_independence(gradient_only, PARAMS, randn(6, 4))


def test_random_models_cannot_be_compared() -> None:
    """Noise that is no dropout: two runs together differ, so nothing is said."""

    def noisy(p: Any, b: Any, x: Tensor) -> Tensor:
        return linear(p, b, x + torch.randn_like(x)).sum(1)

    jd.check_batch_independence(lambda p, b, x: noisy(p, b, x), PARAMS, randn(6, 4))
    assert jd.gramian(noisy, PARAMS, randn(6, 4), batch_dim=0).isfinite().all()


def test_dropout_in_a_module_is_left_out() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    apply_fn, params, buffers = jd.model_to_function(module)

    def model_fn(p: Any, b: Any, x: Tensor) -> Tensor:
        return apply_fn(p, b, x)[0].square().sum(1)

    def coupled(p: Any, b: Any, x: Tensor) -> Tensor:
        return model_fn(p, b, x - 0.1 * x.mean(0))

    x = randn(6, 4)
    jd.check_batch_independence(model_fn, params, x, buffers=buffers)
    with pytest.raises(ValueError, match="one example each"):
        jd.check_batch_independence(coupled, params, x, buffers=buffers)


def test_an_infinite_loss_hides_no_coupling() -> None:
    def model_fn(p: Any, b: Any, x: Tensor) -> Tensor:
        y = linear(p, b, x).sum(1)
        return torch.where(x[:, 0] > 9, torch.inf, y - 0.5 * y.mean())

    x = randn(6, 4)
    x[3, 0] = 10.0
    with pytest.raises(ValueError, match="the loss of example 0"):
        jd.check_batch_independence(model_fn, PARAMS, x)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_tolerance_is_relative(scale: float) -> None:
    """Coupling of 1e-6 of the loss is seen in float64 at every scale; 1e-9 is rounding."""

    def model_fn(strength: float) -> Any:
        def losses(p: Any, b: Any, x: Tensor) -> Tensor:
            y = (1.5 + linear(p, b, x).mean(1)) * scale
            return y + strength * scale * (x.shape[0] > 1)

        return losses

    jd.check_batch_independence(model_fn(1e-9), PARAMS, randn(6, 4))
    with pytest.raises(ValueError, match="one example each"):
        jd.check_batch_independence(model_fn(1e-6), PARAMS, randn(6, 4))


def test_shared_and_transposed_batches() -> None:
    def model_fn(p: Any, b: Any, batch: Any) -> Tensor:
        return (linear(p, b, batch["x"].T) * batch["shared"]).sum(1)

    batch = {"x": randn(4, 6), "shared": randn(3), "mode": "on"}
    dims = {"x": 1, "shared": None, "mode": None}
    jd.check_batch_independence(model_fn, PARAMS, batch, batch_dim=dims)
    got = jd.gramian(model_fn, PARAMS, batch, batch_dim=dims)
    oracles.assert_close(got, oracles.gramian(model_fn, PARAMS, {}, batch))


def test_aux_and_buffers_and_no_params() -> None:
    def model_fn(p: Any, b: Any, x: Tensor) -> Any:
        return linear(p, {}, x).sum(1) * b["scale"], {"x": x}

    buffers = {"scale": torch.tensor(2.0)}
    jd.check_batch_independence(model_fn, PARAMS, randn(4, 4), buffers=buffers, has_aux=True)
    jd.check_batch_independence(lambda p, b, x: x.sum(1), {}, randn(4, 4))
    with pytest.raises(ValueError, match="one example each"):
        jd.check_batch_independence(lambda p, b, x: x.sum(1) - x.mean(), {}, randn(4, 4))
    jd.check_batch_independence(BAD["minus_mean"], PARAMS, randn(0, 4))
    jd.check_batch_independence(GOOD["plain"], PARAMS, randn(1, 4))


def test_the_check_of_something_else() -> None:
    with pytest.raises(TypeError, match="model_fn"):
        jd.check_batch_independence(None, PARAMS, randn(4, 4))
    with pytest.raises(TypeError, match="tensor of losses"):
        jd.check_batch_independence(lambda p, b, x: [x], PARAMS, randn(4, 4))
    with pytest.raises(ValueError, match="one entry per example"):
        jd.check_batch_independence(lambda p, b, x: linear(p, b, x).sum(), PARAMS, randn(4, 4))


# --- the guard of every step ------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 7, 8, 9, 40, 100])
def test_the_guard_looks_at_examples_evenly_spaced(size: int) -> None:
    """Eight at least, an eighth of them, the first and the last among them."""
    seen: list[Tensor] = []

    def model_fn(p: Any, b: Any, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            seen.append(x[:, 0].detach().clone())
        return linear(p, b, x).sum(1)

    x = torch.arange(size, dtype=F64)[:, None].expand(size, 4)
    jd.structured(model_fn, PARAMS, x, batch_dim=0)
    (chosen,) = seen
    count = min(size, max(8, size // 8))
    assert chosen.numel() == count
    assert chosen[0] == 0
    assert chosen[-1] == size - 1
    gaps = chosen.diff()
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_the_guard_does_not_run_for_one_example() -> None:
    lin = jd.structured(BAD["minus_mean"], PARAMS, randn(1, 4), batch_dim=0)
    assert lin.losses.shape == (1,)


def test_the_guard_makes_nan_where_values_cannot_be_read() -> None:
    """Under an outer vmap, coupled examples give NaN in losses, Gramian and direction."""
    stacked = {"w": torch.stack([PARAMS["w"], 2 * PARAMS["w"]])}
    x = randn(5, 4)

    def run(model_fn: Any) -> Any:
        def one(params: Any) -> Any:
            info, grads = jd.value_and_jd_step(model_fn, params, x, batch_dim=0, weighting=jd.mean)
            lin = jd.structured(model_fn, params, x, batch_dim=0)
            combined = lin.combine(torch.ones(5, dtype=F64))["w"]
            return info.losses, info.gramian, grads["w"], combined

        return torch.vmap(one)(stacked)

    assert all(t.isnan().all() for t in run(BAD["minus_mean"]))
    for got, k in zip(run(GOOD["plain"]), range(4), strict=True):
        assert got.isfinite().all(), k


# --- models that branch on values -------------------------------------------------------------


def branching(p: Any, b: Any, x: Tensor) -> Tensor:
    y = linear(p, b, x)
    y = y.sin() if x.sum() > 0 else y.exp()
    return y.square().sum(1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("linearize", [jd.structured, jd.dense])
def test_a_branch_on_values_is_exact_and_warned_of(linearize: Any, sign: float) -> None:
    x = sign * randn(5, 4).abs()
    with pytest.warns(UserWarning, match="branches on the values.*batch_dim=None"):
        lin = linearize(branching, PARAMS, x, batch_dim=0)
    oracles.assert_close(lin.gram(), oracles.gramian(branching, PARAMS, {}, x))
    assert torch.equal(lin.losses, branching(PARAMS, {}, x))
    with pytest.warns(UserWarning, match="branches on the values"):
        got = jd.gramian(branching, PARAMS, x, batch_dim=0, linearize=linearize)
    oracles.assert_close(got, oracles.gramian(branching, PARAMS, {}, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linearize(branching, PARAMS, x)


@pytest.mark.parametrize("linearize", [jd.structured, jd.dense])
def test_the_options_survive_the_way_back(linearize: Any) -> None:
    """Buffers, aux and chunks are handed on."""

    def model_fn(p: Any, b: Any, x: Tensor) -> Any:
        losses = branching(p, b, x) * b["scale"]
        return losses, {"twice": 2 * losses}

    x, buffers = randn(5, 4), {"scale": torch.tensor(3.0)}
    with pytest.warns(UserWarning, match="branches"):
        lin = linearize(
            model_fn, PARAMS, x, batch_dim=0, buffers=buffers, has_aux=True, chunk_size=2
        )
    torch.testing.assert_close(lin.aux["twice"], 2 * lin.losses)
    wanted = oracles.gramian(lambda p, b, x: model_fn(p, b, x)[0], PARAMS, buffers, x)
    oracles.assert_close(lin.gram(), wanted)


@pytest.mark.parametrize("linearize", [jd.structured, jd.dense])
def test_other_errors_of_a_model_are_not_swallowed(linearize: Any) -> None:
    def broken(p: Any, b: Any, x: Tensor) -> Tensor:
        return F.linear(x, p["w"].T).sum(1)

    with pytest.raises(RuntimeError, match=r"(?i)shape|size"):
        linearize(broken, PARAMS, randn(5, 4), batch_dim=0)


def test_warn_if_data_dependent() -> None:
    error = RuntimeError("another error")
    with pytest.raises(RuntimeError, match="another error") as caught:
        warn_if_data_dependent(error)
    assert caught.value is error
    with pytest.warns(UserWarning, match="branches on the values"):
        warn_if_data_dependent(RuntimeError("vmap: It looks like you're calling .item()"))

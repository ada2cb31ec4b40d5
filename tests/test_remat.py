"""A rematerialised block is the block: values, derivatives and rows, with less kept on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import jdfunc as jd

F64 = torch.float64
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class Model(NamedTuple):
    """One architecture: `fn(wrap)` is its model_fn with every block wrapped."""

    fn: Callable[[Wrap], Callable[..., Tensor]]
    params: Any
    batch: Any


def mlp() -> Model:
    """Residual blocks between plain layers: params both inside and outside of remat."""

    def block(p: Any, x: Tensor) -> Tensor:
        return x + F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["v"])

    def fn(wrap: Wrap) -> Any:
        inner = wrap(block)

        def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
            x = F.linear(x, params["stem"])
            for p in params["blocks"]:
                x = inner(p, x)
            return F.linear(x, params["head"]).square().sum(1)

        return model_fn

    blocks = [{"w": randn(7, 5), "b": randn(7), "v": randn(5, 7) / 3} for _ in range(2)]
    return Model(fn, {"stem": randn(5, 4), "blocks": blocks, "head": randn(3, 5)}, randn(3, 4))


def conv() -> Model:
    """A parameter with a use inside and a use outside of remat."""

    def block(w: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1).sigmoid()

    def fn(wrap: Wrap) -> Any:
        inner = wrap(block)

        def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
            x = F.conv2d(inner(params["w"], x), params["w"]).tanh()
            return F.linear(x.flatten(1), params["head"]).sin().sum(1)

        return model_fn

    return Model(fn, {"w": randn(2, 2, 3, 3), "head": randn(3, 12)}, randn(3, 2, 4, 5))


def tokens() -> Model:
    """Integers go in; a nested pytree of params, a tuple comes out."""

    def block(p: Any, index: Tensor, options: Any) -> tuple[Tensor, Tensor]:
        x = F.embedding(index, p["table"]) * options["scale"]
        return F.layer_norm(x, (5,), *p["norm"]).tanh(), x.mean(-1)

    def fn(wrap: Wrap) -> Any:
        inner = wrap(block)

        def model_fn(params: Any, buffers: Any, batch: Any) -> Tensor:
            index, target = batch["index"], batch["target"]
            x, mean = inner(params["in"], index, {"scale": 2.0, "flag": None})
            logits = x @ params["out"]
            losses = F.cross_entropy(logits.mT, target, reduction="none")
            return losses.mean(1) + mean.square().sum(1)

        return model_fn

    params = {"in": {"table": randn(7, 5), "norm": (randn(5), randn(5))}, "out": randn(5, 7)}
    index, target = torch.randint(0, 7, (3, 4)), torch.randint(0, 7, (3, 4))
    return Model(fn, params, {"index": index, "target": target})


def nested() -> Model:
    """A rematerialised block inside another."""

    def fn(wrap: Wrap) -> Any:
        inner = wrap(lambda w, x: F.linear(x, w).tanh())
        outer = wrap(lambda p, x: inner(p["b"], inner(p["a"], x)) + x)

        def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
            return outer(params, x).square().sum(1)

        return model_fn

    return Model(fn, {"a": randn(5, 4), "b": randn(4, 5)}, randn(3, 4))


MODELS = {"mlp": mlp, "conv": conv, "tokens": tokens, "nested": nested}
models = pytest.mark.parametrize("name", MODELS)


@models
def test_values_and_gradients(name: str) -> None:
    model = MODELS[name]()
    one, two = model.fn(jd.remat), model.fn(plain)
    losses = two(model.params, {}, model.batch)
    assert torch.equal(one(model.params, {}, model.batch), losses)
    weights = torch.linspace(0.5, 2, losses.numel(), dtype=F64)
    got, wanted = (
        torch.func.grad(lambda p, fn=fn: fn(p, {}, model.batch) @ weights)(model.params)
        for fn in (one, two)
    )
    oracles.assert_close(got, wanted, tolerance=1e-12)


@models
def test_plain_autograd(name: str) -> None:
    model = MODELS[name]()
    got = oracles.jacobian_rows(model.fn(jd.remat), model.params, {}, model.batch)
    wanted = oracles.jacobian_rows(model.fn(plain), model.params, {}, model.batch)
    oracles.assert_close(got, wanted, tolerance=1e-12)


@models
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(name: str, transform: Any) -> None:
    model = MODELS[name]()
    wanted = torch.func.jacrev(lambda p: model.fn(plain)(p, {}, model.batch))(model.params)
    if transform is torch.func.jacfwd:  # autograd.Function without a jvp: refused, never wrong
        with pytest.raises(RuntimeError, match=r"(?i)jvp|forward"):
            transform(lambda p: model.fn(jd.remat)(p, {}, model.batch))(model.params)
        return
    got = transform(lambda p: model.fn(jd.remat)(p, {}, model.batch))(model.params)
    oracles.assert_close(got, wanted, tolerance=1e-12)


@models
def test_vmap_of_grad(name: str) -> None:
    """Per-example gradients, the params shared and then stacked."""
    model = MODELS[name]()

    def per_example(wrap: Wrap, in_dims: Any, params: Any) -> Any:
        fn = model.fn(wrap)

        def loss(params: Any, example: Any) -> Tensor:
            one = pytree.tree_map(lambda v: v[None], example)
            return fn(params, {}, one).sum()

        return torch.vmap(torch.func.grad(loss), in_dims=in_dims)(params, model.batch)

    stacked = pytree.tree_map(lambda p: torch.stack([p, 2 * p, -p]), model.params)
    for in_dims, params in (((None, 0), model.params), ((0, 0), stacked)):
        got, wanted = (per_example(wrap, in_dims, params) for wrap in (jd.remat, plain))
        oracles.assert_close(got, wanted, tolerance=1e-12)


@models
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("linearize", [jd.structured, jd.dense])
def test_linearizations(name: str, linearize: Any, batch_dim: Any) -> None:
    model = MODELS[name]()
    wanted = oracles.jacobian_rows(model.fn(plain), model.params, {}, model.batch)
    lin = linearize(model.fn(jd.remat), model.params, model.batch, batch_dim=batch_dim)
    m = lin.losses.shape
    oracles.assert_close(jd.to_dense(lin.rows), wanted, tolerance=1e-12)
    oracles.assert_close(lin.gram(), oracles.cross_gramian(wanted, wanted, m, m), tolerance=1e-12)
    weights = torch.linspace(0.5, 2, 3, dtype=F64)
    oracles.assert_close(
        lin.combine(weights), oracles.combine_rows(wanted, weights), tolerance=1e-12
    )


@models
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("linearize", [jd.structured, jd.dense])
def test_losses_per_example_and_task(name: str, linearize: Any, batch_dim: Any) -> None:
    """[B, K] losses: pullbacks under vmap, under the vmap of examples."""
    model = MODELS[name]()

    def two_losses(wrap: Wrap) -> Any:
        fn = model.fn(wrap)
        return lambda p, b, x: torch.stack([fn(p, b, x), fn(p, b, x).sin()], 1)

    wanted = oracles.jacobian_rows(two_losses(plain), model.params, {}, model.batch)
    lin = linearize(two_losses(jd.remat), model.params, model.batch, batch_dim=batch_dim)
    oracles.assert_close(jd.to_dense(lin.rows), wanted, tolerance=1e-12)


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks(batch_dim: Any, chunk_size: int) -> None:
    model = mlp()
    wanted = oracles.jacobian_rows(model.fn(plain), model.params, {}, model.batch)
    lin = jd.structured(
        model.fn(jd.remat), model.params, model.batch, batch_dim=batch_dim, chunk_size=chunk_size
    )
    oracles.assert_close(jd.to_dense(lin.rows), wanted, tolerance=1e-12)


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_step_and_check(batch_dim: Any) -> None:
    model = mlp()
    got, wanted = (
        jd.jd_step(model.fn(wrap), model.params, model.batch, batch_dim=batch_dim)
        for wrap in (jd.remat, plain)
    )
    oracles.assert_close(got, wanted, tolerance=1e-10)
    jd.check_batch_independence(model.fn(jd.remat), model.params, model.batch)


def test_coupled_examples_inside_are_refused() -> None:
    block = jd.remat(lambda w, x: F.linear(x - x.mean(0), w).tanh())
    with pytest.raises(ValueError, match="depend on one example"):
        jd.gramian(
            lambda p, b, x: block(p, x).square().sum(1), randn(3, 4), randn(5, 4), batch_dim=0
        )


@models
def test_gradients_of_gradients(name: str) -> None:
    """The gradient of a squared gradient norm."""
    model = MODELS[name]()

    def second(wrap: Wrap) -> Any:
        fn = model.fn(wrap)

        def penalty(params: Any) -> Tensor:
            grads = torch.func.grad(lambda p: fn(p, {}, model.batch).sum())(params)
            return sum((g.square().sum() for g in pytree.tree_leaves(grads)), torch.zeros(()))

        return torch.func.grad(penalty)(model.params)

    oracles.assert_close(second(jd.remat), second(plain), tolerance=1e-12)


@models
def test_differentiated_through_a_gramian(name: str) -> None:
    model = MODELS[name]()

    def trace(wrap: Wrap) -> Any:
        fn = model.fn(wrap)
        return torch.func.grad(lambda p: jd.gramian(fn, p, model.batch).diagonal().sum())(
            model.params
        )

    oracles.assert_close(trace(jd.remat), trace(plain), tolerance=1e-12)


# --- what it is for ---------------------------------------------------------------------------


def counting() -> tuple[list[int], Callable[..., Tensor]]:
    calls: list[int] = []

    def block(w: Tensor, x: Tensor) -> Tensor:
        calls.append(1)
        return F.linear(F.linear(x, w).tanh().sin().exp(), w.mT).tanh()

    return calls, block


def test_the_forward_runs_again_in_the_backward() -> None:
    calls, block = counting()
    w, x = randn(7, 5).requires_grad_(), randn(3, 5)
    loss = jd.remat(block)(w, x).sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    calls.clear()
    torch.func.grad(lambda w: jd.remat(block)(w, x).sum())(w.detach())
    assert len(calls) == 2


def test_nothing_inside_is_kept() -> None:
    """Plain autograd saves the arguments of a rematerialised block and nothing else."""

    def kept(function: Callable[..., Tensor]) -> list[Tensor]:
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(w, x)
        return saved

    _, block = counting()
    w, x = randn(7, 5).requires_grad_(), randn(3, 5).requires_grad_()
    assert len(kept(block)) > 4
    assert {t.data_ptr() for t in kept(jd.remat(block))} <= {w.data_ptr(), x.data_ptr()}


def test_without_gradients_it_runs_once() -> None:
    calls, block = counting()
    with torch.no_grad():
        out = jd.remat(block)(randn(7, 5), randn(3, 5))
    assert len(calls) == 1
    assert not out.requires_grad


# --- arguments and outputs --------------------------------------------------------------------


def test_outputs_keep_their_form() -> None:
    x = randn(3)
    assert isinstance(jd.remat(lambda x: x.sin())(x), Tensor)
    one = jd.remat(lambda x: (x.sin(),))(x)
    assert isinstance(one, tuple)
    assert len(one) == 1
    sine, cosine = jd.remat(lambda x: (x.sin(), x.cos()))(x)
    assert torch.equal(sine, x.sin())
    assert torch.equal(cosine, x.cos())


def test_an_output_that_is_not_used() -> None:
    x = randn(3)
    grad = torch.func.grad(lambda x: jd.remat(lambda x: (x.sin(), x.exp()))(x)[0].sum())(x)
    oracles.assert_close(grad, x.cos(), tolerance=1e-14)


def test_an_argument_that_is_not_used() -> None:
    x = randn(3)
    function = jd.remat(lambda p: p["a"].sin())
    grads = torch.func.grad(lambda p: function(p).sum())({"a": x, "b": x})
    oracles.assert_close(grads, {"a": x.cos(), "b": torch.zeros_like(x)}, tolerance=1e-14)


def test_one_tensor_as_two_arguments() -> None:
    x = randn(3)
    grad = torch.func.grad(lambda x: jd.remat(torch.mul)(x, x).sum())(x)
    oracles.assert_close(grad, 2 * x, tolerance=1e-14)


def test_masks_and_indices_go_in() -> None:
    x, mask, index = randn(4), torch.tensor([True, False, True, True]), torch.tensor([3, 0, 0])
    function = jd.remat(lambda x, m, i: (x * m)[i].square().sum())
    grad = torch.func.grad(lambda x: function(x, mask, index))(x)
    wanted = torch.func.grad(lambda x: (x * mask)[index].square().sum())(x)
    oracles.assert_close(grad, wanted, tolerance=1e-14)


def test_it_may_be_called_many_times() -> None:
    """One wrapped function, calls of other shapes and structures in one graph."""
    block = jd.remat(lambda p, x: F.linear(x, *p).tanh())
    one, two = [randn(5, 4)], [randn(3, 5), randn(3)]
    x = randn(2, 4)

    def loss(one: Any, two: Any, f: Any) -> Tensor:
        return f(two, f(one, x)).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(one, two, block)
    wanted = torch.func.grad(loss, argnums=(0, 1))(one, two, lambda p, x: F.linear(x, *p).tanh())
    oracles.assert_close(got, wanted, tolerance=1e-12)


@pytest.mark.compile
@pytest.mark.parametrize("batch_dim", [None, 0])
@models
def test_compiles(name: str, batch_dim: Any) -> None:
    model = MODELS[name]()
    fn = model.fn(jd.remat)
    compiled = torch.compile(
        lambda p, x: jd.gramian(fn, p, x, batch_dim=batch_dim), fullgraph=True, backend="aot_eager"
    )
    wanted = oracles.gramian(model.fn(plain), model.params, {}, model.batch)
    oracles.assert_close(compiled(model.params, model.batch), wanted, tolerance=1e-10)


@pytest.mark.compile
def test_compiled_gradients() -> None:
    model = mlp()
    fn = model.fn(jd.remat)
    compiled = torch.compile(
        torch.func.grad(lambda p: fn(p, {}, model.batch).sum()), fullgraph=True, backend="aot_eager"
    )
    wanted = torch.func.grad(lambda p: model.fn(plain)(p, {}, model.batch).sum())(model.params)
    oracles.assert_close(compiled(model.params), wanted, tolerance=1e-12)

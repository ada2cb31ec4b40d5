"""Products in place of rows: the exact Gramian, in memory that does not grow with m·n."""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from models import BY_NAME
from test_structured_zoo import ZOO, check, named, over, truth
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import jdfunc as jd
from jdfunc.linearizations import matrix_free

implementation = importlib.import_module("jdfunc.linearizations.matrix_free")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the model branches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

#: Attention of Hugging Face takes its softmax in float32, whatever the model's dtype.
FLOAT32_INSIDE = {"hf_vit_eager": 1e-7}
PAIRED = {"embedding_bag_offsets": "no second derivative", "embedding_scaled_by_frequency": "trans"}


@pytest.fixture
def products(monkeypatch: Any) -> None:
    """Columns by products with J even where pairs of blocks would be fewer passes."""
    monkeypatch.setattr(implementation, "FEW_BLOCKS", 1)


@over(ZOO)
def test_zoo_by_products(name: str, batch_dim: Any, products: None) -> None:
    t = truth(name)
    lin = matrix_free(t.model_fn, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim)
    assert lin.rows is None
    tolerance = FLOAT32_INSIDE.get(name, 1e-10)
    if name in PAIRED and t.losses.numel() > 1:
        with pytest.warns(UserWarning, match=PAIRED[name]):
            lin.gram()
        warnings.simplefilter("ignore")
    check(lin, t, "matrix_free", tolerance)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
@over(named("mlp", "cnn", "gpt_tied", "losses_grid", "losses_per_example_and_task", "loss_scalar"))
def test_blocks_of_any_size(name: str, batch_dim: Any, chunk_size: int) -> None:
    """Both ways, and blocks that do not divide m."""
    t = truth(name)
    lin = matrix_free(
        t.model_fn,
        t.params,
        t.batch,
        buffers=t.buffers,
        batch_dim=batch_dim,
        chunk_size=chunk_size,
    )
    check(lin, t, f"blocks of {chunk_size}")


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


PARAMS = {"v": randn(2, 7, seed=1), "w": randn(7, 5, seed=2)}
BATCH = randn(7, 5, seed=3)


def model_fn(params: Any, buffers: Any, batch: Tensor) -> Tensor:
    return F.linear(F.linear(batch, params["w"]).tanh(), params["v"]).square().sum(1)


@pytest.mark.parametrize(("blocks", "passes"), [(1, 1), (2, 2), (3, 4), (4, 7), (5, 9), (7, 13)])
def test_number_of_passes(blocks: int, passes: int) -> None:
    """Pullbacks and products: B + (B−1)(B−2)/2 for few blocks, 2B − 1 for more."""
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            calls.append("pull")
            return Transposed.apply(grad)

    class Transposed(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            calls.append("push")
            return grad.clone()

    fn = lambda p, b, x: Counted.apply(model_fn(p, b, x))  # noqa: E731
    lin = matrix_free(fn, PARAMS, BATCH[:blocks])
    assert not calls  # the Gramian is computed when it is asked for
    gramian = lin.gram()
    products = calls.count("push")
    assert len(calls) - (products > 0) == passes  # one pullback makes the linear function
    assert products == (0 if blocks <= 4 else blocks - 1)
    oracles.assert_close(gramian, oracles.gramian(model_fn, PARAMS, {}, BATCH[:blocks]))


@pytest.mark.parametrize("m", [4, 10])
def test_memory_is_of_two_gradients_whatever_m(m: int) -> None:
    """Live bytes of all tensors, counted operation by operation: n = 2 · 512² in float32."""
    width = 512
    params = {k: randn(width, width, seed=i).float() / 23 for i, k in enumerate("ab")}
    x, n_bytes = randn(2, width).float(), 2 * 4 * width**2

    def fn(params: Any, buffers: Any, batch: Tensor) -> Tensor:
        hidden = F.linear(F.linear(batch, params["a"]).tanh(), params["b"]).tanh()
        return hidden.mean(0).reshape(16, -1).square().sum(1)[:m]

    peaks = {}
    for linearize in (matrix_free, jd.dense):
        with LiveBytes() as live:
            linearize(fn, params, x).gram()
        peaks[linearize] = live.peak / n_bytes
    assert peaks[jd.dense] > m
    assert 1 <= peaks[matrix_free] < 2.6, peaks[matrix_free]
    with LiveBytes() as live:
        matrix_free(fn, params, x, chunk_size=2).gram()
    assert live.peak / n_bytes < 5.2


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("m", [3, 7])
def test_metric(m: int, chunk_size: int) -> None:
    """G = J F⁻¹ Jᵀ and F⁻¹ Jᵀ w, for a metric that mixes the leaves."""
    root = randn(49, 49, seed=5)
    inverse = root @ root.T + torch.eye(49, dtype=torch.float64)

    def metric(tree: Any) -> Any:
        flat = inverse @ torch.cat([tree["v"].flatten(), tree["w"].flatten()])
        return {"v": flat[:14].reshape(2, 7), "w": flat[14:].reshape(7, 5)}

    rows = oracles.flat_jacobian(oracles.jacobian_rows(model_fn, PARAMS, {}, BATCH[:m]), 1)
    wanted = rows @ inverse @ rows.T
    linearize = partial(matrix_free, chunk_size=chunk_size)
    info, grads = jd.value_and_jd_step(
        model_fn, PARAMS, BATCH[:m], linearize=linearize, metric=metric
    )
    oracles.assert_close(info.gramian, wanted)
    dense = jd.jd_step(model_fn, PARAMS, BATCH[:m], linearize=jd.dense, metric=metric)
    oracles.assert_close(grads, dense, tolerance=1e-8)
    got = jd.gramian(model_fn, PARAMS, BATCH[:m], linearize=linearize, metric=metric)
    oracles.assert_close(got, wanted)
    for held in (jd.dense, jd.structured):
        oracles.assert_close(held(model_fn, PARAMS, BATCH[:m]).gram(metric), wanted)


def test_methods_of_rows_say_what_they_need() -> None:
    rule = jd.aggregated(jd.aggregators.coordinate_median)
    with pytest.raises(ValueError, match="holds rows"):
        jd.jd_step(model_fn, PARAMS, BATCH, weighting=rule, linearize=matrix_free)


def test_the_gramian_is_symmetric_to_the_last_bit() -> None:
    gramian = matrix_free(model_fn, PARAMS, BATCH).gram()
    assert torch.equal(gramian, gramian.mT)


class _Straight(torch.autograd.Function):
    """Rounds; the gradient passes, but not through anything that autograd follows."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.detach() * 1.0


@pytest.mark.parametrize("lost", [False, True])
def test_a_backward_pass_without_a_transpose(lost: bool) -> None:
    """Caught, and exact another way: what reverse mode says is J. NaN where it cannot be read."""
    quantised = _Straight.apply if lost else partial(_pass_through)
    fn = lambda p, b, x: model_fn({**p, "w": quantised(p["w"])}, b, x)  # noqa: E731
    rows = oracles.jacobian_rows(fn, PARAMS, {}, BATCH)
    wanted = oracles.cross_gramian(rows, rows, BATCH.shape[:1], BATCH.shape[:1])
    lin = matrix_free(fn, PARAMS, BATCH)
    if lost:
        with pytest.warns(UserWarning, match="not the transpose"):
            oracles.assert_close(lin.gram(), wanted)
    else:
        oracles.assert_close(lin.gram(), wanted)


def _pass_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def test_doubt_that_cannot_be_read_is_nan() -> None:
    table = randn(7, 3, seed=4)
    x = torch.tensor([[0, 0], [0, 1], [2, 2], [3, 3], [4, 5]])
    fn = lambda p, b, x: (  # noqa: E731
        F.embedding(x, p, scale_grad_by_freq=True).sin().sum((1, 2))
    )
    gramians = torch.vmap(lambda p: matrix_free(fn, p, x).gram())(torch.stack([table, table]))
    assert gramians.isnan().all()


def test_dropout_is_drawn_once() -> None:
    """Products with J see the mask that the losses saw."""
    fn = lambda p, b, x: F.dropout(x @ p, 0.5).square().sum(1)  # noqa: E731
    w = randn(5, 9)
    torch.manual_seed(3)
    rows = oracles.flat_jacobian(oracles.jacobian_rows(fn, w, {}, BATCH), 1)
    torch.manual_seed(3)
    lin = matrix_free(fn, w, BATCH)
    state = torch.get_rng_state()
    oracles.assert_close(lin.gram(), rows @ rows.T)
    oracles.assert_close(lin.combine(BATCH[:, 0]), (BATCH[:, 0] @ rows).reshape(5, 9))
    assert torch.equal(torch.get_rng_state(), state)


SUBJECTS = named("mlp", "cnn", "batch_norm_train", "inplace", "gpt_tied", "losses_grid", "gru")


@over(SUBJECTS)
def test_aux_purity_and_ensembles(name: str, batch_dim: Any) -> None:
    t = truth(name)

    def with_aux(params: Any, buffers: Any, batch: Any) -> Any:
        losses = t.model_fn(params, buffers, batch)
        return losses, {"twice": 2 * losses, "name": "aux"}

    before, state = oracles.snapshot((t.params, t.buffers, t.batch)), torch.get_rng_state()
    options = {"buffers": t.buffers, "batch_dim": batch_dim, "has_aux": True}
    lin = matrix_free(with_aux, t.params, t.batch, **options)
    check(lin, t, "with aux")
    assert torch.allclose(lin.aux["twice"], 2 * t.losses, rtol=1e-12)
    oracles.assert_untouched((t.params, t.buffers, t.batch), before)
    assert torch.equal(torch.get_rng_state(), state)

    def one(params: Any, buffers: Any) -> Any:
        member = matrix_free(with_aux, params, t.batch, **{**options, "buffers": buffers})
        return member.gram(), member.combine(t.weights)

    stacked = pytree.tree_map(lambda p: torch.stack([p, p + 0.1 * p.sin()]), t.params)
    if name == "batch_norm_train":  # each member has statistics of its own, or torch refuses
        with pytest.raises(RuntimeError, match="not batched"):
            torch.vmap(one, in_dims=(0, None))(stacked, t.buffers)
    buffers = pytree.tree_map(lambda b: torch.stack([b, b]), t.buffers)
    gramians, combined = torch.vmap(one)(stacked, buffers)
    for i in range(2):
        member, direction = (
            pytree.tree_map(lambda v, i=i: v[i], tree) for tree in (stacked, combined)
        )
        args = (t.model_fn, member, t.buffers, t.batch)
        oracles.assert_close(gramians[i], oracles.gramian(*args), tolerance=1e-9)
        oracles.assert_close(direction, oracles.combine(*args, t.weights), tolerance=1e-9)


@pytest.mark.parametrize("m", [3, 6])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_inside_grad(m: int, batch_dim: Any) -> None:
    """∇ of |G|² and of |Jᵀw|² with respect to the params: those of dense rows."""
    gradients = []
    for linearize in (matrix_free, jd.dense):

        def objective(params: Any, linearize: Any = linearize) -> Tensor:
            lin = linearize(model_fn, params, BATCH[:m], batch_dim=batch_dim)
            combined = lin.combine(BATCH[:m, 0])
            return lin.gram().square().sum() + sum(g.square().sum() for g in combined.values())

        gradients.append(torch.func.grad(objective)(PARAMS))
        leaves = {k: v.clone().requires_grad_() for k, v in PARAMS.items()}
        outside = torch.autograd.grad(objective(leaves), list(leaves.values()))
        gradients.append(dict(zip(leaves, outside, strict=True)))
    for other in gradients[:-1]:
        oracles.assert_close(other, gradients[-1], tolerance=1e-9)


@pytest.mark.parametrize("m", [3, 6])
def test_module_parameters_leave_no_graph(m: int) -> None:
    module = nn.Linear(5, 3).double()
    fn = lambda p, b, x: torch.func.functional_call(module, p, (x,)).sin().sum(1)  # noqa: E731
    params = dict(module.named_parameters())
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            lin = matrix_free(fn, params, BATCH[:m])
            results = [lin.losses, lin.gram(), *lin.combine(BATCH[:m, 0]).values()]
            frozen = matrix_free(fn, {"weight": params["weight"].detach()}, BATCH[:m].sin())
            results += [frozen.gram(), frozen.combine(BATCH[:m, 0])["weight"]]
        assert not any(result.requires_grad for result in results)
        assert all(p.grad is None for p in params.values())


@pytest.mark.parametrize("m", [3, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype: torch.dtype, m: int) -> None:
    """Inner products of the rounded rows to the last bits of float32, as with dense."""
    params = {k: v.to(dtype) for k, v in PARAMS.items()}
    lin = matrix_free(model_fn, params, BATCH[:m].to(dtype))
    gramian = lin.gram()
    assert gramian.dtype == torch.float32
    rows = [
        r.flatten(1).double() for r in jd.jacobian(model_fn, params, BATCH[:m].to(dtype)).values()
    ]
    wanted = sum(r @ r.T for r in rows)
    oracles.assert_close(
        gramian.double(), wanted, tolerance=1e-2 if dtype == torch.bfloat16 else 2e-3
    )
    assert {g.dtype for g in lin.combine(torch.ones(m)).values()} == {dtype}
    assert torch.linalg.eigvalsh(gramian.double()).min() > -1e-6 * gramian.max()


def test_autocast_sums_in_float32() -> None:
    """Products with J would round Jᵀe to half: blocks of rows meet each other instead."""
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(5, 300, generator=generator)}
    batch = torch.randn(6, 300, generator=generator)

    def losses(p: Any, b: Any, x: Tensor) -> Tensor:
        return F.linear(x, p["w"]).float().sin().sum(1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = matrix_free(losses, params, batch).gram()
        rows = jd.dense(losses, params, batch, chunk_size=1).rows["w"].double().flatten(1)
    assert found.dtype == torch.float32
    oracles.assert_close(found.double(), rows @ rows.T, tolerance=1e-6)


def test_errors() -> None:
    with pytest.raises(ValueError, match="chunk_size"):
        matrix_free(model_fn, PARAMS, BATCH, chunk_size=0)
    with pytest.raises(ValueError, match=r"\(7,\)"):
        matrix_free(model_fn, PARAMS, BATCH).combine(torch.ones(3))
    with pytest.raises(ValueError, match=r"(?s)losses.*params"):
        matrix_free(lambda p, b, x: x.sum(1), PARAMS, BATCH)
    coupled = lambda p, b, x: model_fn(p, b, x - x.mean(0))  # noqa: E731
    with pytest.raises(ValueError, match="one example"):
        matrix_free(coupled, PARAMS, BATCH, batch_dim=0)
    stacked = {k: torch.stack([v, v]) for k, v in PARAMS.items()}
    unreadable = torch.vmap(lambda p: matrix_free(coupled, p, BATCH, batch_dim=0).gram())(stacked)
    assert unreadable.isnan().all()
    case = BY_NAME["batch_norm_train"].build()
    with pytest.raises(ValueError, match="batch_norm"):
        matrix_free(case[0], case[1], case[3], buffers=case[2], batch_dim=0)
    for params in ({}, []):
        lin = matrix_free(lambda p, b, x: x.sum(1), params, BATCH)
        assert torch.equal(lin.gram(), torch.zeros(7, 7, dtype=torch.float64))
        assert lin.combine(torch.ones(7)) == params
    for batch_dim in (0, None):
        empty = matrix_free(model_fn, PARAMS, BATCH[:0], batch_dim=batch_dim)
        assert empty.gram().shape == (0, 0)
        oracles.assert_close(
            empty.combine(empty.losses), {k: torch.zeros_like(v) for k, v in PARAMS.items()}
        )


@pytest.mark.compile
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("m", [3, 5])
def test_compiled(m: int, batch_dim: Any) -> None:
    run = partial(jd.jd_step, model_fn, linearize=matrix_free, batch_dim=batch_dim)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    oracles.assert_close(compiled(PARAMS, BATCH[:m]), run(PARAMS, BATCH[:m]), tolerance=1e-9)
    with torch._dynamo.config.patch(error_on_recompile=True):
        moved = {k: v + 0.1 for k, v in PARAMS.items()}
        oracles.assert_close(compiled(moved, BATCH[-m:]), run(moved, BATCH[-m:]), tolerance=1e-9)

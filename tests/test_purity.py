"""Nothing given is modified, nothing is left behind; the step composes with torch's transforms."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from models import BY_NAME
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import jdfunc as jd

SUBJECTS = [
    ("mlp", 0),
    ("mlp", None),
    ("cnn", 0),
    ("inplace", 0),
    ("inplace", None),
    ("inplace_relu", 0),
    ("batch_norm_eval", 0),
    ("batch_norm_train", None),
    ("gpt_tied", 0),
    ("encoder_layer_eval", 0),
    ("losses_per_example_and_task", 0),
    ("losses_grid", None),
    ("spectral_norm_eval", 0),
    ("embedding_padding", 0),
]
subjects = pytest.mark.parametrize(("name", "batch_dim"), SUBJECTS)


def weighting_for(losses: Tensor) -> Any:
    return jd.upgrad if losses.ndim == 1 else jd.flattened(jd.upgrad)


def step(name: str, batch_dim: Any, problem: Any = None) -> Any:
    model_fn, params, buffers, batch = problem or BY_NAME[name].build()
    losses = oracles.losses_of(model_fn, params, buffers, batch)
    return jd.value_and_jd_step(
        model_fn,
        params,
        batch,
        buffers=buffers,
        batch_dim=batch_dim,
        weighting=weighting_for(losses),
    )


@subjects
def test_inputs_are_untouched(name: str, batch_dim: Any) -> None:
    problem = BY_NAME[name].build()
    trees = problem[1:]
    before = oracles.snapshot(trees)
    step(name, batch_dim, problem)
    oracles.assert_untouched(trees, before)


@subjects
def test_equal_inputs_give_equal_outputs(name: str, batch_dim: Any) -> None:
    first, second = step(name, batch_dim), step(name, batch_dim)
    for a, b in zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b)


@subjects
def test_global_random_state_is_unchanged(name: str, batch_dim: Any) -> None:
    problem = BY_NAME[name].build()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    step(name, batch_dim, problem)
    jd.gramian(problem[0], problem[1], problem[3], buffers=problem[2], batch_dim=batch_dim)
    if batch_dim == 0:
        jd.check_batch_independence(problem[0], problem[1], problem[3], buffers=problem[2])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def _module_problem() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(inplace=True), nn.Linear(7, 3)
        )
        x, y = torch.randn(5, 5), torch.randint(0, 3, (5,))

    def model_fn(params: Any, buffers: Any, batch: Any) -> Tensor:  # the form of the README
        logits = torch.func.functional_call(model, (params, buffers), (batch[0],))
        return F.cross_entropy(logits, batch[1], reduction="none")

    return model, model_fn, (x, y)


def _hooks(model: nn.Module) -> list[Any]:
    kinds = [k for k in vars(model) if k.endswith("_hooks") or "_hooks_" in k]
    found = [
        vars(module)[kind] for module in model.modules() for kind in kinds if vars(module).get(kind)
    ]
    registry = torch.nn.modules.module
    found += [v for k, v in vars(registry).items() if k.startswith("_global_") and v]
    return found + [p._backward_hooks for p in model.parameters() if p._backward_hooks]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("linearize", ["structured", "dense"])
def test_nothing_is_left_behind(linearize: str, fails: bool) -> None:
    """Not on the module, its parameters or torch's mode stacks; nor after an error."""
    model, model_fn, batch = _module_problem()
    hooks = _hooks(model)
    attributes = {k: set(vars(m)) for k, m in model.named_modules()}
    state = oracles.snapshot(dict(model.state_dict()))
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def failing(params: Any, buffers: Any, batch: Any) -> Tensor:
        model_fn(params, buffers, batch)
        raise ArithmeticError("inside the model")

    call = partial(
        jd.jd_step, params=params, batch=batch, buffers=buffers, linearize=getattr(jd, linearize)
    )
    if fails:
        with pytest.raises(ArithmeticError, match="inside the model"):
            call(failing)
    else:
        grads = call(model_fn)
        assert not any(g.requires_grad for g in grads.values())
    assert _hooks(model) == hooks
    assert {k: set(vars(m)) for k, m in model.named_modules()} == attributes
    assert torch._C._len_torch_function_stack() == 0
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._functorch.maybe_current_level() is None
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    oracles.assert_untouched(dict(model.state_dict()), state)


def test_readme_form_without_buffers() -> None:
    """buffers=None has to suit functional_call(model, (params, buffers), ...)."""
    model = nn.Linear(5, 3)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))

    def model_fn(params: Any, buffers: Any, batch: Tensor) -> Tensor:
        return torch.func.functional_call(model, (params, buffers), (batch,)).square().sum(1)

    params = dict(model.named_parameters())
    for batch_dim in (0, None):
        grads = jd.jd_step(model_fn, params, x, weighting=jd.upgrad, batch_dim=batch_dim)
        assert list(grads) == list(params)
    jd.assign_grads(model, grads)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(p.grad is not None for p in model.parameters())


@subjects
def test_under_no_grad_and_inference_mode(name: str, batch_dim: Any) -> None:
    problem = BY_NAME[name].build()
    wanted = step(name, batch_dim, problem)[1]
    with torch.no_grad():
        oracles.assert_close(step(name, batch_dim, problem)[1], wanted)


def test_requires_grad_params_change_nothing() -> None:
    model_fn, params, buffers, batch = BY_NAME["gpt_tied"].build()
    wanted = jd.jd_step(model_fn, params, batch, buffers=buffers, batch_dim=0)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    got = jd.jd_step(model_fn, leaves, batch, buffers=buffers, batch_dim=0)
    oracles.assert_close(got, wanted, tolerance=1e-14)
    assert all(v.grad is None for v in leaves.values())


def test_dropout_draws_once_from_the_callers_generator() -> None:
    """Random layers in training mode draw as in one forward pass: the user seeds them."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3)).double()
    params = {k: v.detach() for k, v in model.named_parameters()}
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model_fn(params: Any, buffers: Any, batch: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (batch,)).square().sum(1)

    for linearize in (jd.dense, jd.structured):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            rows = oracles.jacobian_rows(model_fn, params, {}, x)
            torch.manual_seed(5)
            linearization = linearize(model_fn, params, x)
            got = linearization.combine(torch.ones(4, dtype=torch.float64))
        oracles.assert_close(got, oracles.combine_rows(rows, torch.ones(4, dtype=torch.float64)))


# --- vmap, grad -------------------------------------------------------------------------------


def _stacked(params: Any, members: int = 3) -> Any:
    generator = torch.Generator().manual_seed(3)
    return pytree.tree_map(
        lambda p: p + 0.1 * torch.randn(members, *p.shape, generator=generator, dtype=p.dtype),
        params,
    )


@pytest.mark.parametrize("weighting", ["upgrad", "dualproj", "mgda", "mean"])
@pytest.mark.parametrize("linearize", ["structured", "dense"])
@pytest.mark.parametrize(
    ("name", "batch_dim"),
    [("mlp", 0), ("cnn", 0), ("losses_per_task", None), ("batch_norm_eval", 0)],
)
def test_ensemble_step(name: str, batch_dim: Any, linearize: str, weighting: str) -> None:
    model_fn, params, buffers, batch = BY_NAME[name].build()
    options = {
        "buffers": buffers,
        "batch_dim": batch_dim,
        "linearize": getattr(jd, linearize),
        "weighting": getattr(jd, weighting),
    }
    stacked = _stacked(params)
    grads = torch.func.vmap(lambda p: jd.jd_step(model_fn, p, batch, **options))(stacked)
    for i in range(3):
        member = pytree.tree_map(lambda p, i=i: p[i], stacked)
        wanted = jd.jd_step(model_fn, member, batch, **options)
        oracles.assert_close(
            pytree.tree_map(lambda g, i=i: g[i], grads), wanted, tolerance=1e-9, what=f"member {i} "
        )


@pytest.mark.parametrize("linearize", ["structured", "dense"])
def test_ensemble_of_params_and_batches(linearize: str) -> None:
    model_fn, params, buffers, batch = BY_NAME["mlp"].build()
    other = BY_NAME["mlp"].build(data_seed=2)[3]
    batches = pytree.tree_map(lambda a, b: torch.stack([a, b, a]), batch, other)
    stacked = _stacked(params)
    run = partial(jd.jd_step, model_fn, batch_dim=0, linearize=getattr(jd, linearize))
    grads = torch.func.vmap(run)(stacked, batches)
    for i in range(3):
        member, data = (pytree.tree_map(lambda v, i=i: v[i], t) for t in (stacked, batches))
        oracles.assert_close(
            pytree.tree_map(lambda g, i=i: g[i], grads), run(member, data), tolerance=1e-9
        )


@pytest.mark.parametrize("linearize", ["structured", "dense"])
@pytest.mark.parametrize(
    ("name", "batch_dim"), [("mlp", 0), ("mlp", None), ("cnn", 0), ("einsum_heads", 0)]
)
@pytest.mark.parametrize("weighting", ["mean", "constant"])
def test_inside_grad(name: str, batch_dim: Any, linearize: str, weighting: str) -> None:
    """∇ₚ |Jᵀw|² by torch.func.grad against central differences along a random direction."""
    model_fn, params, buffers, batch = BY_NAME[name].build()
    m = oracles.losses_of(model_fn, params, buffers, batch).numel()
    chosen = jd.mean
    if weighting == "constant":
        chosen = partial(jd.constant, weights=torch.linspace(-1, 2, m, dtype=torch.float64))

    def objective(params: Any) -> Tensor:
        grads = jd.jd_step(
            model_fn,
            params,
            batch,
            buffers=buffers,
            batch_dim=batch_dim,
            weighting=chosen,
            linearize=getattr(jd, linearize),
        )
        return sum(g.square().sum() for g in pytree.tree_leaves(grads))

    got = torch.func.grad(objective)(params)
    generator = torch.Generator().manual_seed(0)
    direction = pytree.tree_map(
        lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), params
    )
    slope = sum(float((got[k] * direction[k]).sum()) for k in params)
    ahead, behind = (
        objective({k: params[k] + h * direction[k] for k in params}) for h in (1e-5, -1e-5)
    )
    wanted = float(ahead - behind) / 2e-5
    assert abs(slope) > 1e-3
    assert abs(slope - wanted) < 1e-5 * max(1.0, abs(wanted))


# --- compile ----------------------------------------------------------------------------------

COMPILED = [
    ("losses_per_task", None, "dense"),
    ("losses_per_task", None, "structured"),
    ("batch_norm_train", None, "dense"),
    ("mlp", 0, "structured"),
    ("losses_per_example_and_task_cnn", 0, "structured"),
    ("cnn", 0, "structured"),
]


@pytest.mark.compile
@pytest.mark.parametrize("weighting", ["upgrad", "mean"])
@pytest.mark.parametrize(("name", "batch_dim", "linearize"), COMPILED)
def test_compiles_without_a_break_and_without_recompiling(
    name: str, batch_dim: Any, linearize: str, weighting: str
) -> None:
    model_fn, params, buffers, batch = BY_NAME[name].build()
    losses = oracles.losses_of(model_fn, params, buffers, batch)
    chosen = getattr(jd, weighting)
    if losses.ndim > 1:
        chosen = jd.flattened(chosen)
    run = partial(
        jd.jd_step,
        model_fn,
        buffers=buffers,
        batch_dim=batch_dim,
        linearize=getattr(jd, linearize),
        weighting=chosen,
    )
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    trees = (params, buffers, batch)
    before = oracles.snapshot(trees)
    oracles.assert_close(compiled(params, batch), run(params, batch), tolerance=1e-9)
    oracles.assert_untouched(trees, before)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = BY_NAME[name].build(data_seed=2)[3]
        oracles.assert_close(compiled(params, other), run(params, other), tolerance=1e-9)
        moved = pytree.tree_map(lambda p: p + 0.1, params)
        oracles.assert_close(compiled(moved, batch), run(moved, batch), tolerance=1e-9)


# --- precision --------------------------------------------------------------------------------

PRECISION = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-5}


def _at(dtype: torch.dtype, conv: bool, norm: bool = True) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(7 if not conv else 30, 3)
        body = nn.Conv1d(1, 6, 3, padding=1) if conv else nn.Linear(5, 7)
        middle = nn.LayerNorm(head.in_features) if norm else nn.Identity()
        model = nn.Sequential(body, nn.Tanh(), nn.Flatten(), middle, head)
        x, y = torch.randn(5, *([1] if conv else []), 5), torch.randint(0, 3, (5,))
    params = {k: v.detach().to(dtype) for k, v in model.named_parameters()}

    def model_fn(params: Any, buffers: Any, batch: Any) -> Tensor:
        logits = torch.func.functional_call(model, params, (batch[0],))
        return F.cross_entropy(logits, batch[1], reduction="none")

    wide = {k: v.double() for k, v in params.items()}
    return model_fn, params, (x.to(dtype), y), wide, (x.to(dtype).double(), y)


@pytest.mark.parametrize("linearize", ["structured", "dense"])
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("conv", [False, True], ids=["mlp", "conv"])
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_precisions(dtype: torch.dtype, conv: bool, batch_dim: Any, linearize: str) -> None:
    model_fn, params, batch, wide, wide_batch = _at(dtype, conv)
    info, grads = jd.value_and_jd_step(
        model_fn,
        params,
        batch,
        batch_dim=batch_dim,
        linearize=getattr(jd, linearize),
        weighting=jd.mean,
    )
    assert {g.dtype for g in grads.values()} == {dtype}
    assert info.gramian.dtype == torch.float32
    rows = oracles.jacobian_rows(model_fn, wide, {}, wide_batch)
    gramian = oracles.cross_gramian(rows, rows, info.losses.shape, info.losses.shape)
    oracles.assert_close(info.gramian.double(), gramian, tolerance=PRECISION[dtype], what="G")
    mean = oracles.combine_rows(rows, torch.full((5,), 0.2, dtype=torch.float64))
    got = {k: v.double() for k, v in grads.items()}
    oracles.assert_close(got, mean, tolerance=PRECISION[dtype], what="grads ")
    projected = jd.jd_step(
        model_fn, params, batch, batch_dim=batch_dim, linearize=getattr(jd, linearize)
    )
    assert all(g.isfinite().all() and g.dtype == dtype for g in projected.values())


@pytest.mark.parametrize("linearize", ["structured", "dense"])
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("conv", [False, True], ids=["mlp", "conv"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_autocast(norm: bool, conv: bool, batch_dim: Any, linearize: str) -> None:
    model_fn, params, batch, wide, wide_batch = _at(torch.float32, conv, norm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        info, grads = jd.value_and_jd_step(
            model_fn,
            params,
            batch,
            batch_dim=batch_dim,
            linearize=getattr(jd, linearize),
            weighting=jd.mean,
        )
    assert {g.dtype for g in grads.values()} == {torch.float32}
    rows = oracles.jacobian_rows(model_fn, wide, {}, wide_batch)
    gramian = oracles.cross_gramian(rows, rows, info.losses.shape, info.losses.shape)
    oracles.assert_close(info.gramian.double(), gramian, tolerance=5e-2, what="G")
    mean = oracles.combine_rows(rows, torch.full((5,), 0.2, dtype=torch.float64))
    got = {k: v.double() for k, v in grads.items()}
    oracles.assert_close(got, mean, tolerance=5e-2, what="grads ")


def test_mixed_precision_params() -> None:
    """Norms in float32 beside bfloat16 layers: every gradient comes in its parameter's dtype."""
    params = {
        "w": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "scale": torch.ones(7),
    }
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).bfloat16()

    def model_fn(params: Any, buffers: Any, batch: Tensor) -> Tensor:
        hidden = F.linear(batch, params["w"]).float()
        return F.layer_norm(hidden, (7,), params["scale"]).sin().sum(1)

    for batch_dim in (0, None):
        grads = jd.jd_step(model_fn, params, x, batch_dim=batch_dim)
        assert {k: g.dtype for k, g in grads.items()} == {k: p.dtype for k, p in params.items()}

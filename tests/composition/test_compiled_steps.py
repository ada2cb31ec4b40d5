"""Whole steps under torch.compile(fullgraph=True): equal to eager, and compiled once."""

from __future__ import annotations

from collections.abc import Callable
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

pytestmark = [
    pytest.mark.compile,
]

LINEARIZE = {"structured": jd.structured, "dense": jd.dense, "matrix_free": matrix_free}
LOSSES = {"tasks": (tasks, None), "examples": (examples, 0), "both": (examples_and_tasks, 0)}
MODELS = ("mlp", "batch_norm", "conv", "attention", "embedding_norm")
CALLS = ("jd_step", "value_and_jd_step", "gramian", "jacobian")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}

#: The fast suite: every call, model, kind of losses and linearization at least once.
FAST = {
    ("jd_step", "structured", "tasks", "batch_norm", torch.float64),
    ("value_and_jd_step", "structured", "examples", "attention", torch.float32),
    ("gramian", "matrix_free", "tasks", "conv", torch.float64),
    ("gramian", "structured", "both", "embedding_norm", torch.float64),
    ("jacobian", "dense", "tasks", "mlp", torch.float32),
}
MATRIX = [
    (call, linearize, losses, model, dtype)
    for call in CALLS
    for linearize in LINEARIZE
    for losses in LOSSES
    for model in MODELS
    for dtype in TOLERANCE
    if not (model == "batch_norm" and losses != "tasks")  # examples are coupled: refused
    and not (call == "jacobian" and linearize != "dense")  # it takes none
]


def call_of(call: str, linearize: str, losses: str, model: str, dtype: torch.dtype) -> Any:
    """``(run(params, buffers, batch), subject)`` of one cell."""
    found = subject(model, dtype)
    make, batch_dim = LOSSES[losses]
    fn, has_aux = make(found), losses == "tasks"
    options: dict[str, Any] = {"linearize": LINEARIZE[linearize], "batch_dim": batch_dim}
    if call == "jacobian":
        options = {"has_aux": has_aux}
    elif call == "gramian":
        fn = (lambda p, b, x, fn=fn: fn(p, b, x)[0]) if has_aux else fn
    else:
        options |= {"has_aux": has_aux, "weighting": jd.flattened(jd.upgrad)}

    def run(params: Any, buffers: Any, batch: Any) -> Any:
        out = getattr(jd, call)(fn, params, batch, buffers=buffers, **options)
        return tuple(out[0])[:3] + (out[0].aux, out[1]) if call == "value_and_jd_step" else out

    return run, found


def check(cell: Any, backend: str, size: int = 5) -> None:
    run, found = call_of(*cell)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    batch, tolerance = batch_of(found, size), TOLERANCE[cell[-1]]
    before = oracles.snapshot((found.params, found.buffers, batch))
    args = (found.params, found.buffers, batch)
    got, wanted = compiled(*args), run(*args)
    oracles.assert_untouched(args, before)
    _assert_equal(got, wanted, tolerance)
    moved = {k: v + 0.1 for k, v in found.params.items()}
    other = (batch[0].flip(0), batch[1].flip(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        got = compiled(moved, found.buffers, other)
    _assert_equal(got, run(moved, found.buffers, other), tolerance)


def _assert_equal(got: Any, wanted: Any, tolerance: float) -> None:
    """Each part of what a call returns at its own scale."""
    for one, other in zip(_parts(got), _parts(wanted), strict=True):
        oracles.assert_close(one, other, tolerance=tolerance)


def _parts(value: Any) -> list[Any]:
    parts = list(value) if isinstance(value, tuple) else [value]
    return [part for part in parts if pytree.tree_leaves(part)]


def marked(cell: Any) -> Any:
    name = "-".join(str(part).removeprefix("torch.") for part in cell)
    return pytest.param(*cell, id=name, marks=() if cell in FAST else pytest.mark.slow)


def test_the_sample_is_part_of_the_matrix() -> None:
    assert set(MATRIX) >= FAST
    for k, values in enumerate((CALLS, LINEARIZE, LOSSES, MODELS, TOLERANCE)):
        assert {cell[k] for cell in FAST} == set(values)


@pytest.mark.parametrize(
    ("call", "linearize", "losses", "model", "dtype"), [marked(cell) for cell in MATRIX]
)
def test_equal_to_eager(
    call: str, linearize: str, losses: str, model: str, dtype: torch.dtype
) -> None:
    check((call, linearize, losses, model, dtype), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("linearize", LINEARIZE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of inductor
def test_inductor(linearize: str, losses: str, model: str) -> None:
    if model == "batch_norm" and losses != "tasks":
        pytest.skip("examples are coupled: refused, in eager too")
    check(("value_and_jd_step", linearize, losses, model, torch.float32), "inductor")


@pytest.mark.parametrize(
    ("linearize", "batch_dim"),
    [
        ("structured", 0),
        *(
            pytest.param(linearize, batch_dim, marks=pytest.mark.slow)
            for linearize in LINEARIZE
            for batch_dim in (None, 0)
            if (linearize, batch_dim) != ("structured", 0)
        ),
    ],
)
def test_methods_that_torch_has_written_in_python(linearize: str, batch_dim: Any) -> None:
    """`unflatten`, of a tensor, by the function and by the module, which Dynamo does not trace."""
    split = torch.nn.Unflatten(1, (-1, 2))
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(6, 5, generator=generator, dtype=torch.float64)}
    batch = torch.randn(4, 5, generator=generator, dtype=torch.float64)

    def model_fn(p: Any, b: Any, x: Tensor) -> Tensor:
        y = x @ p["w"].unflatten(-1, (1, 5)).flatten(1).T
        y = split(y).sin() * y.unflatten(-1, (3, 2)) + torch.unflatten(y, dim=1, sizes=(3, 2))
        return y.square().sum((1, 2))

    def run(params: Any) -> Tensor:
        return jd.gramian(
            model_fn, params, batch, batch_dim=batch_dim, linearize=LINEARIZE[linearize]
        )

    oracles.assert_close(run(params), oracles.gramian(model_fn, params, {}, batch))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    oracles.assert_close(compiled(params), run(params), tolerance=1e-12)


# --- compilations -------------------------------------------------------------------------------


class Counting:
    """A backend that counts how often it is asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


SIZES = 40, 48, 50, 33, 1
#: What compiled functions cannot keep open: torch's batching rules read sizes as fixed.
OF_TORCH = [
    pytest.mark.slow,
    pytest.mark.xfail(reason="torch's batching rule of convolutions", strict=True),
]


@pytest.mark.parametrize(
    ("call", "linearize", "losses", "model"),
    [
        ("gramian", "structured", "tasks", "mlp"),
        *(
            pytest.param(*cell, marks=OF_TORCH if "conv" in cell else pytest.mark.slow)
            for cell in (
                ("value_and_jd_step", "structured", "examples", "mlp"),
                ("gramian", "structured", "both", "mlp"),
                ("gramian", "structured", "both", "attention"),
                ("value_and_jd_step", "structured", "examples", "embedding_norm"),
                ("gramian", "structured", "examples", "conv"),
                ("gramian", "dense", "tasks", "mlp"),
                ("gramian", "dense", "examples", "mlp"),
                ("gramian", "dense", "examples", "attention"),
                ("gramian", "matrix_free", "tasks", "mlp"),
            )
        ),
    ],
)
def test_at_most_three_compilations_over_batch_sizes(
    call: str, linearize: str, losses: str, model: str
) -> None:
    """A first size, any size, size one."""
    run, found = call_of(call, linearize, losses, model, torch.float64)
    backend = Counting()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for size in SIZES:
        batch = batch_of(found, size)
        got, wanted = (f(found.params, found.buffers, batch) for f in (compiled, run))
        if call == "gramian":
            _assert_equal(got, wanted, 1e-9)
        else:
            _assert_equal(got[:2], wanted[:2], 1e-9)  # losses, Gramian
            _assert_equal(got[-1:], wanted[-1:], 1e-5)  # G without full rank: root of the ridge
    assert backend.count <= 3


@pytest.mark.slow
@pytest.mark.parametrize("max_block_bytes", [2**26, 2**18])
def test_gramians_cut_into_strips_and_blocks_keep_their_sizes_open(max_block_bytes: int) -> None:
    """Sizes where the form is the same, and how many blocks there are."""
    found = subject("mlp", torch.float64)
    linearize = partial(jd.structured, max_block_bytes=max_block_bytes)

    def run(batch: Any) -> Tensor:
        return jd.gramian(examples(found), found.params, batch, batch_dim=0, linearize=linearize)

    backend = Counting()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for size in (300, 301, 305, 310):
        batch = batch_of(found, size)
        oracles.assert_close(compiled(batch), run(batch), tolerance=1e-9)
    assert backend.count == 2


# --- training loops -----------------------------------------------------------------------------


def momentum(params: Any, grads: Any, state: Any) -> Any:
    """v ← 0.9 v + g, p ← p − 0.1 v."""
    state = pytree.tree_map(lambda v, g: 0.9 * v + g, state, grads)
    return pytree.tree_map(lambda p, v: p - 0.1 * v, params, state), state


def adam(params: Any, grads: Any, state: Any) -> Any:
    """Kingma and Ba, 2015, Algorithm 1."""
    first, second, step = state
    step = step + 1
    first = pytree.tree_map(lambda a, g: 0.9 * a + 0.1 * g, first, grads)
    second = pytree.tree_map(lambda a, g: 0.999 * a + 0.001 * g * g, second, grads)
    params = pytree.tree_map(
        lambda p, a, b: p - 0.01 * (a / (1 - 0.9**step)) / ((b / (1 - 0.999**step)).sqrt() + 1e-8),
        params,
        first,
        second,
    )
    return params, (first, second, step)


def _start(optimiser: Callable[..., Any], params: Any) -> Any:
    zeros = pytree.tree_map(torch.zeros_like, params)
    return zeros if optimiser is momentum else (zeros, zeros, torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize(
    ("optimiser", "model", "losses", "weighting"),
    [
        (momentum, "batch_norm", "tasks", "moco"),
        pytest.param(adam, "mlp", "examples", "upgrad", marks=pytest.mark.slow),
        pytest.param(adam, "batch_norm", "tasks", "moco", marks=pytest.mark.slow),
        pytest.param(momentum, "attention", "examples", "upgrad", marks=pytest.mark.slow),
        pytest.param(adam, "conv", "both", "upgrad", marks=pytest.mark.slow),
    ],
)
def test_training_steps(optimiser: Any, model: str, losses: str, weighting: str) -> None:
    """Direction, optimiser, buffers and the weighting's state in one graph, over four steps."""
    found = subject(model, torch.float64)
    make, batch_dim = LOSSES[losses]
    fn, has_aux = make(found), losses == "tasks"
    chosen = jd.moco() if weighting == "moco" else jd.flattened(jd.upgrad)

    def step(params: Any, buffers: Any, moments: Any, state: Any, batch: Any) -> Any:
        info, grads = jd.value_and_jd_step(
            fn,
            params,
            batch,
            buffers=buffers,
            weighting=chosen,
            state=state,
            batch_dim=batch_dim,
            has_aux=has_aux,
        )
        params, moments = optimiser(params, grads, moments)
        return params, info.aux if has_aux else buffers, moments, info.state, info.losses

    init = jd.as_weighting(chosen).init
    rows = torch.eye(3, dtype=torch.float64)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    carried = []
    for run in (compiled, step):
        state = init(rows) if weighting == "moco" else ()
        carry = (found.params, found.buffers, _start(optimiser, found.params), state)
        record: list[Tensor] = []
        for k in range(4):
            batch = tuple(x.roll(k, 0) for x in batch_of(found, 6))
            *carry, found_losses = run(*carry, batch)  # pyright: ignore
            record.append(found_losses)
        carried.append((carry, record))
    (fast, fast_losses), (slow, slow_losses) = carried
    oracles.assert_close(fast_losses, slow_losses, tolerance=1e-9)
    for one, other in zip(fast, slow, strict=True):
        if pytree.tree_leaves(other):
            oracles.assert_close(one, other, tolerance=1e-8)
    assert float(slow_losses[-1].sum()) < float(slow_losses[0].sum())
    if model == "batch_norm":
        assert int(fast[1]["1.num_batches_tracked"]) == 4
        assert int(found.buffers["1.num_batches_tracked"]) == 0

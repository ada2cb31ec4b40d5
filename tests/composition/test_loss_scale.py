"""Losses scaled before they are differentiated; and which rows of J are not finite."""

from __future__ import annotations

from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import jdfunc as jd
from jdfunc.factored.leaves import Outer
from jdfunc.linearizations import matrix_free, sketched
from jdfunc.linearizations.scaled import scaled
from jdfunc.step import nonfinite_rows

LINEARIZE = {
    "structured": jd.structured,
    "dense": jd.dense,
    "matrix_free": matrix_free,
    "matrix_free_blocks": partial(matrix_free, chunk_size=3),
}
linearizations = pytest.mark.parametrize("linearize", LINEARIZE)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"a": randn(7, 5, seed=1), "b": randn(7, seed=2), "c": randn(3, 7, seed=3)}
BATCH = randn(6, 5, seed=4), torch.tensor([0, 2, 1, 1, 0, 2])


def per_example(params: Any, buffers: Any, batch: Any, tiny: float = 1.0) -> Tensor:
    hidden = torch.tanh(F.linear(batch[0], params["a"], params["b"]))
    logits = F.linear(hidden, params["c"]) * params.get("gain", 1.0)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return tiny * F.cross_entropy(wide, batch[1], reduction="none")


def per_task(params: Any, buffers: Any, batch: Any, tiny: float = 1.0) -> Tensor:
    return per_example(params, buffers, batch, tiny).reshape(3, 2).mean(1)


def per_example_and_task(params: Any, buffers: Any, batch: Any, tiny: float = 1.0) -> Tensor:
    losses = per_example(params, buffers, batch, tiny)
    return torch.stack([losses, losses.square() + losses], 1)


LOSSES = {
    "examples_0": (per_example, 0),
    "examples_None": (per_example, None),
    "tasks": (per_task, None),
    "both_0": (per_example_and_task, 0),
    "both_None": (per_example_and_task, None),
}
kinds = pytest.mark.parametrize("kind", LOSSES)


def half(tree: Any) -> Any:
    return {k: v.half() for k, v in tree.items()}


# --- what the scale is for ----------------------------------------------------------------------


@linearizations
@kinds
def test_tiny_losses_in_float16(kind: str, linearize: str) -> None:
    """Without a scale all is lost; with one the Gramian is right within float16."""
    fn, batch_dim = LOSSES[kind]
    tiny, params, batch = 1e-8, half(PARAMS), (BATCH[0].half(), BATCH[1])
    run = partial(
        jd.gramian,
        partial(fn, tiny=tiny),
        params,
        batch,
        batch_dim=batch_dim,
        linearize=LINEARIZE[linearize],
    )
    wide = {k: v.double() for k, v in params.items()}
    exact = oracles.gramian(partial(fn, tiny=tiny), wide, {}, (batch[0].double(), batch[1]))
    found = run(loss_scale=2.0**24)
    assert found.dtype == torch.float32
    oracles.assert_close(found.double(), exact, tolerance=1e-2)
    assert float((run().double() - exact).norm()) > 0.9 * float(exact.norm())


@linearizations
@kinds
def test_direction_of_tiny_losses_in_float16(kind: str, linearize: str) -> None:
    """Direction and weights are those of losses of order one, within float16."""
    fn, batch_dim = LOSSES[kind]
    tiny, params, batch = 1e-3, half(PARAMS), (BATCH[0].half(), BATCH[1])
    for weighting in (jd.mean, jd.upgrad):
        options = {
            "batch_dim": batch_dim,
            "linearize": LINEARIZE[linearize],
            "weighting": jd.flattened(weighting),
        }
        info, grads = jd.value_and_jd_step(
            partial(fn, tiny=tiny), params, batch, loss_scale=2.0**10, **options
        )
        assert {g.dtype for g in grads.values()} == {torch.float16}
        assert info.gramian.dtype == torch.float32
        wide = {k: v.double() for k, v in params.items()}
        exact = oracles.combine(
            partial(fn, tiny=tiny), wide, {}, (batch[0].double(), batch[1]), info.weights.double()
        )
        got = {k: g.double() for k, g in grads.items()}
        oracles.assert_close(got, exact, tolerance=1e-2)


def test_direction_does_not_overflow_on_the_way() -> None:
    """Rows of s · losses fit float16; s times their sum does not, and is never formed."""
    fn = lambda p, b, x: (x.float() * p["w"].float()).expand(8)  # noqa: E731
    params = {"w": torch.ones(1, dtype=torch.float16)}
    weights = partial(jd.constant, weights=torch.ones(8))
    for linearize in (jd.dense, jd.structured):
        grads = jd.jd_step(
            fn,
            params,
            torch.ones(1).half(),
            weighting=weights,
            linearize=linearize,
            loss_scale=2.0**15,
        )
        assert float(grads["w"]) == 8


@linearizations
def test_the_scale_is_kept_until_the_end_of_a_pullback(linearize: str) -> None:
    """Cotangents of 1e-8 are zero in float16; times inputs of 1e4 they are gradients."""
    fn = lambda p, b, x: 1e-8 * (x * p["w"]).float()  # noqa: E731
    params, x = {"w": torch.ones((), dtype=torch.float16)}, 1e4 * torch.ones(2).half()
    grads = jd.jd_step(
        fn, params, x, weighting=jd.mean, linearize=LINEARIZE[linearize], loss_scale=2.0**24
    )
    assert float(grads["w"]) == pytest.approx(1e-4, rel=1e-2)


def test_examples_are_compared_where_scaled_losses_pass_what_float16_holds() -> None:
    """Infinite losses are taken for equal: they must not be made infinite."""

    def coupled(params: Any, buffers: Any, batch: Any) -> Tensor:
        return (params["w"] * batch * batch.sum()).half()

    x, params = torch.tensor([10.0, 12.0, 14.0]), {"w": torch.ones(())}
    with pytest.raises(ValueError, match="depend on one example each"):
        jd.gramian(coupled, params, x, batch_dim=0, loss_scale=2.0**15)


# --- powers of two are exact --------------------------------------------------------------------


@linearizations
@kinds
@pytest.mark.parametrize("scale", [2.0**16, 0.25, torch.tensor(1024.0), 8])
def test_powers_of_two_change_no_bit(kind: str, linearize: str, scale: Any) -> None:
    fn, batch_dim = LOSSES[kind]
    for weighting in (jd.mean, jd.upgrad):
        run = partial(
            jd.value_and_jd_step,
            fn,
            PARAMS,
            BATCH,
            batch_dim=batch_dim,
            linearize=LINEARIZE[linearize],
            weighting=jd.flattened(weighting),
        )
        (info, grads), (wanted, direction) = run(loss_scale=scale), run()
        assert torch.equal(info.losses, wanted.losses)
        assert torch.equal(info.gramian, wanted.gramian)
        assert torch.equal(info.weights, wanted.weights)
        assert all(torch.equal(grads[k], direction[k]) for k in direction)
        assert info.aux == ()


@linearizations
def test_any_scale(linearize: str) -> None:
    run = partial(jd.value_and_jd_step, per_task, PARAMS, BATCH, linearize=LINEARIZE[linearize])
    (info, grads), (wanted, direction) = run(loss_scale=3.7), run()
    oracles.assert_close(info.gramian, wanted.gramian, tolerance=1e-14)
    oracles.assert_close(grads, direction, tolerance=1e-12)


def test_sketches() -> None:
    run = partial(jd.gramian, per_task, PARAMS, BATCH, linearize=sketched(16, 3))
    assert torch.equal(run(loss_scale=2.0**8), run())


# --- what reads rows, metrics, losses, groups ---------------------------------------------------


def _metric(tree: Any) -> Any:
    return {k: v * (1 + k.encode()[0] % 3) for k, v in tree.items()}


RULES = {
    "upgrad": jd.upgrad,
    "on_rows": jd.on_rows(jd.ema_jacobian(0.5), jd.upgrad),
    "aggregated": jd.aggregated(jd.aggregators.trimmed_mean, trim_number=1),
    "graddrop": jd.aggregated(jd.aggregators.graddrop, seed=0),
    "excess_mtl": jd.excess_mtl(),
    "grouped": jd.grouped(jd.upgrad, lambda name: name),
    "losses_alone": jd.scalarized(jd.scalarizations.geometric_mean),
    "stateful": jd.moco(),
}


@pytest.mark.parametrize("kind", ["tasks", "examples_0", "both_0"])
@pytest.mark.parametrize("linearize", ["structured", "dense"])
@pytest.mark.parametrize("rule", RULES)
def test_every_kind_of_method_finds_rows_without_the_scale(
    rule: str, linearize: str, kind: str
) -> None:
    fn, batch_dim = LOSSES[kind]
    run = partial(
        jd.value_and_jd_step,
        fn,
        PARAMS,
        BATCH,
        batch_dim=batch_dim,
        linearize=LINEARIZE[linearize],
        weighting=RULES[rule],
    )
    states: list[Any] = [None, None]
    for _ in range(2):
        (info, grads) = run(loss_scale=2.0**12, state=states[0])
        wanted, direction = run(state=states[1])
        states = [info.state, wanted.state]
        oracles.assert_close(grads, direction, tolerance=1e-12)


def _magnified(rows: Any) -> Any:
    return {k: 1e9 * jd.to_dense(leaf).sum(0) for k, leaf in rows.items()}


@pytest.mark.parametrize("linearize", ["structured", "dense"])
@pytest.mark.parametrize("rule", ["on_rows", "aggregated", "excess_mtl", "grouped"])
def test_rows_of_float16_are_divided_in_float32(rule: str, linearize: str) -> None:
    """The rows are below what float16 holds, and yet a method that reads them finds them."""
    params, batch = half(PARAMS), (BATCH[0].half(), BATCH[1])
    method = jd.aggregated(_magnified) if rule == "aggregated" else RULES[rule]
    run = partial(
        jd.value_and_jd_step, linearize=LINEARIZE[linearize], weighting=method, loss_scale=2.0**24
    )
    info, grads = run(partial(per_task, tiny=1e-9), params, batch)
    assert {g.dtype for g in grads.values()} == {torch.float16}
    wide = {k: v.double() for k, v in params.items()}
    wanted, direction = run(per_task, wide, (batch[0].double(), batch[1]))
    if rule == "grouped":
        magnified = {k: g.double() * 1e18 for k, g in info.gramian.items()}
        oracles.assert_close(magnified, wanted.gramian, tolerance=1e-2)
    elif rule == "on_rows":
        oracles.assert_close(info.gramian.double() * 1e18, wanted.gramian, tolerance=1e-2)
    elif rule == "excess_mtl":
        baseline = info.state.baseline.double() * 1e9
        oracles.assert_close(baseline, wanted.state.baseline.double(), tolerance=1e-2)
    else:
        got = {k: g.double() for k, g in grads.items()}
        oracles.assert_close(got, {k: g / 1e9 for k, g in direction.items()}, tolerance=1e-2)


def test_factored_rows_of_float16_are_divided_in_float32() -> None:
    """As dense rows are: entries of 1e-9 are there when they are made."""
    params, batch = half(PARAMS), (BATCH[0].half(), BATCH[1])
    lin = scaled(jd.structured, 2.0**24)(
        partial(per_example, tiny=1e-9), params, batch, batch_dim=0
    )
    assert isinstance(lin.rows["a"], Outer)
    wide = {k: v.double() for k, v in params.items()}
    exact = jd.jacobian(per_example, wide, (batch[0].double(), batch[1]))
    found = {k: v.double() * 1e9 for k, v in jd.to_dense(lin.rows).items()}
    oracles.assert_close(found, exact, tolerance=1e-2)


@linearizations
@pytest.mark.parametrize("batch_dim", [0, None])
def test_metric(linearize: str, batch_dim: Any) -> None:
    options = {
        "batch_dim": batch_dim,
        "linearize": LINEARIZE[linearize],
        "metric": _metric,
    }
    scaled = jd.gramian(per_example, PARAMS, BATCH, loss_scale=2.0**9, **options)
    plain = jd.gramian(per_example, PARAMS, BATCH, **options)
    oracles.assert_close(scaled, plain, tolerance=1e-14)
    oracles.assert_close(
        jd.jd_step(per_example, PARAMS, BATCH, loss_scale=2.0**9, **options),
        jd.jd_step(per_example, PARAMS, BATCH, **options),
        tolerance=1e-13,
    )


@pytest.mark.parametrize("batch_dim", [0, None])
def test_aux_buffers_and_dtypes_of_losses(batch_dim: Any) -> None:
    def fn(params: Any, buffers: Any, batch: Any) -> Any:
        losses = per_example(params, buffers, batch)
        buffers["count"].add_(1)
        return losses, {"twice": 2 * losses, "name": "aux"}

    buffers = {"count": torch.zeros(())}
    params, batch = half(PARAMS), (BATCH[0].half(), BATCH[1])
    run = partial(
        jd.value_and_jd_step, fn, params, batch, buffers=buffers, batch_dim=batch_dim, has_aux=True
    )
    info, plain = run(loss_scale=16.0)[0], run()[0]
    assert info.losses.dtype == plain.losses.dtype
    assert torch.equal(info.losses, plain.losses)
    assert torch.equal(info.aux["twice"], plain.aux["twice"])
    assert info.aux["name"] == "aux"
    assert float(buffers["count"]) == 0


def test_losses_of_float16_do_not_overflow_in_the_forward_pass() -> None:
    fn = lambda p, b, x: (p["w"] * x).square()  # noqa: E731
    params = {"w": torch.tensor([8.0, 2.0], dtype=torch.float16)}
    info, grads = jd.value_and_jd_step(
        fn, params, torch.tensor([2.0, 1.0]).half(), loss_scale=2.0**9
    )
    assert info.losses.dtype == torch.float16
    assert torch.equal(info.losses, torch.tensor([256.0, 4.0]).half())
    assert torch.equal(info.gramian, torch.tensor([[64.0**2, 0], [0, 16]]))
    assert all(g.isfinite().all() for g in grads.values())


# --- transforms ---------------------------------------------------------------------------------


@linearizations
def test_scales_under_vmap(linearize: str) -> None:
    scales = torch.tensor([1.0, 2.0**10, 0.5])
    run = lambda s: jd.gramian(  # noqa: E731
        per_task, PARAMS, BATCH, linearize=LINEARIZE[linearize], loss_scale=s
    )
    for got in torch.vmap(run)(scales):
        oracles.assert_close(got, run(None), tolerance=1e-12)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("linearize", "kind"),
    [
        ("structured", "examples_0"),
        pytest.param("structured", "tasks", marks=pytest.mark.slow),
        pytest.param("dense", "tasks", marks=pytest.mark.slow),
        pytest.param("matrix_free", "tasks", marks=pytest.mark.slow),
    ],
)
def test_a_new_scale_is_no_new_compilation(kind: str, linearize: str) -> None:
    fn, batch_dim = LOSSES[kind]
    run = lambda s: jd.jd_step(  # noqa: E731
        fn, PARAMS, BATCH, batch_dim=batch_dim, linearize=LINEARIZE[linearize], loss_scale=s
    )
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    oracles.assert_close(compiled(torch.tensor(4.0)), run(None), tolerance=1e-9)
    with torch.compiler.set_stance("fail_on_recompile"):
        oracles.assert_close(compiled(torch.tensor(2.0**12)), run(None), tolerance=1e-9)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), torch.ones(3)])
def test_impossible_scales(scale: Any) -> None:
    for call in (jd.jd_step, jd.value_and_jd_step, jd.gramian):
        with pytest.raises(ValueError, match="loss_scale"):
            call(per_task, PARAMS, BATCH, loss_scale=scale)


@pytest.mark.parametrize("scale", ["dynamic", True, [2.0]])
def test_what_is_no_scale(scale: Any) -> None:
    with pytest.raises(TypeError, match="loss_scale"):
        jd.jd_step(per_task, PARAMS, BATCH, loss_scale=scale)


def test_errors_speak_of_the_model_and_not_of_the_scale() -> None:
    with pytest.raises(TypeError, match="model_fn"):
        jd.jd_step(torch.nn.Linear(2, 2), PARAMS, BATCH, loss_scale=2.0)  # pyright: ignore
    with pytest.raises(ValueError, match="depend on"):
        jd.jd_step(lambda p, b, x: x[0].sum(1), PARAMS, BATCH, loss_scale=2.0)
    with pytest.raises(TypeError, match="tensor"):
        jd.jd_step(lambda p, b, x: (x[0].sum(1), ()), PARAMS, BATCH, loss_scale=2.0)


# --- which rows are not finite ------------------------------------------------------------------


def _overflowing(params: Any, buffers: Any, batch: Any) -> Tensor:
    """Tasks of float16 on shared features; the gradient of the second overflows, its loss not."""
    shared = torch.tanh(F.linear(batch[0], params["a"], params["b"]))
    tasks = F.linear(shared, params["c"]).float().mean(0)
    return tasks * torch.tensor([1.0, 1e7, 1.0])


@linearizations
def test_an_overflow_in_float16_names_its_task(linearize: str) -> None:
    info, grads = jd.value_and_jd_step(
        _overflowing,
        half(PARAMS),
        (BATCH[0].half(), BATCH[1]),
        linearize=LINEARIZE[linearize],
        weighting=jd.mean,
    )
    assert info.losses.isfinite().all()
    assert nonfinite_rows(info).tolist() == [False, True, False]
    assert not all(g.isfinite().all() for g in grads.values())


@linearizations
@pytest.mark.parametrize("kind", ["examples_0", "both_0"])
def test_the_example_with_a_bad_input_is_named(linearize: str, kind: str) -> None:
    """Alone where one pullback serves all; without rows, 0 · NaN reaches the others."""
    x = BATCH[0].clone()
    x[4, 2] = torch.nan
    info = jd.value_and_jd_step(
        LOSSES[kind][0],
        PARAMS,
        (x, BATCH[1]),
        batch_dim=0,
        linearize=LINEARIZE[linearize],
        weighting=jd.flattened(jd.mean),
    )[0]
    named = nonfinite_rows(info)
    assert named.shape == info.losses.shape
    assert named[4].all()
    if not linearize.startswith("matrix_free"):
        assert int(named.sum()) == named[4].numel()


@linearizations
def test_a_loss_that_is_not_finite_is_named_whatever_its_gradient(linearize: str) -> None:
    offset = torch.tensor([0.0, 0.0, torch.inf], dtype=torch.float64)
    info = jd.value_and_jd_step(
        lambda p, b, x: per_task(p, b, x) + offset,
        PARAMS,
        BATCH,
        linearize=LINEARIZE[linearize],
        weighting=jd.mean,
    )[0]
    assert info.gramian.isfinite().all()
    assert nonfinite_rows(info).tolist() == [False, False, True]


def test_rows_of_a_grid_of_losses_keep_their_places() -> None:
    """The halves of a generalised Gramian run in opposite directions."""
    gramian = torch.ones(2, 3, 3, 2)
    gramian[1, 0, 0, 1] = torch.nan
    gramian[0, 2, 1, 1] = torch.inf  # off the diagonal
    info = jd.JDInfo(torch.zeros(2, 3), gramian, torch.ones(2, 3), (), ())
    assert nonfinite_rows(info).tolist() == [[False] * 3, [True, False, False]]


def test_groups_are_joined_and_nothing_is_refused() -> None:
    grams = {"a": torch.eye(2), "b": torch.diag(torch.tensor([1.0, torch.nan]))}
    info = jd.JDInfo(torch.zeros(2), grams, None, (), ())
    assert nonfinite_rows(info).tolist() == [False, True]
    for nothing in (None, {"a": None}, grams | {"c": None}):
        with pytest.raises(ValueError, match="Gramian"):
            nonfinite_rows(info._replace(gramian=nothing))
    scalar = jd.JDInfo(torch.zeros(()), torch.tensor(torch.inf), torch.ones(()), (), ())
    assert nonfinite_rows(scalar).tolist() is True


@pytest.mark.slow
@pytest.mark.compile
def test_a_bad_step_is_skipped_without_a_look_at_values() -> None:
    """found_inf of a gradient scaler, for rows: compiled, and under vmap."""

    def step(params: Any, scale: Tensor) -> Any:
        info, grads = jd.value_and_jd_step(per_task, params, BATCH, loss_scale=scale)
        bad = nonfinite_rows(info).any()
        new = {k: torch.where(bad, p, p - 0.1 * grads[k]) for k, p in params.items()}
        return new, torch.where(bad, scale / 2, scale)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for scale in (2.0**4, 2.0**900):
        given = torch.tensor(scale, dtype=torch.float64)
        for run in (compiled, step):
            new, after = run(PARAMS, given)
            assert float(after) == (scale if scale < 2**900 else scale / 2)
            moved = not all(torch.equal(new[k], PARAMS[k]) for k in PARAMS)
            assert moved == (scale < 2**900)

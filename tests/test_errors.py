"""Bad input: the error says what was expected, what came and what to do; odd input is defined."""

from __future__ import annotations

import re
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jdfunc as jd


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


PARAMS = {"w": randn(3, 5, seed=1), "b": randn(3, seed=2)}
BATCH = randn(4, 5, seed=3)


def model_fn(params: Any, buffers: Any, batch: Tensor) -> Tensor:
    return F.linear(batch, params["w"], params["b"]).sin().sum(1)


def model_with_aux(params: Any, buffers: Any, batch: Tensor) -> Any:
    losses = model_fn(params, buffers, batch)
    return losses, losses.detach() * 2


LINEARIZATIONS = ["structured", "dense"]
DIMS = [0, None]
every_way = [
    pytest.mark.parametrize("linearize", LINEARIZATIONS),
    pytest.mark.parametrize("batch_dim", DIMS),
]


def run(fn: Any = model_fn, params: Any = PARAMS, batch: Any = BATCH, **options: Any) -> Any:
    if isinstance(options.get("linearize"), str):
        options["linearize"] = getattr(jd, options["linearize"])
    return jd.value_and_jd_step(fn, params, batch, **options)


def both(test: Any) -> Any:
    for mark in every_way:
        test = mark(test)
    return test


# --- the wrong kind of thing ------------------------------------------------------------------


@pytest.mark.parametrize("fn", [None, "model", 3, PARAMS])
def test_model_fn_is_not_callable(fn: Any) -> None:
    with pytest.raises(TypeError, match="model_fn"):
        run(fn)


def test_a_module_instead_of_params() -> None:
    with pytest.raises(TypeError, match="params"):
        run(params=nn.Linear(5, 3))


@pytest.mark.parametrize("weighting", [None, "upgrad", 1.0, torch.ones(4)])
def test_weighting_is_not_callable(weighting: Any) -> None:
    with pytest.raises(TypeError, match="weighting"):
        run(weighting=weighting)


@pytest.mark.parametrize("linearize", [None, 0, torch.ones(4)])
def test_linearize_is_not_callable(linearize: Any) -> None:
    with pytest.raises(TypeError, match="linearize"):
        run(linearize=linearize)


def test_a_string_never_picks_a_linearization() -> None:
    with pytest.raises(TypeError, match="linearize"):
        jd.jd_step(model_fn, PARAMS, BATCH, linearize="dense")


@both
@pytest.mark.parametrize(
    "bad", [{"w": 1.0, "b": PARAMS["b"]}, {"w": [[1.0] * 5] * 3, "b": PARAMS["b"]}]
)
def test_params_leaves_are_not_tensors(bad: Any, linearize: str, batch_dim: Any) -> None:
    with pytest.raises(TypeError, match="params"):
        run(params=bad, linearize=linearize, batch_dim=batch_dim)


@both
def test_none_in_params(linearize: str, batch_dim: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="params"):
        run(params={**PARAMS, "extra": None}, linearize=linearize, batch_dim=batch_dim)


@both
@pytest.mark.parametrize("params", [{}, [], {"empty": {}}])
def test_no_parameters(params: Any, linearize: str, batch_dim: Any) -> None:
    """Defined: a direction of the structure of the params, which holds nothing."""
    info, grads = run(lambda p, b, x: x.sum(1), params, linearize=linearize, batch_dim=batch_dim)
    assert grads == params
    assert torch.equal(info.losses, BATCH.sum(1))
    assert torch.equal(info.gramian.double(), torch.zeros(4, 4, dtype=torch.float64))


@both
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_integer_parameter_is_named(dtype: torch.dtype, linearize: str, batch_dim: Any) -> None:
    params = {**PARAMS, "count": torch.ones(3).to(dtype)}
    with pytest.raises(ValueError, match="count") as caught:
        run(params=params, linearize=linearize, batch_dim=batch_dim)
    assert str(dtype).removeprefix("torch.") in str(caught.value)


# --- losses -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "losses",
    [
        lambda losses: 1.0,
        lambda losses: None,
        lambda losses: list(losses.unbind()),
        lambda losses: {"loss": losses},
    ],
    ids=["float", "none", "list", "dict"],
)
def test_losses_are_not_a_tensor(losses: Any, linearize: str, batch_dim: Any) -> None:
    with pytest.raises(TypeError, match="losses"):
        run(lambda p, b, x: losses(model_fn(p, b, x)), linearize=linearize, batch_dim=batch_dim)


@both
def test_aux_without_has_aux(linearize: str, batch_dim: Any) -> None:
    with pytest.raises(TypeError, match="has_aux"):
        run(model_with_aux, linearize=linearize, batch_dim=batch_dim)


@both
def test_has_aux_without_aux(linearize: str, batch_dim: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="has_aux"):
        run(has_aux=True, linearize=linearize, batch_dim=batch_dim)


@both
def test_has_aux(linearize: str, batch_dim: Any) -> None:
    options = {"linearize": getattr(jd, linearize), "batch_dim": batch_dim, "has_aux": True}
    info, grads = run(model_with_aux, **options)
    assert torch.allclose(info.aux, 2 * info.losses, rtol=1e-12, atol=1e-12)
    plain, aux = jd.jd_step(model_with_aux, PARAMS, BATCH, **options)
    oracles.assert_close(plain, grads, tolerance=0)
    assert torch.equal(aux, info.aux)


@both
def test_aux_that_is_not_a_tensor(linearize: str, batch_dim: Any) -> None:
    """It comes back as it is, or is refused by name."""

    def fn(p: Any, b: Any, x: Tensor) -> Any:
        return model_fn(p, b, x), {"name": "linear", "width": 3, "nothing": None}

    try:
        info, _ = run(fn, has_aux=True, linearize=linearize, batch_dim=batch_dim)
    except TypeError as error:
        assert "aux" in str(error)  # noqa: PT017
    else:
        assert info.aux == {"name": "linear", "width": 3, "nothing": None}


@both
def test_nothing_of_a_step_on_module_parameters_has_a_graph(linearize: str, batch_dim: Any) -> None:
    params = {k: nn.Parameter(v.clone()) for k, v in PARAMS.items()}

    def fn(p: Any, b: Any, x: Tensor) -> Any:
        losses = model_fn(p, b, x)
        return losses, losses

    info, grads = run(fn, params, has_aux=True, linearize=linearize, batch_dim=batch_dim)
    assert not any(g.requires_grad for g in grads.values())
    attached = {
        name: getattr(info, name).requires_grad for name in ("losses", "aux", "gramian", "weights")
    }
    assert not any(attached.values()), attached


@both
def test_parameter_without_elements(linearize: str, batch_dim: Any) -> None:
    params = {**PARAMS, "none": torch.zeros(0, 5, dtype=torch.float64)}
    fn = lambda p, b, x: model_fn(p, b, x) + F.linear(x, p["none"]).sum(1)  # noqa: E731
    info, grads = run(fn, params, linearize=linearize, batch_dim=batch_dim)
    assert grads["none"].shape == (0, 5)
    oracles.assert_close(info.gramian, oracles.gramian(model_fn, PARAMS, {}, BATCH))


@both
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_losses_of_the_wrong_dtype(dtype: torch.dtype, linearize: str, batch_dim: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)losses.*" + str(dtype).removeprefix("torch.")):
        run(lambda p, b, x: model_fn(p, b, x).to(dtype), linearize=linearize, batch_dim=batch_dim)


@both
def test_losses_that_depend_on_no_parameter(linearize: str, batch_dim: Any) -> None:
    """The usual reason is a model that reads its own tensors: say so."""
    for fn in (
        lambda p, b, x: x.sum(1),
        lambda p, b, x: model_fn(PARAMS, b, x),  # not the params it was given
        lambda p, b, x: model_fn(p, b, x).detach(),
    ):
        with pytest.raises(ValueError, match=r"(?s)losses.*params"):
            run(fn, linearize=linearize, batch_dim=batch_dim)


@both
def test_one_loss_that_depends_on_no_parameter(linearize: str, batch_dim: Any) -> None:
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    fn = lambda p, b, batch: model_fn(p, b, batch[0]) * batch[1]  # noqa: E731
    info, grads = run(fn, batch=(BATCH, keep), linearize=linearize, batch_dim=batch_dim)
    assert torch.equal(info.gramian[1], torch.zeros(4, dtype=torch.float64))
    assert all(g.isfinite().all() for g in grads.values())


@both
def test_a_parameter_without_influence_gets_zeros(linearize: str, batch_dim: Any) -> None:
    params = {**PARAMS, "unused": randn(2, 2)}
    _, grads = run(params=params, linearize=linearize, batch_dim=batch_dim)
    assert torch.equal(grads["unused"], torch.zeros(2, 2, dtype=torch.float64))
    _, without = run(linearize=linearize, batch_dim=batch_dim)
    oracles.assert_close({k: grads[k] for k in PARAMS}, without)


@both
def test_zero_gradients(linearize: str, batch_dim: Any) -> None:
    info, grads = run(
        lambda p, b, x: 0 * model_fn(p, b, x), linearize=linearize, batch_dim=batch_dim
    )
    assert info.weights.isfinite().all()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())


@both
@pytest.mark.parametrize("weighting", ["upgrad", "dualproj", "mgda", "mean"])
def test_one_loss_gives_its_gradient(weighting: str, linearize: str, batch_dim: Any) -> None:
    _, grads = run(
        batch=BATCH[:1],
        weighting=getattr(jd, weighting),
        linearize=linearize,
        batch_dim=batch_dim,
    )
    wanted = oracles.combine(model_fn, PARAMS, {}, BATCH[:1], torch.ones(1, dtype=torch.float64))
    oracles.assert_close(grads, wanted, tolerance=1e-9)


@pytest.mark.parametrize("linearize", LINEARIZATIONS)
def test_scalar_loss(linearize: str) -> None:
    mean = lambda p, b, x: model_fn(p, b, x).mean()  # noqa: E731
    linearization = getattr(jd, linearize)(mean, PARAMS, BATCH)
    assert linearization.gram().shape == ()
    wanted = oracles.combine(mean, PARAMS, {}, BATCH, torch.tensor(1.0, dtype=torch.float64))
    oracles.assert_close(linearization.combine(torch.tensor(1.0, dtype=torch.float64)), wanted)
    _, grads = run(mean, weighting=jd.flattened(jd.mean), linearize=linearize)
    oracles.assert_close(grads, wanted)


def test_a_weighting_of_vectors_is_flattened_for_a_grid() -> None:
    grid = lambda p, b, x: model_fn(p, b, x).reshape(2, 2)  # noqa: E731
    vector, _ = run(weighting=jd.upgrad)
    for weighting in (jd.upgrad, jd.flattened(jd.upgrad)):
        info, _ = run(grid, weighting=weighting)
        assert info.gramian.shape == (2, 2, 2, 2)
        assert torch.allclose(info.weights, vector.weights.reshape(2, 2), rtol=1e-9)


# --- batches ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("weighting", ["upgrad", "dualproj", "mgda", "mean"])
def test_empty_batch(weighting: str, linearize: str, batch_dim: Any) -> None:
    """Defined: no losses, no rows, a direction of zeros."""
    info, grads = run(
        batch=BATCH[:0],
        weighting=getattr(jd, weighting),
        linearize=linearize,
        batch_dim=batch_dim,
    )
    assert info.losses.shape == info.weights.shape == (0,)
    assert info.gramian.shape == (0, 0)
    oracles.assert_close(grads, {k: torch.zeros_like(p) for k, p in PARAMS.items()})


def test_batch_sizes_disagree() -> None:
    with pytest.raises(ValueError, match=r"(?s)4.*3|3.*4"):
        run(lambda p, b, x: model_fn(p, b, x[0]), batch=(BATCH, torch.zeros(3)), batch_dim=0)


def test_batch_leaf_without_dimensions_is_shared() -> None:
    fn = lambda p, b, x: model_fn(p, b, x[0]) * x[1]  # noqa: E731
    batch = (BATCH, torch.tensor(1.5, dtype=torch.float64))
    info, _ = run(fn, batch=batch, batch_dim=0)
    oracles.assert_close(info.gramian, oracles.gramian(fn, PARAMS, {}, batch))


def test_batch_without_tensors() -> None:
    with pytest.raises((TypeError, ValueError), match="batch"):
        run(lambda p, b, x: model_fn(p, b, BATCH), batch=(), batch_dim=0)


def test_batch_dim_of_another_structure() -> None:
    with pytest.raises(ValueError, match="batch_dim"):
        run(
            lambda p, b, x: model_fn(p, b, x[0]),
            batch=(BATCH, BATCH, BATCH),
            batch_dim=(0, None),
        )


def test_batch_dim_none_everywhere() -> None:
    """A tree of None is no example axis at all."""
    try:
        info, _ = run(lambda p, b, x: model_fn(p, b, x[0]), batch=(BATCH,), batch_dim=(None,))
    except ValueError as error:
        assert "batch_dim" in str(error)  # noqa: PT017
    else:
        oracles.assert_close(info.gramian, oracles.gramian(model_fn, PARAMS, {}, BATCH))


def test_shared_tensor_in_the_batch() -> None:
    scale = randn(5, seed=9)
    fn = lambda p, b, x: model_fn(p, b, x[0] * x[1])  # noqa: E731
    got = jd.gramian(fn, PARAMS, (BATCH, scale), batch_dim=(0, None))
    oracles.assert_close(got, oracles.gramian(fn, PARAMS, {}, (BATCH, scale)))


@both
def test_wrong_labels(linearize: str, batch_dim: Any) -> None:
    def fn(p: Any, b: Any, batch: Any) -> Tensor:
        logits = F.linear(batch[0], p["w"], p["b"])
        return F.cross_entropy(logits, batch[1], reduction="none")

    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run(fn, batch=(BATCH, torch.tensor([0, 1, 2, 3])), linearize=linearize, batch_dim=batch_dim)


# --- buffers and modules ----------------------------------------------------------------------


def _normalised() -> Any:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double().eval()
    apply_fn, params, buffers = jd.model_to_function(model)
    fn = lambda p, b, x: apply_fn(p, b, x)[0].sum(1)  # noqa: E731
    return model, fn, params, buffers


@both
@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_mismatched_buffers(change: str, linearize: str, batch_dim: Any) -> None:
    _, fn, params, buffers = _normalised()
    buffers = dict(buffers)
    if change == "missing":
        del buffers["1.running_mean"]
    elif change == "unknown":
        buffers["1.nothing"] = torch.zeros(3)
    else:
        buffers["1.running_mean"] = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"1\.nothing|1\.running_mean"):
        run(fn, params, BATCH, buffers=buffers, linearize=linearize, batch_dim=batch_dim)


@pytest.mark.parametrize("change", ["unknown", "shape"])
def test_mismatched_params(change: str) -> None:
    """A missing name is no mismatch: the module's own parameter then stays frozen."""
    _, fn, params, buffers = _normalised()
    params = dict(params)
    if change == "unknown":
        params["0.nothing"] = torch.zeros(3, dtype=torch.float64)
    else:
        params["0.weight"] = torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"0\.nothing|0\.weight"):
        run(fn, params, BATCH, buffers=buffers)


def test_model_to_function_of_something_else() -> None:
    with pytest.raises(TypeError, match="Module"):
        jd.model_to_function(model_fn)


def test_assign_grads_checks_names_and_shapes() -> None:
    model, fn, params, buffers = _normalised()
    _, grads = run(fn, params, BATCH, buffers=buffers)
    with pytest.raises(ValueError, match="nothing"):
        jd.assign_grads(model, {**grads, "nothing": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"0\.weight"):
        jd.assign_grads(model, {**grads, "0.weight": torch.zeros(2, 2, dtype=torch.float64)})
    assert all(p.grad is None for p in model.parameters()), "assigned before everything was checked"
    jd.assign_grads(model, grads)
    for key, param in model.named_parameters():
        assert torch.equal(param.grad, grads[key])


# --- weights and rows -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [torch.ones(3), torch.ones(5), torch.ones(4, 1), torch.ones(())]
)
def test_weighting_returns_the_wrong_shape(weights: Tensor) -> None:
    with pytest.raises(ValueError, match=r"(?s)weight.*4"):
        run(weighting=lambda gramian: weights.double())


def test_weighting_returns_no_tensor() -> None:
    with pytest.raises(TypeError, match="weight"):
        run(weighting=lambda gramian: [0.25] * 4)


@both
def test_combine_checks_the_weights(linearize: str, batch_dim: Any) -> None:
    linearization = getattr(jd, linearize)(model_fn, PARAMS, BATCH, batch_dim=batch_dim)
    for call in (linearization.combine, lambda w: jd.combine(linearization.rows, w)):
        with pytest.raises(ValueError, match=r"(?s)weights.*4"):
            call(torch.ones(3, dtype=torch.float64))


def test_preference_of_the_wrong_size() -> None:
    with pytest.raises(ValueError, match="preference"):
        run(weighting=lambda gramian: jd.upgrad(gramian, preference=torch.ones(3)))


def test_gram_of_different_structures() -> None:
    rows = jd.jacobian(model_fn, PARAMS, BATCH)
    with pytest.raises(ValueError, match=re.compile("structure|keys|same", re.I)):
        jd.gram(rows, {"w": rows["w"]})
    with pytest.raises(ValueError, match=re.compile("structure|keys|same", re.I)):
        jd.gram(rows, {"w": rows["w"], "c": rows["b"]})  # as many leaves, of other names
    with pytest.raises(ValueError, match=re.compile("shape|elements", re.I)):
        jd.gram(rows, {**rows, "w": rows["w"][:, :, :4]})


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_is_positive(chunk_size: int) -> None:
    with pytest.raises(ValueError, match="chunk_size"):
        jd.jacobian(model_fn, PARAMS, BATCH, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="chunk_size"):
        jd.structured(model_fn, PARAMS, BATCH, chunk_size=chunk_size)


@pytest.mark.parametrize("size", [0, -1])
def test_max_block_bytes_is_positive(size: int) -> None:
    with pytest.raises(ValueError, match="max_block_bytes"):
        jd.structured(model_fn, PARAMS, BATCH, max_block_bytes=size)


# --- not a number -----------------------------------------------------------------------------

BAD = [float("nan"), float("inf"), -float("inf")]


@both
@pytest.mark.parametrize("weighting", ["upgrad", "dualproj", "mgda", "mean"])
@pytest.mark.parametrize("value", BAD)
def test_nonfinite_input_never_gives_a_finite_direction(
    value: float, weighting: str, linearize: str, batch_dim: Any
) -> None:
    batch = BATCH.clone()
    batch[1, 2] = value
    options = {
        "weighting": getattr(jd, weighting),
        "linearize": linearize,
        "batch_dim": batch_dim,
    }
    info, grads = run(batch=batch, **options)
    assert not info.losses[1].isfinite()
    assert info.losses[[0, 2, 3]].isfinite().all()
    assert not info.gramian[1, 1].isfinite()
    assert any(not g.isfinite().all() for g in grads.values())
    run(batch=batch, on_nonfinite="propagate", **options)
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        run(batch=batch, on_nonfinite="raise", **options)
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        jd.jd_step(
            model_fn,
            PARAMS,
            batch,
            on_nonfinite="raise",
            **{**options, "linearize": getattr(jd, linearize)},
        )


@both
def test_nonfinite_gradient_of_a_finite_loss(linearize: str, batch_dim: Any) -> None:
    """√ at zero: the loss is 0, its gradient infinite."""
    params = {"w": torch.zeros(5, dtype=torch.float64)}
    fn = lambda p, b, x: (x @ p["w"]).abs().sqrt() + 1.0  # noqa: E731
    info, grads = run(fn, params, linearize=linearize, batch_dim=batch_dim)
    assert info.losses.isfinite().all()
    assert not info.gramian.isfinite().all()
    assert not grads["w"].isfinite().all()
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        run(fn, params, linearize=linearize, batch_dim=batch_dim, on_nonfinite="raise")


@both
def test_finite_input_does_not_raise(linearize: str, batch_dim: Any) -> None:
    info, grads = run(on_nonfinite="raise", linearize=linearize, batch_dim=batch_dim)
    assert info.weights.isfinite().all()
    assert all(g.isfinite().all() for g in grads.values())


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="on_nonfinite"):
        run(on_nonfinite="ignore")

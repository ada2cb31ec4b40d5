"""What would be silently wrong is refused; and half precision around a build changes no dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import jdfunc as jd
from jdfunc import curvature as cv


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    params = {name: p.detach() for name, p in net.named_parameters()}

    def apply(params, buffers, x):
        return torch.func.functional_call(net, params, (x,))

    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))
    return apply, params, (x, y), cv.curvature_layout(apply, params, None, x)


def test_autocast_around_a_build_leaves_float32(problem) -> None:
    """The model computes in bfloat16; second moments, bases and eigenvalues do not."""
    _, params, batch, layout = problem
    est = cv.ekfac(layout, likelihood=cv.cross_entropy())
    plain = cv.build(est, params, None, [batch])
    for limit in (None, 0):
        with torch.autocast("cpu", torch.bfloat16):
            curv = cv.build(est, params, None, [batch], cache_limit=limit)
        for name, held in curv.blocks.items():
            assert held.eigenvalues.dtype == held.left.dtype == torch.float32
            eye = torch.eye(held.left.shape[-1])
            torch.testing.assert_close(held.left.mT[0] @ held.left[0], eye, atol=1e-5, rtol=0)
            got, want = held.eigenvalues.sum(), plain.blocks[name].eigenvalues.sum()
            torch.testing.assert_close(got, want, rtol=3e-2, atol=0)  # bfloat16 activations


def test_a_state_without_data_has_no_curvature(problem) -> None:
    _, params, batch, layout = problem
    kfac = cv.kfac(layout, likelihood=cv.cross_entropy())
    with pytest.raises(ValueError, match="has seen data"):
        kfac.finalize(kfac.init(params))
    ekfac = cv.ekfac(layout, likelihood=cv.cross_entropy())
    state = ekfac.update(ekfac.init(params), params, {}, batch)
    with pytest.raises(ValueError, match="without a basis"):
        ekfac.finalize(state)
    with pytest.raises(ValueError, match="update_eigenvalues"):
        ekfac.finalize(ekfac.refresh(state))


def test_a_state_is_no_metric(problem) -> None:
    apply, params, batch, layout = problem
    est = cv.kfac(layout, likelihood=cv.cross_entropy())
    state = est.update(est.init(params), params, {}, batch)

    def model_fn(params, buffers, batch):
        return nn.functional.cross_entropy(
            apply(params, None, batch[0]), batch[1], reduction="none"
        )

    for call in (jd.jd_step, jd.gramian):
        with pytest.raises(TypeError, match="est.finalize"):
            call(model_fn, params, batch, metric=state)
        call(model_fn, params, batch, metric=est.finalize(state))


@pytest.mark.parametrize("field", cv.Precision._fields)
def test_precision_is_float32_at_least(problem, field) -> None:
    *_, layout = problem
    with pytest.raises(ValueError, match=f"expected {field} in float32"):
        cv.ekfac(layout, likelihood=cv.mse(), precision=cv.Precision(**{field: torch.float16}))
    with pytest.raises(TypeError, match="Precision"):
        cv.kfac(layout, likelihood=cv.mse(), precision=torch.float64)


def test_rows_with_another_number_of_row_axes(problem) -> None:
    _, params, batch, layout = problem
    curv = cv.build(cv.ekfac(layout, likelihood=cv.cross_entropy()), params, None, [batch])
    rows = {name: torch.randn(4, 2, *p.shape) for name, p in params.items()}
    with pytest.raises(ValueError, match="row_ndim"):
        cv.metric_gramian(curv, rows)
    assert cv.metric_gramian(curv, rows, row_ndim=2).shape == (4, 2, 2, 4)
    with pytest.raises(ValueError, match="row_ndim"):
        cv.metric_gramian(curv, params)


def test_outputs_of_model_to_function(problem) -> None:
    _, _, (x, y), _ = problem
    apply, params, buffers = jd.model_to_function(nn.Linear(6, 3))
    layout = cv.curvature_layout(apply, params, buffers, x)
    with pytest.raises(TypeError, match="model_to_function"):
        cv.build(cv.kfac(layout, likelihood=cv.cross_entropy()), params, buffers, [(x, y)])


def test_a_step_prepares_the_inverse_once(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """KFAC's factors are diagonalised once for the Gramian and the direction together."""
    apply, params, batch, layout = problem
    curv = cv.build(cv.kfac(layout, likelihood=cv.cross_entropy()), params, None, [batch])
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: calls.append(a.shape) or eigh(a))

    def model_fn(params, buffers, batch):
        return nn.functional.cross_entropy(
            apply(params, None, batch[0]), batch[1], reduction="none"
        )

    prepared = cv.inverse(curv)
    once = len(calls)
    want = jd.jd_step(model_fn, params, batch, metric=prepared, batch_dim=0)
    assert len(calls) == once > 0
    got = jd.jd_step(model_fn, params, batch, metric=curv, batch_dim=0)
    assert len(calls) == 2 * once
    torch.testing.assert_close(got, want, rtol=0, atol=0)

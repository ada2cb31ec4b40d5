"""Steps and curvature inside `torch.no_grad`: the same numbers, and no graph behind them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import jdfunc as jd
from jdfunc import curvature as cv


@pytest.fixture
def recurrent():
    """An LSTM in float32: its CPU kernel keeps what backward needs only where grad is enabled."""
    torch.manual_seed(0)
    module = nn.LSTM(3, 4, batch_first=True)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def apply(params, buffers, x):
        return torch.func.functional_call(module, params, (x,))[0][:, -1]

    return apply, params, torch.randn(5, 6, 3)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("linearize", [jd.structured, jd.dense])
def test_step(recurrent, batch_dim, linearize) -> None:
    apply, params, x = recurrent

    def model_fn(params, buffers, batch):
        return apply(params, buffers, batch).square().sum(1)

    def step():
        return jd.jd_step(model_fn, params, x, batch_dim=batch_dim, linearize=linearize)

    want = step()
    with torch.no_grad():
        got = step()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_curvature(recurrent) -> None:
    apply, params, x = recurrent
    data = [(x, torch.zeros(5, 4))]
    traces = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            layout = cv.curvature_layout(apply, params, None, x)
            est = cv.ekfac(layout, likelihood=cv.mse())
            traces.append(cv.trace(cv.build(est, params, None, data)))
    torch.testing.assert_close(*traces, rtol=1e-5, atol=0)


def test_no_graph_is_held() -> None:
    params = {"w": torch.ones(3, 2, requires_grad=True)}
    with torch.no_grad():
        lin = jd.structured(lambda p, b, x: (x @ p["w"]).square().sum(1), params, torch.ones(4, 3))
    tensors = [lin.losses, lin.combine(torch.ones(4))["w"], lin.gram()]
    assert not any(t.requires_grad for t in tensors)

"""Attention with different inputs: each projection of the packed weight is a block of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdfunc import curvature as cv

WIDTH, HEADS, TARGET, SOURCE = 4, 2, 3, 5


def packed_apply(module: nn.Module):
    def apply(params, buffers, inputs):
        query, memory = inputs
        out = torch.func.functional_call(module, params, (query, memory, memory))[0]
        return out.mean(1)

    return apply


def unpacked_apply(params, buffers, inputs) -> Tensor:
    """The same attention, written with three weights."""
    query, memory = inputs
    q = F.linear(query, params["q"], params["bq"])
    k = F.linear(memory, params["k"], params["bk"])
    v = F.linear(memory, params["v"], params["bv"])
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    return F.linear(mixed, params["out"], params["bout"]).mean(1)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    params = {k: torch.randn_like(v) for k, v in module.named_parameters()}
    weights = params["in_proj_weight"].chunk(3)
    biases = params["in_proj_bias"].chunk(3)
    unpacked = dict(zip("qkv", weights, strict=True))
    unpacked |= dict(zip(("bq", "bk", "bv"), biases, strict=True))
    unpacked |= {"out": params["out_proj.weight"], "bout": params["out_proj.bias"]}
    inputs = (
        torch.randn(6, TARGET, WIDTH, dtype=torch.float64),
        torch.randn(6, SOURCE, WIDTH, dtype=torch.float64),
    )
    return (packed_apply(module), params), (unpacked_apply, unpacked), inputs


@pytest.mark.parametrize("make", [cv.kfac, cv.ekfac])
@pytest.mark.parametrize("sharing", [cv.expand, cv.reduce], ids=["expand", "reduce"])
@pytest.mark.parametrize("joint", [True, False])
def test_packed_projections_are_those_of_three_weights(attention, make, sharing, joint) -> None:
    *models, inputs = attention
    targets = torch.randn(6, WIDTH, dtype=torch.float64)
    found = []
    for apply, params in models:
        layout = cv.curvature_layout(apply, params, None, inputs)
        est = make(layout, likelihood=cv.mse(), sharing=sharing, joint_bias=joint)
        found.append(cv.build(est, params, None, [(inputs, targets)], cache_limit=0))
    packed, unpacked = found
    assert packed.layout[0].shape[0] == 3
    torch.manual_seed(1)
    named = {k: torch.randn_like(v) for k, v in models[1][1].items()}
    joined = {
        "in_proj_weight": torch.cat([named[k] for k in "qkv"]),
        "in_proj_bias": torch.cat([named[k] for k in ("bq", "bk", "bv")]),
        "out_proj.weight": named["out"],
        "out_proj.bias": named["bout"],
    }
    got, want = cv.matvec(packed, joined), cv.matvec(unpacked, named)
    weights = torch.cat([want[k] for k in "qkv"])
    biases = torch.cat([want[k] for k in ("bq", "bk", "bv")])
    # 1e-11: EKFAC's eigenvectors are found in one call for three groups, or in three
    torch.testing.assert_close(got["in_proj_weight"], weights, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got["in_proj_bias"], biases, rtol=1e-11, atol=1e-11)


def test_one_input_for_all_stays_one_block(attention) -> None:
    (_, params), _, (_, memory) = attention
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()

    def apply(params, buffers, x):
        return torch.func.functional_call(module, params, (x, x, x))[0]

    layout = cv.curvature_layout(apply, params, None, memory)
    assert layout.layers[0].matrix == (1, 3 * WIDTH, WIDTH)

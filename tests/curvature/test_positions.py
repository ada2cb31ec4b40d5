"""`position_mask`: padding does not count in A, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jdfunc import curvature as cv

LENGTHS, WIDTH = (1, 4, 2, 3), 3


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH, dtype=torch.float64)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return x, mask


def tokenwise(params, buffers, inputs) -> Tensor:
    """A linear layer on every token, and the sum over those that are there."""
    x, mask = inputs
    y = nn.functional.linear(x, params["w"], params["b"])
    return torch.where(mask[..., None], y, 0).sum(1)


def built(make, inputs, mask_fn, sharing, joint=True):
    torch.manual_seed(1)
    params = {"w": torch.randn(2, WIDTH).double(), "b": torch.randn(2).double()}
    layout = cv.curvature_layout(tokenwise, params, None, inputs)
    est = make(
        layout,
        likelihood=cv.mse(reduction=cv.sum),
        sharing=sharing,
        position_mask=mask_fn,
        joint_bias=joint,
    )
    data = [(inputs, torch.randn(len(LENGTHS), 2).double())]
    return cv.build(est, params, None, data, cache_limit=0)


def test_expand_counts_the_tokens_that_are_there(padded) -> None:
    x, mask = padded
    curv = built(cv.kfac, padded, lambda inputs: inputs[1], cv.expand)
    tokens = torch.cat([x, torch.ones_like(x[..., :1])], -1)[mask]
    held = curv.blocks["w"]
    torch.testing.assert_close(held.right[0], tokens.T @ tokens / len(tokens), rtol=1e-12, atol=0)
    # B is that of all cotangents, zero at the padding: 2 I for every token
    want = 2.0 * sum(LENGTHS) * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(held.left[0], want, rtol=1e-12, atol=1e-12)


def test_reduce_takes_the_mean_of_the_tokens_that_are_there(padded) -> None:
    x, mask = padded
    curv = built(cv.kfac, padded, lambda inputs: inputs[1], cv.reduce)
    ones = torch.ones(len(LENGTHS), 1, dtype=torch.float64)
    means = torch.stack([row[keep].mean(0) for row, keep in zip(x, mask, strict=True)])
    means = torch.cat([means, ones], 1)
    want = means.T @ means / len(LENGTHS)
    torch.testing.assert_close(curv.blocks["w"].right[0], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("joint", [True, False])
def test_what_stands_in_the_padding_does_not_matter(padded, joint) -> None:
    x, mask = padded
    other = torch.where(mask[..., None], x, 1e3 * torch.randn_like(x))
    for make in (cv.kfac, cv.ekfac):
        one, two = (
            cv.to_dense(built(make, (y, mask), lambda inputs: inputs[1], cv.expand, joint))
            for y in (x, other)
        )
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_without_a_mask_padding_counts(padded) -> None:
    masked = built(cv.kfac, padded, lambda inputs: inputs[1], cv.expand).blocks["w"].right
    plain = built(cv.kfac, padded, None, cv.expand).blocks["w"].right
    assert (masked - plain).norm() > 0.1 * plain.norm()


def test_layers_of_another_length_ignore_the_mask(padded) -> None:
    x, _ = padded
    torch.manual_seed(1)
    params = {"w": torch.randn(2, WIDTH).double()}

    def pooled(params, buffers, x):
        return x.mean(1) @ params["w"].T

    layout = cv.curvature_layout(pooled, params, None, x)
    data = [(x, torch.zeros(len(LENGTHS), 2).double())]
    found = [
        cv.to_dense(
            cv.build(cv.kfac(layout, likelihood=cv.mse(), position_mask=m), params, None, data)
        )
        for m in (None, lambda x: torch.zeros(x.shape[:2]))
    ]
    assert torch.equal(*found)


def test_the_thin_basis_leaves_the_padding_out(padded) -> None:
    """Few tokens: `build` spans the basis by those that count."""
    x, mask = padded
    wide = torch.cat([x, torch.zeros(*x.shape[:2], 40, dtype=x.dtype)], -1)
    wide[..., WIDTH:] = torch.randn_like(wide[..., WIDTH:])
    torch.manual_seed(1)
    params = {"w": torch.randn(2, wide.shape[-1]).double(), "b": torch.randn(2).double()}
    layout = cv.curvature_layout(tokenwise, params, None, (wide, mask))
    est = cv.ekfac(layout, likelihood=cv.mse(), position_mask=lambda inputs: inputs[1])
    data = [((wide, mask), torch.zeros(len(LENGTHS), 2).double())]
    thin, full = (cv.build(est, params, None, data, cache_limit=limit) for limit in (2**28, 0))
    assert thin.blocks["w"].right.shape[-1] < full.blocks["w"].right.shape[-1]
    torch.testing.assert_close(cv.trace(thin), cv.trace(full), rtol=1e-12, atol=0)
    torch.testing.assert_close(cv.to_dense(thin), cv.to_dense(full), rtol=1e-9, atol=1e-9)

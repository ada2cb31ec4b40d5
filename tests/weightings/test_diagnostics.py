"""Diagnostics: they must see the failure they are for."""

import pytest
import samplers
import torch

from jdfunc.solvers import dual_cone
from jdfunc.weightings import (
    cone_residual,
    conflict_margin,
    mean,
    mgda,
    min_cosine,
    min_norm_gap,
    upgrad,
)

CONFLICT = torch.tensor([[1.0, -3.0], [-3.0, 16.0]], dtype=torch.float64)


def test_conflict_is_seen():
    assert conflict_margin(CONFLICT, mean(CONFLICT)) < -0.1
    assert min_cosine(CONFLICT, mean(CONFLICT)) < -0.1
    assert conflict_margin(CONFLICT, upgrad(CONFLICT)) >= -1e-9


def test_values_by_hand():
    gramian, w = torch.tensor([[4.0, 2.0], [2.0, 9.0]]), torch.tensor([1.0, 1.0])
    torch.testing.assert_close(
        conflict_margin(gramian, w), torch.tensor(6 / 2 / 5, dtype=torch.float64)
    )
    torch.testing.assert_close(
        min_cosine(gramian, w), torch.tensor(6 / 2 / 17**0.5, dtype=torch.float64)
    )
    torch.testing.assert_close(
        min_norm_gap(gramian, w / 2), torch.tensor((17 / 4 - 3) / 6.5, dtype=torch.float64)
    )


def test_residual_sees_infeasible_and_suboptimal():
    bounds = torch.eye(2, dtype=torch.float64)
    solved = dual_cone(CONFLICT, bounds)
    assert cone_residual(CONFLICT, bounds, solved) < 1e-9
    assert cone_residual(CONFLICT, bounds, bounds) > 0.1
    assert cone_residual(CONFLICT, bounds, solved + 1) > 0.1
    assert cone_residual(CONFLICT, bounds[0], solved[0]) < 1e-9


def test_gap_sees_a_longer_point():
    gramian = samplers.gramian(samplers.draw("full", 4))
    assert min_norm_gap(gramian, mgda(gramian)) < 1e-9
    assert min_norm_gap(gramian, torch.eye(4)[0]) > 1e-2


def test_zero_and_batches():
    gramians, w = torch.zeros(2, 3, 3), torch.ones(2, 3)
    for fn in (conflict_margin, min_cosine, min_norm_gap):
        assert fn(gramians, w).tolist() == [0, 0]
    assert cone_residual(gramians, torch.eye(3).expand(2, 3, 3), gramians + torch.eye(3)).shape == (
        2,
    )


def test_residual_of_another_shape():
    with pytest.raises(ValueError, match=r"one shape, got \[3, 3\] and \[3\]"):
        cone_residual(torch.eye(3), torch.eye(3), torch.ones(3))

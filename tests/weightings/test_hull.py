"""mgda: published values, optimality, the published truncated algorithm and TorchJD's."""

import functools

import pytest
import samplers
import torch
from properties import assert_non_conflicting, assert_on_simplex, direction

from jdfunc.solvers import frank_wolfe
from jdfunc.weightings import mgda, min_norm_gap

J1 = [[-4, 1, 1], [6, 1, 1]]
J2 = [[1, 2, -1, 0], [-2, 1, 0, 3], [0, -3, 2, 1]]
J3 = [[1, 0], [0, 1], [1, 1]]
TRUNCATED = functools.partial(frank_wolfe, epsilon=1e-3, max_iters=100)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [(J1, [0.6, 0.4]), (J2, [77 / 131, 5 / 131, 49 / 131]), (J3, [0.5, 0.5, 0])],
)
def test_published_values(rows, expected, dtype, tol):
    gramian = samplers.gramian(torch.tensor(rows, dtype=torch.float64)).to(dtype)
    torch.testing.assert_close(
        mgda(gramian), torch.tensor(expected, dtype=dtype), rtol=tol, atol=tol
    )


@pytest.mark.parametrize("m", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("family", samplers.FAMILIES)
def test_shortest_and_never_conflicting(family, m):
    gramian = samplers.gramian(samplers.draw(family, m))
    weights = mgda(gramian)
    assert_on_simplex(weights)
    assert_non_conflicting(gramian, weights)
    assert min_norm_gap(gramian, weights) <= 1e-9


@pytest.mark.parametrize("m", [2, 3, 24])
def test_vanishes_where_stationary(m):
    jacobian = samplers.draw("stationary", m)
    assert direction(jacobian, mgda(samplers.gramian(jacobian))).norm() <= 1e-4


@pytest.mark.parametrize("m", [2, 3, 8])
def test_normalised_rows(m):
    jacobian = samplers.draw("spread", m)
    norms = jacobian.norm(dim=1)
    unit = mgda(samplers.gramian(jacobian / norms[:, None]))
    weights = mgda(samplers.gramian(jacobian), normalise="l2")
    torch.testing.assert_close(weights, unit / norms, rtol=1e-6, atol=1e-9)


def test_wrong_normalisation():
    with pytest.raises(ValueError, match="None or 'l2', got 'l1'"):
        mgda(torch.eye(2), normalise="l1")


# The peer rounds each step to the input's dtype; in float64 the same steps are taken.
@pytest.mark.parametrize("m", [2, 3, 8, 16])
@pytest.mark.parametrize("family", ["full", "tall", "rankdef", "camps", "spread", "zero"])
def test_torchjd_agrees(family, m):
    torchjd = pytest.importorskip("torchjd.aggregation")
    gramian = samplers.gramian(samplers.draw(family, m))
    peer = torchjd.MGDAWeighting()(gramian)
    torch.testing.assert_close(mgda(gramian, solver=TRUNCATED), peer, rtol=1e-6, atol=1e-7)

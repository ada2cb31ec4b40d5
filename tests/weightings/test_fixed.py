"""mean, sum and constant: values and errors."""

import pytest
import torch

from jdfunc import weightings


def test_values():
    gramian = torch.eye(4).expand(2, 4, 4)
    assert torch.equal(weightings.mean(gramian), torch.full((2, 4), 0.25))
    assert torch.equal(weightings.sum(gramian), torch.ones(2, 4))
    given = torch.tensor([1.0, -2.0, 0.0, 3.0])
    assert torch.equal(weightings.constant(gramian, weights=given), given.expand(2, 4))


def test_constant_takes_the_dtype_of_the_gramian():
    weights = weightings.constant(torch.eye(2), weights=torch.ones(2, dtype=torch.float64))
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("given", [torch.ones(2), torch.tensor(1.0), torch.ones(3, 2)])
def test_constant_of_another_length(given):
    with pytest.raises(ValueError, match=r"weights with one entry per objective.*\[\*batch, 3\]"):
        weightings.constant(torch.eye(3), weights=given)

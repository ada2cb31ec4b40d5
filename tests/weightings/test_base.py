"""The weighting contract itself: adapters, generalised Gramians, errors."""

import pytest
import torch

from jdfunc.weightings import Weighting, as_weighting, flattened, mean, stateless, upgrad


def counting() -> Weighting:
    """Weights L / (1 + calls), to see losses and state pass through."""

    def update(gramian, state, *, losses=None):
        return losses / state, state + 1

    return Weighting(lambda gramian: gramian.new_ones(()), update)


def test_stateless_binds_hyperparameters():
    weighting = stateless(upgrad, preference=torch.tensor([1.0, 2.0]))
    state = weighting.init(torch.eye(2))
    weights, after = weighting.update(torch.eye(2), state, losses=torch.ones(2))
    assert (state, after) == ((), ())
    assert torch.equal(weights, torch.tensor([1.0, 2.0]))


def test_as_weighting_keeps_a_weighting():
    weighting = counting()
    assert as_weighting(weighting) is weighting
    assert torch.equal(as_weighting(mean).update(torch.eye(2), ())[0], torch.full((2,), 0.5))


@pytest.mark.parametrize("wrong", ["upgrad", 3, None])
def test_what_is_no_weighting(wrong):
    for adapt in (as_weighting, flattened):
        with pytest.raises(TypeError, match="Expected a weighting.*of type"):
            adapt(wrong)
    with pytest.raises(TypeError, match="Expected a function from a Gramian"):
        stateless(wrong)


@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (2, 1, 3)])
def test_flattened_follows_the_reversed_second_half(rows):
    jacobian = torch.randn(*rows, 7, dtype=torch.float64)
    letters = "abc"[: len(rows)]
    other = letters.upper()
    gramian = torch.einsum(f"{letters}n,{other}n->{letters}{other[::-1]}", jacobian, jacobian)
    flat = jacobian.reshape(-1, 7)
    expected = upgrad(flat @ flat.T).reshape(rows)
    torch.testing.assert_close(flattened(upgrad)(gramian), expected)
    lifted = flattened(stateless(upgrad))
    weights, state = lifted.update(gramian, lifted.init(gramian))
    torch.testing.assert_close(weights, expected)
    assert state == ()


def test_flattened_passes_losses_state_and_hyperparameters():
    lifted, gramian = flattened(counting()), torch.zeros(2, 3, 3, 2)
    losses = torch.rand(2, 3)
    weights, state = lifted.update(gramian, lifted.init(gramian), losses=losses)
    assert torch.equal(weights, losses)
    weights, state = lifted.update(gramian, state, losses=losses)
    assert torch.equal(weights, losses / 2)
    preference = torch.rand(6)
    weights = flattened(upgrad)(gramian, preference=preference)
    assert torch.equal(weights, preference.reshape(2, 3))


@pytest.mark.parametrize("shape", [(2, 3, 2, 3), (2, 2, 2), (3, 2)])
def test_flattened_wants_a_generalised_gramian(shape):
    with pytest.raises(ValueError, match=r"m1, \.\.\., mk, mk, \.\.\., m1.*reversed order"):
        flattened(mean)(torch.zeros(shape))
    with pytest.raises(TypeError, match="Gramian as a tensor"):
        flattened(mean)([1.0])

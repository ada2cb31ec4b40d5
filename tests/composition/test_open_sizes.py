"""What compiled functions run in place of torch's own: equal to it, for every argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.taps import open_sizes
from jdfunc.taps.tap import Tap

REDUCTIONS = ("none", "mean", "sum")


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(func: Any, *args: Any, tolerance: float = 1e-12, **kwargs: Any) -> None:
    """Values and derivatives; torch's function itself is not called."""
    called = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        called.append(func)
        return func(*args, **kwargs)

    rule, tap = open_sizes.RULES[func], Tap({}, {})
    tap.call = lambda _, *args, **kwargs: watched(*args, **kwargs)
    floats = [
        k for k, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and a.ndim
    ]

    def of(function: Callable[..., Tensor]) -> Any:
        def apply(*values: Tensor) -> Tensor:
            given = list(args)
            for k, value in zip(floats, values, strict=True):
                given[k] = value
            return function(*given, **kwargs)

        out, pullback = torch.func.vjp(apply, *(args[k] for k in floats))  # pyright: ignore
        return out, *pullback(torch.ones_like(out))

    got, wanted = of(lambda *a, **k: rule(tap, func, *a, **k)), of(func)
    assert not called
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (1, 5), (4, 5, 3), (2, 5, 3, 2), (0, 5)])
@pytest.mark.parametrize("func", [F.cross_entropy, F.nll_loss])
def test_cross_entropy(func: Any, shape: Any, ignore_index: int, reduction: str) -> None:
    axes = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(0, 5, axes, generator=torch.Generator().manual_seed(3))
    if target.numel() > 1:
        target.view(-1)[0] = ignore_index
    assert_same(func, randn(*shape), target, ignore_index=ignore_index, reduction=reduction)


def test_cross_entropy_of_certain_logits() -> None:
    """Log probabilities of −inf at other classes leave no NaN, in derivatives either."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64)
    assert_same(F.cross_entropy, logits, torch.tensor([2]), reduction="none")
    assert_same(F.nll_loss, logits, torch.tensor([2]), reduction="none")


def test_a_class_that_is_not_there_is_not_a_loss_of_zero() -> None:
    """Torch raises; a compiled function cannot."""
    rule = open_sizes.RULES[F.cross_entropy]
    losses = rule(
        Tap({}, {}), F.cross_entropy, randn(3, 4), torch.tensor([0, 4, -1]), reduction="none"
    )
    assert losses.isnan().tolist() == [False, True, True]


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("old", [{"reduce": False}, {"size_average": False}])
def test_old_reductions_are_left_to_torch(old: Any) -> None:
    logits, target = randn(4, 5), torch.arange(4)
    for func in (F.cross_entropy, F.nll_loss):
        got = open_sizes.RULES[func](Tap({}, {}), func, logits, target, **old)
        assert torch.equal(got, func(logits, target, **old))
    got = open_sizes.RULES[F.mse_loss](Tap({}, {}), F.mse_loss, logits, logits + 1, **old)
    assert torch.equal(got, F.mse_loss(logits, logits + 1, **old))


def test_what_is_left_to_torch() -> None:
    logits, target = randn(4, 5), torch.arange(4)
    for options in (
        {"weight": randn(5).square()},
        {"label_smoothing": 0.1},
    ):
        rule = open_sizes.RULES[F.cross_entropy]
        got = rule(Tap({}, {}), F.cross_entropy, logits, target, **options)
        assert torch.equal(got, F.cross_entropy(logits, target, **options))
    soft = randn(4, 5, seed=2).softmax(1)
    got = open_sizes.RULES[F.cross_entropy](Tap({}, {}), F.cross_entropy, logits, soft)
    assert torch.equal(got, F.cross_entropy(logits, soft))
    weight = randn(5).square()
    got = open_sizes.RULES[F.nll_loss](Tap({}, {}), F.nll_loss, logits, target, weight)
    assert torch.equal(got, F.nll_loss(logits, target, weight))
    got = open_sizes.RULES[F.mse_loss](Tap({}, {}), F.mse_loss, logits, soft, weight=soft)
    assert torch.equal(got, F.mse_loss(logits, soft, weight=soft))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("given", ["neither", "weight", "both"])
def test_layer_norm(given: str, axes: int, dtype: torch.dtype) -> None:
    x = (3 + 2 * randn(2, 4, 6)).to(dtype)
    shape = x.shape[-axes:]
    weight = None if given == "neither" else randn(*shape, seed=1).to(dtype)
    bias = randn(*shape, seed=2).to(dtype) if given == "both" else None
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-12)  # a few roundings
    assert_same(F.layer_norm, x, list(shape), weight, bias, 1e-3, tolerance=8 * tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-20, 20, 41), randn(9).float()]).to(dtype)
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-12)
    assert_same(F.gelu, x, approximate=approximate, tolerance=tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mse_loss(reduction: str) -> None:
    assert_same(F.mse_loss, randn(4, 5), randn(4, 5, seed=1), reduction=reduction)


def test_eager_calls_are_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    cases = {
        F.cross_entropy: (randn(4, 5), torch.arange(4)),
        F.nll_loss: (randn(4, 5), torch.arange(4)),
        F.layer_norm: (randn(4, 5), [5]),
        F.gelu: (randn(4, 5),),
        F.mse_loss: (randn(4, 5), randn(4, 5, seed=1)),
    }
    assert set(cases) == set(open_sizes.RULES)
    for func, args in cases.items():
        called = []
        tap = Tap({}, {})
        tap.call = lambda f, *a, called=called, **k: (called.append(f), f(*a, **k))[1]
        got = open_sizes.RULES[func](tap, func, *args)
        assert called == [func]
        oracles.assert_close(got, func(*args), tolerance=0.0)


def test_params_that_go_in_have_dense_rows() -> None:
    """Every parameter among the arguments is noted."""
    for func, args in {
        F.cross_entropy: (randn(4, 5), torch.arange(4)),
        F.gelu: (randn(4, 5),),
        F.mse_loss: (randn(4, 5), randn(4, 5, seed=1)),
        F.layer_norm: (randn(4, 5), [5], randn(5), randn(5, seed=1)),
    }.items():
        tensors = {str(k): a for k, a in enumerate(args) if isinstance(a, Tensor)}
        params = {k: a for k, a in tensors.items() if a.is_floating_point()}
        tap = Tap(params, {})
        open_sizes.RULES[func](tap, func, *args)
        assert set(tap.other_uses) == set(params)

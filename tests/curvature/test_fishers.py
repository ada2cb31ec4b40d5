"""Kinds of Fisher matrices on outputs that a model mixes, against dense Gauss-Newton matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.curvature.losses.fishers import (
    Fisher,
    default_fisher,
    empirical,
    forward_only,
    monte_carlo,
    signed,
    type2,
)
from jdfunc.curvature.losses.likelihoods import bce_with_logits, custom, mse
from jdfunc.curvature.losses.softmax import cross_entropy
from jdfunc.curvature.losses.targets import Labelled, Weighted
from jdfunc.curvature.losses.terms import Likelihood

TERMS, CLASSES, PARAMS = (2, 2), 3, 5


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def poisson() -> Likelihood:
    """A loss of the user's own, with normal labels: only their mean and variance are Poisson's."""

    def sample(f: Tensor, y: Any, key: Any, n: int) -> Tensor:
        noise = mse().sample(torch.zeros_like(f), y, key, n) * 2**0.5
        return f.exp() + (f / 2).exp() * noise

    return custom(lambda f, y: (f.exp() - y * f).sum(-1), sample=sample)


class_weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
LIKELIHOODS = {
    "mse": mse(),
    "bce": bce_with_logits(pos_weight=class_weight),
    "cross_entropy": cross_entropy(class_axis=-1, weight=class_weight, ignore_index=-1),
    "custom": poisson(),
}
KINDS = {
    "type2": type2(),
    "monte_carlo": monte_carlo(2),
    "empirical": empirical(),
    "signed": signed(),
}
each = pytest.mark.parametrize("name", LIKELIHOODS)
kinds = pytest.mark.parametrize("kind", KINDS)


def problem(name: str, b: int = 2, terms: tuple[int, ...] = TERMS) -> tuple[Tensor, Any]:
    """Outputs [b, *terms, C] and targets, one label ignored, terms of several weights."""
    f = randn(b, *terms, CLASSES, seed=1)
    y: Any = (randn(*f.shape, seed=2) > 0).double()
    if name == "cross_entropy":
        y = randn(*f.shape, seed=2).argmax(-1)
        y[0] = y[0].masked_fill(torch.arange(y[0].numel()).reshape(terms) == 0, -1)
    return f, Weighted(y, 0.5 + randn(b, *terms, seed=3).square())


def hessian(name: str, f: Tensor, y: Any) -> Tensor:
    """The Hessian of the loss of each example in all of its outputs, [b, T C, T C], by torch."""
    target, weight = y

    def own(f: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        given = weight[..., None]
        if name == "mse":
            return (given * (f - target).square()).sum()
        if name == "bce":
            return F.binary_cross_entropy_with_logits(
                f, target, given, pos_weight=class_weight, reduction="sum"
            )
        if name == "custom":
            return (given * (f.exp() - target * f)).sum()
        losses = F.cross_entropy(
            f.reshape(-1, CLASSES),
            target.flatten(),
            class_weight,
            ignore_index=-1,
            reduction="none",
        )
        return (weight.flatten() * losses).sum()

    found = []
    for one, t, w in zip(f, target, weight, strict=True):
        loss = torch.func.jacrev(torch.func.jacrev(lambda z, t=t, w=w: own(z, t, w)))
        found.append(loss(one).reshape(one.numel(), one.numel()))
    return torch.stack(found)


def vectors_of(fisher: Fisher, likelihood: Likelihood, f: Tensor, y: Any, key: Any) -> Tensor:
    assert fisher.vectors is not None
    return fisher.vectors(likelihood, f, y, key)


def squares(vectors: Tensor) -> Tensor:
    """Σ_v v vᵀ over all outputs of each example, [b, T C, T C]."""
    flat = vectors.flatten(2)
    return torch.einsum("vbi, vbj -> bij", flat, flat)


def within_terms(matrix: Tensor) -> Tensor:
    """The same without products of two terms."""
    t = matrix.shape[-1] // CLASSES
    return matrix * torch.kron(torch.eye(t), torch.ones(CLASSES, CLASSES))


@each
@pytest.mark.parametrize("terms", [(), (1,), (4,), (2, 2)], ids=str)
def test_type2_is_the_hessian_of_all_outputs(name: str, terms: tuple[int, ...]) -> None:
    f, y = problem(name, 3, terms)
    likelihood = LIKELIHOODS[name]
    vectors = vectors_of(type2(), likelihood, f, y, None)
    columns = CLASSES - 1 if name == "cross_entropy" else CLASSES
    assert vectors.shape == (columns * f[0, ..., 0].numel(), *f.shape)
    torch.testing.assert_close(squares(vectors), hessian(name, f, y), rtol=1e-12, atol=1e-12)
    if not terms:
        assert torch.equal(vectors, likelihood.root(f, y))


def test_all_terms_at_once_would_be_wrong() -> None:
    """Products of two terms do not vanish by themselves: the signs, or the zeros, are needed."""
    f, y = problem("mse")
    error = squares(mse().root(f, y)) - hessian("mse", f, y)
    assert error.norm() > hessian("mse", f, y).norm()


@each
def test_empirical_is_the_gradient_of_the_true_labels(name: str) -> None:
    f, y = problem(name)
    likelihood = LIKELIHOODS[name]
    vectors = vectors_of(empirical(), likelihood, f, y, None)
    assert vectors.shape == (1, *f.shape)
    total = torch.func.grad(lambda f: likelihood.term_loss(f, y).sum())(f)
    torch.testing.assert_close(vectors[0], total, rtol=1e-12, atol=1e-12)


@each
@pytest.mark.parametrize("kind", ["monte_carlo", "signed"])
def test_unbiased_where_terms_are_mixed(name: str, kind: str) -> None:
    """The mean over keys of (v · d)² for directions d that all terms take part in: |z| < 4."""
    f, y = problem(name)
    likelihood, directions = LIKELIHOODS[name], randn(6, f[0].numel(), seed=4)
    keys = torch.arange(4000)
    if name == "custom":  # its root takes an eigendecomposition for every key
        keys = keys[:500]

    def of_key(key: Tensor) -> Tensor:
        v = vectors_of(KINDS[kind], likelihood, f, y, key).flatten(2)
        return (v @ directions.T).square().sum(0)

    found = torch.vmap(of_key)(keys)
    exact = torch.einsum("di, bij, dj -> bd", directions, hessian(name, f, y), directions)
    z = (found.mean(0) - exact) / (found.std(0) / len(keys) ** 0.5)
    assert z.abs().max() < 4
    assert (found.std(0) > 0.1 * exact).all()  # or the test would see nothing


@each
def test_signs_leave_every_term_exact(name: str) -> None:
    f, y = problem(name)
    vectors = vectors_of(signed(), LIKELIHOODS[name], f, y, 3)
    assert vectors.shape == LIKELIHOODS[name].root(f, y).shape
    exact = hessian(name, f, y)
    torch.testing.assert_close(within_terms(squares(vectors)), exact, rtol=1e-12, atol=1e-12)


def test_signs_are_of_each_vector_and_term() -> None:
    f = torch.zeros(3, 50, 40, dtype=torch.float64)
    signs = vectors_of(signed(), mse(), f, f, 3).sum(-1).sign()  # [V, b, t]
    assert signs.abs().min() == 1
    for axis in range(3):
        first, second = signs.select(axis, 0), signs.select(axis, 1)
        n = first.numel()
        assert (first * second).sum().abs() < 4 * n**0.5
        assert first.sum().abs() < 4 * n**0.5


@pytest.mark.parametrize("samples", [1, 3])
def test_every_label_as_often_as_it_comes(samples: int) -> None:
    """Σ over all pairs of labels of two terms, their chance times the square: type-2, exactly."""
    likelihood = cross_entropy(class_axis=-1, weight=class_weight)
    f = randn(1, 2, CLASSES, seed=1)
    y, p = torch.tensor([[2, 0]]), f.softmax(-1)
    total = torch.zeros(1, 6, 6, dtype=torch.float64)
    for pair in itertools.product(range(CLASSES), repeat=2):
        labels = torch.tensor(pair).expand(1, samples, 2)
        v = vectors_of(monte_carlo(samples), likelihood, f, Labelled(y, labels), None)
        assert v.shape == (samples, 1, 2, CLASSES)
        total += p[0, 0, pair[0]] * p[0, 1, pair[1]] * squares(v)
    exact = squares(vectors_of(type2(), likelihood, f, y, None))
    torch.testing.assert_close(total, exact, rtol=1e-12, atol=1e-12)


@each
@kinds
def test_examples_under_vmap_as_one_by_one(name: str, kind: str) -> None:
    f, y = problem(name)
    likelihood, keys = LIKELIHOODS[name], torch.tensor([5, 6])

    def one(f: Tensor, y: Any, key: Tensor) -> Tensor:
        return vectors_of(KINDS[kind], likelihood, f, y, key)

    together = torch.vmap(one)(f[:, None], Weighted(*(x[:, None] for x in y)), keys)
    for k in range(2):
        alone = one(f[k : k + 1], Weighted(*(x[k : k + 1] for x in y)), keys[k])
        torch.testing.assert_close(together[k], alone, rtol=1e-12, atol=1e-12)
    if kind in ("type2", "empirical"):
        whole = vectors_of(KINDS[kind], likelihood, f, y, None)
        torch.testing.assert_close(
            squares(together[:, :, 0].movedim(0, 1)), squares(whole), rtol=1e-12, atol=1e-12
        )


@kinds
def test_what_the_key_decides(kind: str) -> None:
    f, y = problem("cross_entropy")
    vectors = [
        vectors_of(KINDS[kind], LIKELIHOODS["cross_entropy"], f, y, key)
        for key in (1, torch.tensor(1), 2)
    ]
    assert torch.equal(vectors[0], vectors[1])
    assert torch.equal(vectors[0], vectors[2]) == (kind in ("type2", "empirical"))


@each
@kinds
def test_vectors_are_constants(name: str, kind: str) -> None:
    """⟨v, f⟩ has the gradient v in f, eagerly and under `torch.func`, though v depends on f."""
    f, y = problem(name)
    likelihood, fisher = LIKELIHOODS[name], KINDS[kind]
    v = vectors_of(fisher, likelihood, f, y, 3)

    def pseudo_losses(f: Tensor) -> Tensor:
        return (vectors_of(fisher, likelihood, f, y, 3) * f).flatten(1).sum(1)

    _, pull = torch.func.vjp(pseudo_losses, f)
    ones = torch.ones(len(v), dtype=torch.float64)
    torch.testing.assert_close(pull(ones)[0], v.sum(0), rtol=1e-12, atol=1e-12)
    leaf = f.clone().requires_grad_()
    found = torch.autograd.grad(pseudo_losses(leaf).sum(), leaf)[0]
    torch.testing.assert_close(found, v.sum(0), rtol=1e-12, atol=1e-12)
    assert not vectors_of(fisher, likelihood, leaf, y, 3).requires_grad


def test_an_undefined_term_spoils_its_own_vectors_alone() -> None:
    f, y = problem("cross_entropy")
    f[0, 1, 1, 0] = torch.nan
    vectors = vectors_of(type2(), LIKELIHOODS["cross_entropy"], f, y, None)
    undefined = vectors.isnan().flatten(3).any(3)  # [V, b, first axis of terms]
    assert undefined.sum() == CLASSES - 1
    assert undefined[-(CLASSES - 1) :, 0, 1].all()


def test_kinds_without_vectors_and_by_default() -> None:
    assert forward_only().vectors is None
    likelihood = LIKELIHOODS["cross_entropy"]
    for terms, kind in [((), type2()), ((4,), monte_carlo(1)), (TERMS, monte_carlo(1))]:
        f, y = problem("cross_entropy", 2, terms)
        found = vectors_of(default_fisher(f.ndim), likelihood, f, y, 9)
        assert torch.equal(found, vectors_of(kind, likelihood, f, y, 9))


@pytest.mark.parametrize("samples", [0, -1, 1.0, True, "2"])
def test_numbers_of_samples(samples: Any) -> None:
    with pytest.raises(ValueError, match="expected samples to be a positive whole number, got"):
        monte_carlo(samples)


@pytest.mark.compile
@each
@kinds
def test_compiled(name: str, kind: str) -> None:
    f, y = problem(name)
    likelihood, key = LIKELIHOODS[name], torch.tensor(3)

    def run(f: Tensor, y: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        vectors = vectors_of(KINDS[kind], likelihood, likelihood.canonical(f), y, key)
        return vectors, likelihood.denominator(f, y)

    def each_example(f: Tensor, y: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.stack([key, key + 1])
        return torch.vmap(run)(f[:, None], Weighted(*(x[:, None] for x in y)), keys)

    for function in (run, each_example):
        compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(f, y, key), function(f, y, key), rtol=1e-12, atol=1e-12)

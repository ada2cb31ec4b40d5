"""Likelihoods against torch's own losses, in every option; labels against their frequencies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jdfunc.curvature.losses.likelihoods import bce_with_logits, custom, mse
from jdfunc.curvature.losses.softmax import cross_entropy
from jdfunc.curvature.losses.targets import Labelled, Weighted
from jdfunc.curvature.losses.terms import Likelihood, mean_reduction, sum_reduction
from jdfunc.random import fold_in, uniform

# Float64 sums of a few products of numbers below 10: a dozen roundings of 1e-16 each.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class Case(NamedTuple):
    """A likelihood on data, and what torch's own loss says of it.

    Attributes:
        likelihood: with its options.
        outputs: as the model gives them.
        y: targets.
        own: ``(z [C], index) -> scalar``, torch's own loss of the term at an index.
        mean: torch's own mean over all terms, without `Weighted`; None where nothing is left.
        labels: all labels that there are, or as good as all, [n, b, *terms(, C)].
        chances: of each label of each term, [n, b, *terms].
    """

    likelihood: Likelihood
    outputs: Tensor
    y: Any
    own: Callable[[Tensor, tuple[int, ...]], Tensor]
    mean: Tensor | None
    labels: Tensor
    chances: Tensor


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rand(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


shapes = st.tuples(
    st.integers(1, 3), st.lists(st.integers(1, 3), max_size=2), st.integers(1, 4)
).map(lambda t: (t[0], *t[1], t[2]))
seeds = st.integers(0, 2**20)


@st.composite
def cross_entropies(draw: Any) -> Case:
    shape, seed = draw(shapes), draw(seeds)
    c, terms = shape[-1], shape[:-1]
    f = draw(st.sampled_from([1.0, 30.0])) * randn(*shape, seed=seed)
    options: dict[str, Any] = {"label_smoothing": draw(st.sampled_from([0.0, 0.3, 1.0]))}
    if draw(st.booleans()):
        options["weight"] = 3 * rand(c, seed=seed + 1)
    axis = draw(st.sampled_from([1, -1]))
    soft = draw(st.booleans())
    y = randn(*shape, seed=seed + 2).softmax(-1)
    if not soft:
        y = y.argmax(-1)
        if draw(st.booleans()):
            options["ignore_index"] = draw(st.sampled_from([-100, 0, 7]))
            ignored = rand(*terms, seed=seed + 3) < draw(st.sampled_from([0.5, 1.0]))
            y = y.masked_fill(ignored, options["ignore_index"])

    def own(z: Tensor, index: tuple[int, ...]) -> Tensor:
        return F.cross_entropy(z[None], y[index][None], **options, reduction="sum")

    theirs = y.movedim(-1, 1) if soft else y
    mean = F.cross_entropy(f.movedim(-1, 1), theirs, **options)
    return Case(
        cross_entropy(class_axis=axis, **options),
        f.movedim(-1, axis),
        y.movedim(-1, axis) if soft else y,
        own,
        mean if mean.isfinite() else None,
        torch.arange(c).reshape(-1, *[1] * len(terms)).expand(-1, *terms),
        f.softmax(-1).movedim(-1, 0),
    )


@st.composite
def binary_cross_entropies(draw: Any) -> Case:
    shape, seed = draw(shapes), draw(seeds)
    f = draw(st.sampled_from([1.0, 30.0])) * randn(*shape, seed=seed)
    y = rand(*shape, seed=seed + 1)
    y = y if draw(st.booleans()) else (y < 0.5).to(y.dtype)
    options = {}
    for k, name in enumerate(["weight", "pos_weight"]):
        if draw(st.booleans()):
            start = draw(st.integers(1, len(shape) - 1))
            options[name] = 3 * rand(*shape[start:], seed=seed + 2 + k)

    def own(z: Tensor, index: tuple[int, ...]) -> Tensor:
        given = {k: v.expand(shape)[index] for k, v in options.items()}
        return F.binary_cross_entropy_with_logits(z, y[index], **given, reduction="sum")

    labels = torch.tensor(list(itertools.product([0.0, 1.0], repeat=shape[-1])), dtype=f.dtype)
    labels = labels.reshape(-1, *[1] * (f.ndim - 1), shape[-1]).expand(-1, *shape)
    chances = torch.where(labels == 1, f.sigmoid(), (-f).sigmoid()).prod(-1)
    mean = F.binary_cross_entropy_with_logits(f, y, **options)
    return Case(bce_with_logits(**options), f, y, own, mean, labels, chances)


@st.composite
def squared_errors(draw: Any) -> Case:
    shape, seed = draw(shapes), draw(seeds)
    f, y = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    # f ± √½ have the mean and the variance of N(f, ½), which is all that squares see.
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=shape[-1])), dtype=f.dtype)
    signs = signs.reshape(-1, *[1] * (f.ndim - 1), shape[-1]).expand(-1, *shape)
    return Case(
        mse(),
        f,
        y,
        lambda z, index: F.mse_loss(z, y[index], reduction="sum"),
        F.mse_loss(f, y),
        f + math.sqrt(0.5) * signs,
        torch.full(signs.shape[:-1], 0.5 ** shape[-1], dtype=f.dtype),
    )


@st.composite
def customs(draw: Any) -> Case:
    """Cross entropy that only torch knows."""
    case = draw(cross_entropies().filter(lambda case: case.mean is not None))
    f = case.likelihood.canonical(case.outputs)
    y = randn(*f.shape, seed=draw(seeds)).softmax(-1)

    def term_loss(f: Tensor, y: Tensor) -> Tensor:
        if y.dtype == torch.int64:
            y = F.one_hot(y, f.shape[-1])
        return F.cross_entropy(f.movedim(-1, 1), y.movedim(-1, 1).to(f.dtype), reduction="none")

    return Case(
        custom(term_loss),
        f,
        y,
        lambda z, index: F.cross_entropy(z[None], y[index][None], reduction="sum"),
        F.cross_entropy(f.movedim(-1, 1), y.movedim(-1, 1)),
        torch.eye(f.shape[-1], dtype=f.dtype)[case.labels],
        case.chances,
    )


@st.composite
def weighted(draw: Any, plain: Any) -> Case:
    """A case whose terms have weights, some of them 0."""
    case = draw(plain)
    terms = case.likelihood.canonical(case.outputs).shape[:-1]
    given = [size if draw(st.booleans()) else 1 for size in terms]
    weight = rand(*given, seed=draw(seeds))
    weight = torch.where(weight < 0.2, 0, 3 * weight)
    return case._replace(
        y=Weighted(case.y, weight),
        own=lambda z, index: weight.expand(terms)[index] * case.own(z, index),
    )


plain = st.one_of(cross_entropies(), binary_cross_entropies(), squared_errors(), customs())
cases = st.one_of(plain, weighted(plain))


def squares(vectors: Tensor, chances: Tensor | float = 1.0) -> Tensor:
    """Σ_v v vᵀ of each term, [b, *terms, C, C]."""
    if isinstance(chances, Tensor):
        chances = chances[..., None, None]
    return (chances * vectors[..., :, None] * vectors[..., None, :]).sum(0)


def of_terms(f: Tensor, own: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
    """A function of the outputs of every term, one by one."""
    found = [own(f[index], index) for index in itertools.product(*map(range, f.shape[:-1]))]
    return torch.stack(found).reshape(*f.shape[:-1], *found[0].shape)


def hessians(case: Case) -> Tensor:
    def one(z: Tensor, index: tuple[int, ...]) -> Tensor:
        return torch.func.jacrev(torch.func.jacrev(lambda z: case.own(z, index)))(z)

    return of_terms(case.likelihood.canonical(case.outputs), one)


def gradients(case: Case) -> Tensor:
    def one(z: Tensor, index: tuple[int, ...]) -> Tensor:
        return torch.func.grad(lambda z: case.own(z, index))(z)

    return of_terms(case.likelihood.canonical(case.outputs), one)


@given(cases)
def test_squares_of_the_root_are_the_hessian(case: Case) -> None:
    f = case.likelihood.canonical(case.outputs)
    root = case.likelihood.root(f, case.y)
    assert root.shape[1:] == f.shape
    torch.testing.assert_close(squares(root), hessians(case), **CLOSE)


@given(cases)
def test_gradients_and_losses_are_those_of_torch(case: Case) -> None:
    f = case.likelihood.canonical(case.outputs)
    torch.testing.assert_close(case.likelihood.gradient(f, case.y), gradients(case), **CLOSE)
    losses = case.likelihood.term_loss(f, case.y)
    torch.testing.assert_close(losses, of_terms(f, case.own), **CLOSE)


@given(cases)
def test_all_labels_with_their_chances_are_the_hessian(case: Case) -> None:
    f = case.likelihood.canonical(case.outputs)
    vectors = case.likelihood.sampled_gradient(f, case.y, case.labels)
    assert vectors.shape == (len(case.labels), *f.shape)
    torch.testing.assert_close(squares(vectors, case.chances), hessians(case), **CLOSE)


@given(plain, st.floats(0.5, 2))
def test_the_denominator_is_the_divisor_of_torch(case: Case, weight: float) -> None:
    f = case.likelihood.canonical(case.outputs)
    denominator = case.likelihood.denominator(f, case.y)
    assert denominator.shape == ()
    assert denominator.dtype == f.dtype
    w = case.likelihood.reduction(denominator, torch.tensor(1.0))
    if case.mean is None:
        assert denominator == 0
        assert w == 0
    else:
        losses = case.likelihood.term_loss(f, case.y)
        torch.testing.assert_close(w * losses.sum(), case.mean, **CLOSE)
    weights = Weighted(case.y, torch.tensor(weight))
    assert case.likelihood.denominator(f, weights) == denominator


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["hard", "ignored", "soft"])
@pytest.mark.parametrize("class_axis", [1, -1])
@pytest.mark.parametrize("terms", [(), (4,), (2, 3)], ids=str)
def test_every_option_of_cross_entropy_with_every_other(
    terms: tuple[int, ...], class_axis: int, kind: str, label_smoothing: float, is_weighted: bool
) -> None:
    f, y = randn(5, *terms, 3, seed=1), randn(5, *terms, 3, seed=2).softmax(-1)
    options: dict[str, Any] = {"label_smoothing": label_smoothing}
    if is_weighted:
        options["weight"] = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    theirs = y.movedim(-1, 1) if kind == "soft" else y.argmax(-1)
    if kind == "ignored":
        options["ignore_index"] = 1
    likelihood = cross_entropy(class_axis=class_axis, **options)
    mine = y.movedim(-1, class_axis) if kind == "soft" else theirs

    def mean(f: Tensor) -> Tensor:
        return F.cross_entropy(f.movedim(-1, 1), theirs, **options)

    w = likelihood.reduction(likelihood.denominator(f, mine), torch.tensor(5.0))
    torch.testing.assert_close(w * likelihood.term_loss(f, mine).sum(), mean(f), **CLOSE)
    gradient = w * likelihood.gradient(f, mine)
    torch.testing.assert_close(gradient, torch.func.grad(mean)(f), **CLOSE)
    exact = torch.func.jacrev(torch.func.jacrev(mean))(f)
    exact = exact.reshape(f[..., 0].numel(), 3, -1, 3)
    blocks = exact.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    found = w * squares(likelihood.root(f, mine)).flatten(0, -3)
    torch.testing.assert_close(found, blocks, **CLOSE)


def per_example(case: Case, function: Callable[..., Tensor], dim: int, *extra: Tensor) -> Tensor:
    """A function of (f, y), run on batches of one by `torch.vmap`, the batch axis at ``dim``."""
    f = case.likelihood.canonical(case.outputs)[:, None]
    y, labels = case.y, [labels.movedim(1, 0).unsqueeze(2) for labels in extra]
    terms = f.shape[2:-1]
    if isinstance(y, Weighted):
        weight = y.weight.expand(len(f), *y.weight.shape[1:])[:, None]
        y = Weighted(y.target[:, None], weight)
    else:
        y = y[:, None]
    found = torch.vmap(function)(f, y, *labels)
    assert len(terms) == f.ndim - 3
    return found.movedim(0, dim).squeeze(dim + 1) if found.ndim > 1 else found


@given(cases)
def test_batches_of_one_under_vmap(case: Case) -> None:
    likelihood, f = case.likelihood, case.likelihood.canonical(case.outputs)
    # One C × C Hessian after another, or all at once, may have other signs of eigenvectors.
    root, one = (
        squares(x) for x in (likelihood.root(f, case.y), per_example(case, likelihood.root, 1))
    )
    torch.testing.assert_close(one, root, **CLOSE)
    gradient = likelihood.gradient(f, case.y)
    torch.testing.assert_close(per_example(case, likelihood.gradient, 0), gradient, **CLOSE)
    sampled = likelihood.sampled_gradient(f, case.y, case.labels)
    one = per_example(case, likelihood.sampled_gradient, 1, case.labels)
    torch.testing.assert_close(one, sampled, **CLOSE)
    one = per_example(case, likelihood.denominator, 0)
    torch.testing.assert_close(one.sum(), likelihood.denominator(f, case.y), **CLOSE)


@given(cases)
def test_without_gradients_and_with_inputs_as_they_were(case: Case) -> None:
    f = case.likelihood.canonical(case.outputs)
    before = f.clone()
    root, gradient = case.likelihood.root(f, case.y), case.likelihood.gradient(f, case.y)
    with torch.no_grad():
        assert torch.equal(case.likelihood.root(f, case.y), root)
        assert torch.equal(case.likelihood.gradient(f, case.y), gradient)
    assert torch.equal(f, before)


# --- numbers far apart ------------------------------------------------------------------------

SURE = [
    [0.0, 0.0],
    [0.0, 50.0],
    [50.0, 0.0],
    [0.0, 700.0, 0.0],
    [700.0, 0.0, -700.0],
    [0.0, 0.0, 700.0],
    [-46.0, 0.0, -23.0],  # p_1 near 1, the last r about 1e-5
    [1e-9, 0.0, -1e-9, 2.0],
    [20.0, 20.0, -20.0],
    [5.0],
]


def exact_hessian(logits: list[float]) -> list[list[Any]]:
    """diag(p) − p pᵀ in 80 digits, its diagonal as p_i Σ_{j ≠ i} p_j."""
    with mpmath.workdps(80):
        e = [mpmath.exp(z) for z in logits]
        p = [x / sum(e) for x in e]
        n = range(len(p))
        rest = [mpmath.fsum(p[j] for j in n if j != i) for i in n]
        return [[p[i] * rest[i] if i == j else -p[i] * p[j] for j in n] for i in n]


@pytest.mark.parametrize("logits", SURE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_entry_of_a_saturated_softmax(logits: list[float], dtype: torch.dtype) -> None:
    """Relative errors: no entry, however small, is lost in the rounding of a larger one."""
    f = torch.tensor([logits], dtype=dtype)
    root = cross_entropy().root(f, torch.tensor([0]))
    assert root.shape == (len(logits) - 1, 1, len(logits))
    found, exact = squares(root.double())[0], exact_hessian(logits)
    # A logit of size 700 is known to 700 eps, and so is the logarithm of its probability.
    rtol = 2e3 * torch.finfo(dtype).eps
    for i, j in itertools.product(range(len(logits)), repeat=2):
        value = float(exact[i][j])
        # p smaller than tiny underflow, and roots of numbers below tiny lose digits.
        tiny = torch.finfo(dtype).tiny ** 0.5 if dtype == torch.float32 else 1e-280
        assert abs(found[i, j].item() - value) <= rtol * abs(value) + tiny


@pytest.mark.parametrize("logit", [0.0, 40.0, -40.0, 600.0, -600.0])
def test_every_entry_of_a_saturated_sigmoid(logit: float) -> None:
    f = torch.tensor([[logit]], dtype=torch.float64)
    with mpmath.workdps(80):
        p = 1 / (1 + mpmath.exp(-mpmath.mpf(logit)))
        rest = 1 / (1 + mpmath.exp(mpmath.mpf(logit)))
        variance, minus = float(p * rest), float(-rest)
    likelihood = bce_with_logits()
    root = likelihood.root(f, torch.ones_like(f))
    assert root.square().item() == pytest.approx(variance, rel=1e-12, abs=0)
    gradient = likelihood.gradient(f, torch.ones_like(f))
    assert gradient.item() == pytest.approx(minus, rel=1e-12, abs=0)


@pytest.mark.parametrize("pivot", range(4))
def test_any_class_may_be_the_largest(pivot: int) -> None:
    f = torch.zeros(1, 4, dtype=torch.float64)
    f[0, pivot] = 3
    root = cross_entropy().root(f, torch.tensor([0]))
    p = f[0].softmax(-1)
    torch.testing.assert_close(squares(root)[0], p.diag() - p.outer(p), rtol=0, atol=1e-15)


def test_classes_without_a_chance() -> None:
    f = torch.tensor([[0.0, -math.inf, 1.0]], dtype=torch.float64)
    likelihood, y = cross_entropy(), torch.tensor([0])
    p = f[0].softmax(-1)
    torch.testing.assert_close(
        squares(likelihood.root(f, y))[0], p.diag() - p.outer(p), rtol=0, atol=1e-15
    )
    assert likelihood.gradient(f, y).isfinite().all()
    assert likelihood.term_loss(f, y).item() == pytest.approx(-p[0].log().item())


LOSSES = {"mse": mse(), "cross_entropy": cross_entropy(), "bce": bce_with_logits()}
losses = pytest.mark.parametrize("name", LOSSES)


def targets(name: str, f: Tensor) -> Tensor:
    return f.argmax(-1) if name == "cross_entropy" else (f > 0).to(f.dtype)


@losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_single(name: str, dtype: torch.dtype) -> None:
    f = (5 * randn(4, 3, seed=1)).to(dtype)
    likelihood, y = LOSSES[name], targets(name, f)
    wide = y if name == "cross_entropy" else y.float()
    labels = likelihood.sample(f, y, 3, 2)
    for found, expected in [
        (likelihood.root(f, y), likelihood.root(f.float(), wide)),
        (likelihood.gradient(f, y), likelihood.gradient(f.float(), wide)),
        (likelihood.denominator(f, y), likelihood.denominator(f.float(), wide)),
        (
            likelihood.sampled_gradient(f, y, labels),
            likelihood.sampled_gradient(f.float(), wide, labels),
        ),
    ]:
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


@losses
def test_no_examples_and_no_terms(name: str) -> None:
    for shape in [(0, 3), (2, 0, 3)]:
        f = torch.zeros(shape)
        likelihood, y = LOSSES[name], targets(name, f)
        assert likelihood.root(f, y).shape[1:] == shape
        assert likelihood.gradient(f, y).shape == shape
        labels = likelihood.sample(f, y, 1, 4)
        assert likelihood.sampled_gradient(f, y, labels).shape == (4, *shape)
        assert likelihood.denominator(f, y) == 0


def test_terms_that_do_not_count_are_zero_whatever_their_outputs_are() -> None:
    f = torch.tensor([[math.nan, 1.0], [math.inf, math.inf], [0.5, 1.0]], dtype=torch.float64)
    y = torch.tensor([-1, -1, 0])
    ignoring = cross_entropy(ignore_index=-1, label_smoothing=0.1)
    zero = torch.tensor([0.0, 0.0, 2.0])
    checked = [(ignoring, y, torch.zeros(1, 3, dtype=torch.int64))]
    for name, likelihood in LOSSES.items():
        target = torch.zeros(3, dtype=torch.int64) if name == "cross_entropy" else f.nan_to_num()
        labels = torch.zeros(1, 3, dtype=torch.int64) if name == "cross_entropy" else f[None]
        checked.append((likelihood, Weighted(target, zero), labels))
    for likelihood, given_y, labels in checked:
        for vectors in (
            likelihood.root(f, given_y),
            likelihood.gradient(f, given_y)[None],
            likelihood.sampled_gradient(f, given_y, labels),
        ):
            assert not vectors[:, :2].any()  # NaN would be true
        assert not likelihood.term_loss(f, given_y)[:2].any()
        assert likelihood.root(f, given_y)[:, 2].any()


# --- labels -----------------------------------------------------------------------------------


def test_frequencies_of_classes() -> None:
    f = torch.tensor([[0.0, 1.0, -math.inf, 2.0, -60.0]], dtype=torch.float64)
    n = 40000
    labels = cross_entropy().sample(f, None, 5, n)
    assert labels.shape == (n, 1)
    assert labels.dtype == torch.int64
    counts, p = torch.bincount(labels.flatten(), minlength=5), f[0].softmax(-1)
    assert counts[2] == counts[4] == 0  # the second has a chance of 1e-27
    seen = [0, 1, 3]
    z = (counts[seen] - n * p[seen]) / (n * p[seen] * (1 - p[seen])).sqrt()
    assert z.abs().max() < 4


def test_classes_at_the_edges_of_the_uniform_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first class with a chance for the smallest number there is, the last for the largest."""
    edges = torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64)
    monkeypatch.setattr(
        "jdfunc.curvature.losses.softmax.uniform", lambda key, n: edges.repeat(n // 2)
    )
    low = -math.inf
    for logits in ([0.0, 0.0, 0.0], [low, 0.0, 1.0, low], [0.1] * 49, [low, 3.0], [-800.0, 0.0]):
        f = torch.tensor([[logits], [logits]], dtype=torch.float32)
        labels = cross_entropy(class_axis=-1).sample(f, None, 0, 1).flatten()
        possible = f[0, 0].double().softmax(-1).nonzero().flatten()
        assert labels.tolist() == [possible[0], possible[-1]]


def test_probabilities_that_do_not_sum_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest uniform number is beyond the sum of the probabilities, by rounding."""
    largest = 1 - 2.0**-53
    monkeypatch.setattr(
        "jdfunc.curvature.losses.softmax.uniform",
        lambda key, n: torch.full((n,), largest, dtype=torch.float64),
    )
    f = randn(200, 30, seed=1)
    assert (f.softmax(-1).cumsum(-1)[:, -1] < largest).any()
    assert (cross_entropy().sample(f, None, 0, 1) == 29).all()


def test_sums_that_grow_where_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parallel cumsum may round one sum up and the next down."""
    cumsum, up = torch.Tensor.cumsum, torch.tensor([0, 2.0**-52, 0], dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda p, dim: cumsum(p, dim) + up)
    monkeypatch.setattr(
        "jdfunc.curvature.losses.softmax.uniform",
        lambda key, n: torch.full((n,), 0.5, dtype=torch.float64),
    )
    f = torch.tensor([[0.0, -math.inf, 0.0]], dtype=torch.float64)
    assert cross_entropy().sample(f, None, 0, 1).item() == 2


@pytest.mark.parametrize("name", ["mse", "cross_entropy", "bce"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_labels_do_not_depend_on_the_precision(name: str, dtype: torch.dtype) -> None:
    """Chances are those of the outputs as they are, not of rounded probabilities."""
    f, likelihood = randn(50, 40, seed=1).to(dtype), LOSSES[name]
    labels, wide = (likelihood.sample(x, None, 5, 400).double() for x in (f, f.double()))
    torch.testing.assert_close(labels, wide, rtol=0, atol=0)


def test_frequencies_of_binary_labels() -> None:
    f = torch.tensor([[0.0, 1.0, -2.0, 800.0, -800.0]], dtype=torch.float64)
    n = 40000
    labels = bce_with_logits().sample(f, None, 5, n)
    assert labels.shape == (n, 1, 5)
    assert set(labels.flatten().tolist()) == {0.0, 1.0}
    p, mean = f[0].sigmoid(), labels.mean((0, 1))
    assert mean[3:].tolist() == [1.0, 0.0]
    z = (mean[:3] - p[:3]) / (p[:3] * (1 - p[:3]) / n).sqrt()
    assert z.abs().max() < 4
    assert torch.corrcoef(labels[:, 0, :3].T)[0, 1:].abs().max() < 4 / math.sqrt(n)


def test_normal_labels_have_variance_one_half() -> None:
    f = torch.tensor([[0.0, 1e8]], dtype=torch.float32)
    n = 40000
    labels = mse().sample(f, None, 5, n)
    noise = labels[:, 0] - f[0]
    assert (noise.mean(0) / math.sqrt(0.5 / n)).abs().max() < 4
    assert ((noise.var(0) - 0.5) / (0.5 * math.sqrt(2 / n))).abs().max() < 4
    # The noise is not rounded to the float32 numbers near 1e8, which are 8 apart.
    vectors = mse().sampled_gradient(f, f, labels)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors[:, 0].double(), -2 * noise, rtol=1e-6, atol=1e-6)


@losses
def test_labels_are_those_of_their_key(name: str) -> None:
    f = randn(3, 4, 5, seed=1).movedim(-1, 1) if name == "cross_entropy" else randn(3, 4, 5, seed=1)
    likelihood = LOSSES[name]
    f = likelihood.canonical(f)
    labels = likelihood.sample(f, None, 11, 6)
    assert labels.shape[:3] == (6, 3, 4)
    torch.testing.assert_close(likelihood.sample(f, None, 11, 6), labels, rtol=0, atol=0)
    assert torch.equal(likelihood.sample(f, None, torch.tensor(11), 6), labels)
    assert torch.equal(likelihood.sample(f, None, 11, 2), labels[:2])  # more are added behind
    assert not torch.equal(likelihood.sample(f, None, 12, 6), labels)
    assert not torch.equal(labels[0], labels[1])
    keys = fold_in(torch.arange(4), 1)
    together = torch.vmap(lambda key: likelihood.sample(f, None, key, 6))(keys)
    for key, drawn in zip(keys, together, strict=True):
        assert torch.equal(likelihood.sample(f, None, key, 6), drawn)
    with pytest.raises(ValueError, match="expected one key"):
        likelihood.sample(f, None, keys, 6)


def test_labels_of_neighbouring_keys_are_independent() -> None:
    f = torch.zeros(1, 2, dtype=torch.float64)
    keys = torch.arange(20001)
    labels = torch.vmap(lambda key: cross_entropy().sample(f, None, key, 1))(keys).flatten()
    pairs = torch.bincount(2 * labels[:-1] + labels[1:], minlength=4)
    z = (pairs - 5000) / math.sqrt(20000 * 0.25 * 0.75)
    assert z.abs().max() < 4


# --- targets ----------------------------------------------------------------------------------


@losses
def test_labels_from_outside(name: str) -> None:
    f, likelihood = randn(3, 4, seed=1), LOSSES[name]
    y = targets(name, f)
    labels = likelihood.sample(f, y, 5, 2)
    weight = torch.tensor([1.0, 0.0, 2.0])
    given_labels = labels.movedim(0, 1)
    assert torch.equal(likelihood.sample(f, Labelled(y, given_labels), 99, 2), labels)
    either = (
        Labelled(Weighted(y, weight), given_labels),
        Weighted(Labelled(y, given_labels), weight),
    )
    for given_y in either:
        assert torch.equal(likelihood.sample(f, given_y, 99, 2), labels)
        for field in ("root", "gradient", "term_loss", "denominator"):
            found = getattr(likelihood, field)(f, given_y)
            assert torch.equal(found, getattr(likelihood, field)(f, Weighted(y, weight)))
    with pytest.raises(ValueError, match=r"expected 3 labels for each of 3 examples.*\(3, 2"):
        likelihood.sample(f, Labelled(y, given_labels), 99, 3)


@losses
def test_weights_multiply_weights(name: str) -> None:
    f, likelihood = randn(3, 4, seed=1), LOSSES[name]
    y = targets(name, f)
    twice = Weighted(Weighted(y, torch.tensor([1, 2, 3])), torch.tensor([0.5]))
    once = Weighted(y, torch.tensor([0.5, 1.0, 1.5]))
    assert torch.equal(likelihood.root(f, twice), likelihood.root(f, once))
    assert torch.equal(likelihood.gradient(f, twice), likelihood.gradient(f, once))


def test_whole_weights_are_not_rounded() -> None:
    """Integer tensors have float32 roots."""
    f = randn(1, 2, seed=1)
    root = mse().root(f, Weighted(f, torch.tensor([3])))
    torch.testing.assert_close(squares(root)[0], 6 * torch.eye(2).double(), rtol=0, atol=1e-14)
    masked = mse().root(torch.zeros(2, 1), Weighted(f, torch.tensor([True, False])))
    assert masked[0, :, 0].tolist() == [pytest.approx(math.sqrt(2)), 0.0]


def test_outputs_without_an_axis_of_classes() -> None:
    for likelihood in (mse(), bce_with_logits(pos_weight=torch.tensor(2.0)), squared()):
        f = likelihood.canonical(randn(5, seed=1))
        assert f.shape == (5, 1)
        y = (randn(5, seed=2) > 0).double()
        labels = torch.stack([y, 1 - y])
        if likelihood.reduction is mean_reduction:
            assert torch.equal(likelihood.gradient(f, y), likelihood.gradient(f, y[:, None]))
            assert torch.equal(likelihood.root(f, y), likelihood.root(f, y[:, None]))
            assert torch.equal(
                likelihood.sampled_gradient(f, y, labels),
                likelihood.sampled_gradient(f, y[:, None], labels[..., None]),
            )
        assert likelihood.denominator(f, y) == 5


def squared(**kwargs: Any) -> Likelihood:
    return custom(lambda f, y: (f - y.reshape(f.shape)).square().sum(-1), **kwargs)


# --- reductions -------------------------------------------------------------------------------


def test_reductions() -> None:
    four, two, zero = torch.tensor(4.0), torch.tensor(2.0), torch.tensor(0.0)
    ema = torch.tensor(1.5)
    assert mean_reduction(four, two) == 0.25
    assert mean_reduction(four, two, ema, 100) == 0.25
    assert sum_reduction(four, two) == 1
    assert sum_reduction(four, two, ema).item() == pytest.approx(1 / 1.5)
    assert sum_reduction(four, two, num_data=100) == 50
    assert sum_reduction(four, two, ema, 100) == 50
    assert sum_reduction(four, torch.tensor(2), num_data=100) == 50  # a count may be whole
    assert mean_reduction(zero, two) == 0
    assert sum_reduction(zero, two) == 1
    assert sum_reduction(zero, zero, zero) == 0
    assert sum_reduction(zero, zero, num_data=100) == 0
    for size in (0, -1):
        with pytest.raises(ValueError, match="expected num_data > 0"):
            sum_reduction(four, two, num_data=size)


# --- losses given as functions ----------------------------------------------------------------


def test_a_loss_of_the_users_own() -> None:
    """Poisson regression: Hessian diag(eᶠ), whatever y is; targets may be a dict."""
    poisson = custom(lambda f, y: y["scale"] * (f.exp() - y["count"] * f).sum(-1))
    f, scale = randn(2, 3, 4, seed=1), rand(2, 3, seed=2)
    y = {"count": rand(2, 3, 4, seed=3), "scale": scale}
    expected = (scale[..., None] * f.exp()).diag_embed()
    torch.testing.assert_close(squares(poisson.root(f, y)), expected, **CLOSE)
    expected = scale[..., None] * (f.exp() - y["count"])
    torch.testing.assert_close(poisson.gradient(f, y), expected, **CLOSE)
    assert poisson.denominator(f, y) == 6
    with pytest.raises(ValueError, match="expected a sampler for Monte-Carlo labels"):
        poisson.sample(f, y, 1, 1)


def test_samplers_and_divisors_of_the_users_own() -> None:
    drawn = squared(sample=mse().sample, denominator=mse().denominator, reduction=sum_reduction)
    f, y = randn(2, 3, seed=1), randn(2, 3, seed=2)
    labels = drawn.sample(f, y, 5, 4)
    assert torch.equal(labels, mse().sample(f, y, 5, 4))
    expected = mse().sampled_gradient(f, y, labels)
    torch.testing.assert_close(drawn.sampled_gradient(f, y, labels), expected, **CLOSE)
    assert drawn.denominator(f, y) == 6
    assert drawn.reduction is sum_reduction
    other = squared(sampled_gradient=lambda f, y, labels: labels + 1)
    assert torch.equal(other.sampled_gradient(f, y, labels), labels + 1)


def test_a_loss_without_curvature() -> None:
    linear = custom(lambda f, y: (f * y).sum(-1))
    f = randn(2, 3, seed=1)
    assert not linear.root(f, f).any()
    constant = custom(lambda f, y: y)
    assert not constant.root(f, f[:, 0]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_is_not_taken_for_a_negative_eigenvalue(dtype: torch.dtype) -> None:
    """Softmax Hessians are singular: half of the smallest eigenvalues come out negative."""
    likelihood = custom(lambda f, y: f.logsumexp(-1))
    f = 3 * randn(300, 7, seed=1).to(dtype)
    assert (torch.linalg.eigvalsh(softmax_hessian(f)) < 0).any()
    error = squares(likelihood.root(f, f)) - softmax_hessian(f)
    assert error.abs().max() < 20 * torch.finfo(dtype).eps


def softmax_hessian(f: Tensor) -> Tensor:
    p = f.softmax(-1)
    return p.diag_embed() - p[..., None] * p[..., None, :]


def concave(f: Tensor, y: Tensor) -> Tensor:
    return f[..., 0].square() - 1e-6 * f[..., 1].square()


def test_a_negative_eigenvalue_is_an_error_or_nan() -> None:
    f = torch.zeros(2, 2, dtype=torch.float64)
    likelihood = custom(lambda f, y: torch.where(y > 0, f.square().sum(-1), concave(f, y)))
    y = torch.tensor([1.0, -1.0])
    with pytest.raises(ValueError, match=r"got a Hessian with the eigenvalue -2e-06"):
        likelihood.root(f, y)
    root = torch.vmap(likelihood.root)(f[:, None], y[:, None])
    assert root[0].isfinite().all()
    assert root[1].isnan().all()
    assert likelihood.gradient(f, y).isfinite().all()


def test_outputs_that_are_not_finite_have_no_root() -> None:
    f = torch.tensor([[math.nan, 1.0], [0.0, 1.0]], dtype=torch.float64)
    root = squared().root(f, torch.zeros_like(f))
    assert root[:, 0].isfinite().all()  # (f − y)² has a Hessian whatever f is
    root = custom(lambda f, y: f.exp().sum(-1)).root(f, f)
    assert root[:, 0].isnan().all()
    assert root[:, 1].isfinite().all()


# --- what is not understood -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mse(reduction="mean"), TypeError, "reduction to be a function.*got str"),
        (lambda: bce_with_logits(reduction=None), TypeError, "reduction to be a function"),
        (lambda: cross_entropy(reduction="sum"), TypeError, "reduction to be a function"),
        (lambda: squared(reduction="sum"), TypeError, "reduction to be a function"),
        (lambda: bce_with_logits(weight=2.0), TypeError, "weight to be a tensor, got float"),
        (lambda: bce_with_logits(pos_weight=[2.0]), TypeError, "pos_weight to be a tensor"),
        (lambda: cross_entropy(weight=[1.0]), TypeError, "weight to be a tensor, got list"),
        (lambda: cross_entropy(weight=torch.ones(2, 2)), ValueError, r"each class.*\(2, 2\)"),
        (lambda: cross_entropy(class_axis=0), ValueError, "class axis other than 0"),
        (lambda: cross_entropy(label_smoothing=1.5), ValueError, r"in \[0, 1\], got 1.5"),
        (lambda: cross_entropy(label_smoothing=-0.1), ValueError, r"in \[0, 1\], got -0.1"),
        (lambda: custom(3), TypeError, "term_loss to be a function, got int"),
    ],
)
def test_options(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("likelihood", "outputs", "error", "message"),
    [
        (mse(), (torch.zeros(2),), TypeError, "outputs to be one tensor, got tuple"),
        (mse(), torch.zeros(2, dtype=torch.int64), ValueError, "floating-point outputs"),
        (mse(), torch.tensor(1.0), ValueError, "batch axis, got a scalar"),
        (cross_entropy(), torch.zeros(3), ValueError, r"classes on axis 1, got shape \(3,\)"),
        (cross_entropy(class_axis=-1), torch.zeros(3), ValueError, r"classes on axis -1"),
        (cross_entropy(class_axis=2), torch.zeros(2, 3), ValueError, "classes on axis 2"),
        (cross_entropy(class_axis=-2), torch.zeros(2, 3), ValueError, "classes on axis -2"),
    ],
)
def test_outputs(
    likelihood: Likelihood, outputs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        likelihood.canonical(outputs)


def soft(*shape: int) -> Tensor:
    return torch.full(shape, 1 / 3)


@pytest.mark.parametrize(
    ("likelihood", "y", "error", "message"),
    [
        (mse(), soft(2, 1), ValueError, r"shape of the outputs, \(2, 3\), got \(2, 1\)"),
        (mse(), None, TypeError, "targets to be a tensor, got NoneType"),
        (bce_with_logits(), soft(3, 2), ValueError, "shape of the outputs"),
        (bce_with_logits(weight=torch.ones(2)), soft(2, 3), ValueError, "weight that broadcast"),
        (bce_with_logits(pos_weight=torch.ones(1, 2, 3)), soft(2, 3), ValueError, "pos_weight"),
        (cross_entropy(), {"y": 1}, TypeError, "targets to be a tensor, got dict"),
        (cross_entropy(), torch.zeros(2, 3, dtype=torch.int64), ValueError, "integer labels"),
        (cross_entropy(), torch.zeros(2, dtype=torch.bool), ValueError, "integer labels"),
        (cross_entropy(), torch.zeros(2), ValueError, "or soft ones of the shape of the outputs"),
        (cross_entropy(ignore_index=1), soft(2, 3), ValueError, "where ignore_index is set"),
        (cross_entropy(), torch.tensor([0, 3]), RuntimeError, "out of bounds"),
        (cross_entropy(), torch.tensor([0, -1]), RuntimeError, "out of bounds"),
        (cross_entropy(weight=torch.ones(1)), torch.tensor([0, 1]), ValueError, "of 3 classes"),
        (mse(), Weighted(soft(2, 3), torch.ones(3)), ValueError, r"weights of the terms.*\(2,\)"),
        (mse(), Weighted(soft(2, 3), torch.ones(1, 2)), ValueError, "weights of the terms"),
        (squared(), soft(2, 1, 3)[:, 0, :2], RuntimeError, "shape"),
        (custom(lambda f, y: f.sum()), soft(2, 3), ValueError, r"each term, \(2,\), got \(\)"),
        (custom(lambda f, y: 1.0), soft(2, 3), TypeError, "term_loss returns to be a tensor"),
    ],
)
def test_targets(likelihood: Likelihood, y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        likelihood.gradient(torch.zeros(2, 3), y)


def test_labels_of_another_shape() -> None:
    f, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="expected labels of shape"):
        cross_entropy().sampled_gradient(f, y, y)
    with pytest.raises(ValueError, match="shape of the outputs"):
        mse().sampled_gradient(f, f, f)
    assert uniform(1, 1).dtype == torch.float64  # which labels are drawn with

"""`build`: traversals, progress, caches, and data that is not what it should be."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from judged import KEY, LIKELIHOODS, dense, layout_of
from models import randn
from nets import NETS
from torch import Tensor

from jdfunc import curvature as cv
from jdfunc import pytrees

TIGHT = 1e-12


def assert_near(value: Tensor, expected: Tensor, tolerance: float) -> None:
    distance, size = float((value - expected).norm()), float(expected.norm())
    assert distance <= tolerance * size + 1e-300, f"distance {distance:.3e}, norm {size:.3e}"


class Loader:
    """Counts traversals; its length may be hidden, its batches changed each time."""

    def __init__(self, data, change=lambda time, data: data) -> None:
        self.data, self.change, self.times, self.given = data, change, 0, 0

    def __iter__(self):
        self.times += 1
        for batch in self.change(self.times, self.data):
            self.given += 1
            yield batch


class Sized(Loader):
    def __len__(self) -> int:
        return len(self.data)


def given(name: str, method=cv.ekfac, sizes=(3, 2, 4), **kwargs):
    """A problem, its batches and an estimator."""
    problem = NETS[name].build(size=sum(sizes))
    y = oracle.targets_for(oracle.LOSSES["cross_entropy"], problem[0](*problem[1:]))
    parts = torch.arange(len(y)).split(list(sizes))
    data = [(pytrees.map(lambda x, i=i: x[i], problem[3]), y[i]) for i in parts]
    kwargs = {"likelihood": LIKELIHOODS["cross_entropy"](), "fisher": cv.type2()} | kwargs
    return problem, data, method(layout_of(problem), **kwargs)


@pytest.mark.parametrize(
    ("method", "options", "traversals"),
    [(cv.kfac, {}, 1), (cv.ekfac, {}, 1), (cv.ekfac, {"cache_limit": 0}, 2)],
    ids=["kfac", "cached", "not cached"],
)
def test_traversals_and_progress(method, options, traversals):
    problem, data, est = given("mlp", method)
    forwards = 0
    apply = est.setup.layout.apply

    def counted(params, buffers, inputs):
        nonlocal forwards
        forwards += 1
        return apply(params, buffers, inputs)

    setup = est.setup._replace(layout=est.setup.layout._replace(apply=counted))
    est = method(setup.layout, likelihood=setup.likelihood, fisher=setup.fisher)
    for kind in (Sized, Loader):
        loader, calls = kind(data), []
        forwards = 0
        cv.build(
            est, *problem[1:3], loader, progress=lambda *call, c=calls: c.append(call), **options
        )
        assert loader.times == traversals
        assert loader.given == forwards == 3 * traversals
        total = 3 if method is cv.kfac else 6
        done = [1, 2, 3, 4, 5, 6][:total] if method is cv.kfac or options else [1, 2, 3, 6]
        assert calls == [(k, total if kind is Sized else None) for k in done]


@pytest.mark.parametrize("sharing", [cv.expand, cv.reduce], ids=["expand", "reduce"])
@pytest.mark.parametrize(
    "name", ["grouped", "embedding", "layer_norm", "class_token", "tied_embedding", "cnn"]
)
def test_a_cache_changes_nothing(name, sharing):
    problem, data, est = given(name, sharing=sharing)
    cached, streamed, partly = (
        dense(cv.build(est, *problem[1:3], data, cache_limit=limit), problem[1])
        for limit in (2**28, 0, 700)
    )
    assert_near(cached, streamed, 1e-9)  # two bases: thin and whole
    assert_near(partly, streamed, 1e-10)


def test_the_limit_is_what_activations_and_cotangents_take():
    """Linear layers 2 -> 3 without bias, 5 examples, one vector: 5 (2 + 3) numbers of 8 bytes."""
    params, x = {"w": randn(3, 2)}, randn(5, 2)
    layout = cv.curvature_layout(lambda p, b, x: F.linear(x, p["w"]), params, None, x)
    est = cv.ekfac(layout, likelihood=cv.mse(), fisher=cv.empirical())
    for limit, times in ((200, 1), (199, 2)):
        loader = Loader([(x, randn(5, 3))])
        cv.build(est, params, None, loader, cache_limit=limit)
        assert loader.times == times
    assert (layout.bytes_fixed, layout.bytes_each) == (16, 24)


@pytest.mark.parametrize("limit", [0, 2**28])
def test_batches_have_keys_of_their_own_and_the_same_in_both_passes(limit):
    problem, data, est = given("mlp", fisher=cv.monte_carlo())
    same = [data[0]] * 2
    once, twice = (
        dense(cv.build(est, *problem[1:3], d, KEY, cache_limit=limit), problem[1])
        for d in (same[:1], same)
    )
    assert not torch.equal(once, twice)  # other labels for the second batch
    again = dense(cv.build(est, *problem[1:3], same, KEY, cache_limit=2**28 - limit), problem[1])
    assert_near(again, twice, 1e-9)


@pytest.mark.parametrize("limit", [0, 2**28])
@pytest.mark.parametrize("method", [cv.kfac, cv.ekfac])
def test_num_data(method, limit):
    problem, data, est = given("mlp", method, likelihood=cv.cross_entropy(reduction=cv.sum))
    one, two = (
        dense(cv.build(est, *problem[1:3], data, num_data=n, cache_limit=limit), problem[1])
        for n in (None, 36)
    )
    assert_near(two, 4 * one, TIGHT)
    with pytest.raises(ValueError, match="num_data > 0"):
        cv.build(est, *problem[1:3], data, num_data=0)


def test_iterators_are_enough_for_one_traversal():
    problem, data, est = given("mlp")
    _, _, kfac = given("mlp", cv.kfac)
    for e in (est, kfac):
        expected = dense(cv.build(e, *problem[1:3], data), problem[1])
        assert torch.equal(dense(cv.build(e, *problem[1:3], iter(data)), problem[1]), expected)
        with pytest.raises(ValueError, match=r"check_determinism.*iterator"):
            cv.build(e, *problem[1:3], iter(data), check_determinism=True)
    with pytest.raises(ValueError, match=r"cache_limit.*generator"):
        cv.build(est, *problem[1:3], (batch for batch in data), cache_limit=0)


@pytest.mark.parametrize("method", [cv.kfac, cv.ekfac])
@pytest.mark.parametrize("options", [{}, {"cache_limit": 0}, {"check_determinism": True}])
def test_no_data_is_said_to_be_none(method, options):
    problem, data, est = given("mlp", method)
    for empty in ([], Loader([])):
        with pytest.raises(ValueError, match="at least one batch"):
            cv.build(est, *problem[1:3], empty, **options)
    with pytest.raises(ValueError, match="at least one example"):
        cv.build(est, *problem[1:3], [(data[0][0][:0], data[0][1][:0])], **options)


def test_averages_are_not_built():
    problem, data, est = given("mlp", decay=0.9)
    with pytest.raises(ValueError, match=r"decay=0.9"):
        cv.build(est, *problem[1:3], data)
    with pytest.raises(TypeError, match="buffers"):
        cv.build(given("mlp")[2], problem[1], {"mean": 3.0}, data)


def _dropout(params, buffers, inputs):
    return F.dropout(F.linear(inputs, params["w"]), 0.5, True)


@pytest.mark.parametrize("method", [cv.kfac, cv.ekfac])
def test_check_determinism_names_the_model(method):
    params, x = {"w": randn(2, 3)}, randn(8, 3)
    layout = cv.curvature_layout(lambda p, b, x: F.linear(x, p["w"]), params, None, x)
    batch = x, torch.randint(0, 2, (8,))
    est = method(layout._replace(apply=_dropout), likelihood=cv.cross_entropy())
    with pytest.raises(ValueError, match="dropout"):
        cv.build(est, params, None, [batch], check_determinism=True)
    cv.build(est, params, None, [batch])  # nobody asked
    est = method(layout, likelihood=cv.cross_entropy(), fisher=cv.monte_carlo())
    cv.build(est, params, None, [batch], KEY, check_determinism=True)  # labels are no dropout


def test_check_determinism_names_the_data():
    problem, data, est = given("mlp")

    def shuffled(time, data):
        return [data[(time + k) % 3] for k in range(3)]

    with pytest.raises(ValueError, match="loader that shuffles"):
        cv.build(est, *problem[1:3], Loader(data, shuffled), check_determinism=True)
    still = Loader(data)
    cv.build(est, *problem[1:3], still, check_determinism=True)
    assert still.times == 3


@pytest.mark.parametrize(
    "change", [lambda t, d: d[: 4 - t], lambda t, d: [*d, *d[:1]] * (t - 1) or d]
)
def test_a_second_traversal_of_other_data_is_noticed(change):
    problem, data, est = given("mlp")
    with pytest.raises(ValueError, match="two traversals of the same data"):
        cv.build(est, *problem[1:3], Loader(data, change), cache_limit=0)


@pytest.mark.parametrize("sharing", [cv.expand, cv.reduce], ids=["expand", "reduce"])
@pytest.mark.parametrize("limit", [0, 2**28])
def test_nan_is_said_where_it_is(limit, sharing):
    problem, data, est = given("mlp", sharing=sharing)
    batch = data[0][0] * float("nan"), data[0][1]
    with pytest.raises(ValueError, match=r"NaN or inf.*'\d\.weight, (left|right)'"):
        cv.build(est, *problem[1:3], [data[1], batch], cache_limit=limit)


@pytest.mark.parametrize("limit", [0, 2**28])
def test_nan_is_said_of_what_has_no_basis(limit):
    """A diagonal block, and the diagonal side of an embedding."""
    params, x = {"scale": randn(2000)}, randn(2, 2000)
    layout = cv.curvature_layout(lambda p, b, x: (x * p["scale"])[:, :2], params, None, x)
    assert not layout.rests[0].rule.full
    est = cv.ekfac(layout, likelihood=cv.mse())
    if limit:
        assert cv.trace(cv.build(est, params, None, [(x, x[:, :2])], cache_limit=limit)) > 0
        return
    with pytest.raises(ValueError, match="'scale'"):
        cv.build(est, params, None, [(x / 0, x[:, :2])], cache_limit=limit)


def test_more_classes_than_memory():
    """V = 1999 vectors of 2000 numbers; a pullback of V² C numbers would be 64 GB."""
    classes, x = 2000, randn(1, 2)
    params = {"w": 0.1 * randn(classes, 2)}
    layout = cv.curvature_layout(lambda p, b, x: F.linear(x, p["w"]), params, None, x)
    est = cv.kfac(layout, likelihood=cv.cross_entropy(), fisher=cv.type2())
    p = (x @ params["w"].mT).softmax(1)
    trace = x.square().sum() * (p - p.square()).sum()
    assert layout.bytes_each == 8 * classes
    curv = cv.build(est, params, None, [(x, torch.tensor([5]))])
    assert_near(cv.trace(curv), trace, 1e-11)


def test_bases_of_few_vectors_are_thin():
    """Three examples of one vector each: no side needs more than three columns."""
    params, x = {"w": randn(8, 9)}, randn(3, 9)
    layout = cv.curvature_layout(lambda p, b, x: F.linear(x, p["w"]), params, None, x)
    est = cv.ekfac(layout, likelihood=cv.mse(), fisher=cv.empirical())
    for limit, columns in ((2**28, (3, 3)), (0, (8, 9))):
        held = cv.build(est, params, None, [(x, randn(3, 8))], cache_limit=limit).blocks["w"]
        assert (held.left.shape[-1], held.right.shape[-1]) == columns


@pytest.mark.parametrize("sharing", [cv.expand, cv.reduce], ids=["expand", "reduce"])
def test_no_two_tensors_of_a_fresh_state_share_memory(sharing):
    """`build` adds to them in place."""
    torch.manual_seed(0)
    params = {"w": torch.randn(2, 3), "b": torch.randn(2), "scale": torch.ones(())}

    def apply(params, buffers, x):
        return torch.nn.functional.linear(x, params["w"], params["b"]) * params["scale"]

    layout = cv.curvature_layout(apply, params, None, torch.randn(4, 3))
    state = cv.ekfac(layout, likelihood=cv.mse(), sharing=sharing).init(params)
    places = [leaf.data_ptr() for leaf in pytrees.leaves(state)]
    assert len(places) > 8
    assert len(set(places)) == len(places)

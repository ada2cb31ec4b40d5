"""Estimators as functions of states: averages that decay, new bases, merging, purity, keys."""

from __future__ import annotations

import copy
import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F
from judged import (
    FISHERS,
    KEY,
    KINDS,
    LIKELIHOODS,
    REDUCTIONS,
    Setting,
    basis_of,
    dense,
    estimator,
    flat,
    layout_of,
)
from models import randn
from nets import NETS
from torch import Tensor

from jdfunc import curvature as cv
from jdfunc import pytrees
from jdfunc.curvature.estimate.basis import Basis
from jdfunc.curvature.estimate.finalize import reexpressed
from jdfunc.curvature.losses.targets import Labelled, Weighted

TIGHT = 1e-12  # float64, sums of up to a few thousand products
METHODS = {"kfac": cv.kfac, "ekfac": cv.ekfac}
METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def assert_near(value: Tensor, expected: Tensor, tolerance: float = TIGHT) -> None:
    distance, size = float((value - expected).norm()), float(expected.norm())
    assert distance <= tolerance * size + 1e-300, f"distance {distance:.3e}, norm {size:.3e}"


def assert_same(tree, other, tolerance: float = TIGHT) -> None:
    """Leaf by leaf."""
    assert pytrees.same_structure(tree, other)
    for one, two in zip(pytrees.leaves(tree), pytrees.leaves(other), strict=True):
        assert_near(one.double(), two.double(), tolerance)


def given(name: str, loss: str, kind: str, reduction: str = "mean", method=cv.ekfac, **kwargs):
    """A problem with targets for 9 examples, and an estimator of it."""
    net = NETS[name]
    problem = net.build(size=9)
    y = oracle.targets_for(oracle.LOSSES[loss], problem[0](*problem[1:]))
    layout = layout_of(problem, net.batch_axis)
    joint, sharing = kwargs.pop("joint", True), kwargs.pop("sharing", "expand")
    setting = Setting(name, loss, kind, reduction, joint, sharing)
    return problem, y, estimator(setting, method, layout, **kwargs)


def batches(problem, y: Tensor, sizes: list[int]) -> list:
    parts = torch.arange(len(y)).split(sizes)
    return [(pytrees.map(lambda x, i=i: x[i], problem[3]), y[i]) for i in parts]


def stream(est, problem, data, state=None, step="update"):
    """Put batches into a state, each with a key of its own."""
    state = est.init(problem[1]) if state is None else state
    for k, batch in enumerate(data):
        state = getattr(est, step)(state, problem[1], problem[2], batch, KEY + k)
    return state


# --- averages that decay ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "shared_positions", "embedding", "class_token"])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_equal_batches_decay_as_the_zero_bias_formula_says(name, kind):
    """weight ← decay weight + 1, value ← value + (x − value) / weight, of factors (2.3)."""
    decay = 0.95
    problem, y, est = given(name, "cross_entropy", kind, method=cv.kfac, decay=decay)
    once = est.setup._replace(decay=None)
    plain = cv.kfac(once.layout, likelihood=once.likelihood, fisher=once.fisher)
    data = batches(problem, y, [3, 3, 3])
    weight, values = 0.0, None
    for batch in data:
        x = plain.finalize(stream(plain, problem, [batch])).blocks
        weight = decay * weight + 1
        values = x if values is None else values
        values = pytrees.map(lambda v, new, w=weight: v + (new - v) / w, values, x)
    assert_same(est.finalize(stream(est, problem, data)).blocks, values)


@pytest.mark.parametrize(("decay", "joint"), [(0.5, True), (0.9, False), (0.0, True)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["mlp", "everything"])
def test_numerator_and_divisor_decay_alike(name, reduction, decay, joint):
    """Batches of 4, 2 and 3 examples: each counts by its size, the older the less."""
    options = {"reduction": reduction, "joint": joint}
    problem, y, est = given(name, "mse", "type2", method=cv.kfac, decay=decay, **options)
    _, _, plain = given(name, "mse", "type2", method=cv.kfac, **options)
    sizes = [4, 2, 3]
    data = batches(problem, y, sizes)
    blocks = [plain.finalize(stream(plain, problem, [batch])).blocks for batch in data]
    age = [decay ** (2 - k) for k in range(3)]
    by_size = [a * n for a, n in zip(age, sizes, strict=True)]
    of_squares = by_size if reduction == "mean" else age
    curv = est.finalize(stream(est, problem, data))
    for block in curv.layout:
        for side, place in enumerate(("left", "right")):
            found = getattr(curv.blocks[block.name], place)
            if block.activations is None and found.shape[-1] == 1:
                assert (found == 1).all()
                continue
            weights = by_size if block.activations == side else of_squares
            parts = [getattr(held[block.name], place) for held in blocks]
            total = sum(w * part for w, part in zip(weights, parts, strict=True))
            assert_near(found, total / sum(weights))
    whole = est.finalize(stream(est, problem, data), num_data=100)
    factor = 1.0
    if reduction == "sum":  # of the data, not of one batch
        factor = 100 * sum(age) / sum(by_size)
    assert_near(dense(whole, problem[1]), factor * dense(curv, problem[1]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_eigenvalues_decay_in_their_basis(reduction):
    decay, sizes = 0.7, [4, 2, 3]
    problem, y, est = given("mlp", "bce", "empirical", reduction, decay=decay)
    data = batches(problem, y, sizes)
    start = est.refresh(stream(est, problem, data[:1]))
    zero = pytrees.map(torch.zeros_like, (start.eigenvalues, start.eigen_counters))
    one_each = [
        est.update_eigenvalues(
            start._replace(eigenvalues=zero[0], eigen_counters=zero[1]), *problem[1:3], batch
        )
        for batch in data
    ]
    state = stream(est, problem, data, start)  # one pass for both
    age = [decay ** (2 - k) for k in range(3)]
    for name, found in state.eigenvalues.items():
        total = sum(a * one.eigenvalues[name] for a, one in zip(age, one_each, strict=True))
        assert_near(found, total)
    for found, sums in zip(
        state.eigen_counters, ([1, 1, 1], sizes, [3 * n for n in sizes]), strict=True
    ):
        total = sum(a * n for a, n in zip(age, sums, strict=True))
        assert_near(found, torch.tensor(total, dtype=torch.float64))
    divisor = sum(a * 3 * n for a, n in zip(age, sizes, strict=True))
    divisor = divisor if reduction == "mean" else sum(age)
    curv = est.finalize(state)
    for name, found in state.eigenvalues.items():
        assert_near(curv.blocks[name].eigenvalues, found / divisor)


def test_one_batch_decays_to_itself():
    """Zero bias: after one batch, and after the same one many times, the average is that batch."""
    problem, y, est = given("mlp", "mse", "type2", decay=0.99)
    _, _, plain = given("mlp", "mse", "type2")
    data = batches(problem, y, [9])
    expected = dense(cv.build(plain, *problem[1:3], data), problem[1])
    state = est.refresh(stream(est, problem, data))
    state = stream(est, problem, data * 5, state)
    assert_near(dense(est.finalize(state), problem[1]), expected, 1e-10)


# --- refreshed bases --------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("name", ["mlp", "everything", "grouped"])
def test_basis_every_refreshes_at_its_steps_alone(name, decay):
    """Steps 0, 3 and 6; a step that refreshes goes over its batch twice."""
    problem, y, slow = given(name, "cross_entropy", "type2", decay=decay)
    calls = []

    def apply(params, buffers, inputs):
        calls.append(1)
        return problem[0](params, buffers, inputs)

    setup = slow.setup._replace(layout=slow.setup.layout._replace(apply=apply))
    est = cv.ekfac(
        setup.layout,
        likelihood=setup.likelihood,
        fisher=setup.fisher,
        decay=decay,
        basis_every=3,
    )
    state = by_hand = est.init(problem[1])
    before = {}
    for k, batch in enumerate(batches(problem, y, [2, 1, 1, 1, 2, 1, 1])):
        calls.clear()
        state = est.update(state, *problem[1:3], batch)
        assert len(calls) == (2 if k % 3 == 0 else 1)
        if k % 3 == 0:  # factors first, and then eigenvalues in the new basis
            by_hand = slow.update(by_hand._replace(basis={}), *problem[1:3], batch)
            held = pytrees.map(torch.clone, by_hand)
            fresh = slow.refresh(held)
            if k and decay is not None:
                carried = reexpressed(
                    by_hand.eigenvalues, before, fresh.basis, slow.setup.layout, True
                )
                fresh = fresh._replace(eigenvalues=carried, eigen_counters=by_hand.eigen_counters)
            by_hand = slow.update_eigenvalues(fresh, *problem[1:3], batch)
        else:
            by_hand = slow.update(by_hand, *problem[1:3], batch)
        before = by_hand.basis
        assert_same(state, by_hand, 1e-11)
    assert int(state.step) == 7


def _orthonormal(h: int, d: int) -> Tensor:
    return torch.linalg.qr(randn(h, d, d))[0]


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("name", ["mlp", "grouped", "in_out_storage", "embedding", "layer_norm"])
def test_carried_eigenvalues_are_the_diagonal_in_the_new_basis(name, joint):
    """diag(Q_newᵀ (Q_old diag(λ) Q_oldᵀ) Q_new), block by block, with random bases."""
    problem, y, est = given(name, "cross_entropy", "type2", joint=joint, decay=0.5)
    layout = est.setup.layout
    state = est.refresh(stream(est, problem, batches(problem, y, [9])))

    def turned(state):
        basis = {
            k: Basis(*(() if isinstance(q, tuple) else _orthonormal(*q.shape[:2]) for q in sides))
            for k, sides in state.basis.items()
        }
        return state._replace(basis=basis)

    values = pytrees.map(lambda v: torch.rand_like(v), state.eigenvalues)
    old = turned(state)._replace(eigenvalues=values)
    new = turned(state)
    carried = reexpressed(values, old.basis, new.basis, layout, joint)
    one = state.eigen_counters._replace(
        batches=torch.ones(()), examples=torch.ones(()), denominator=torch.ones(()).double()
    )
    before, after = (
        est.finalize(s._replace(eigenvalues=v, eigen_counters=one))
        for s, v in ((old, values), (new, carried))
    )
    matrix = dense(before, problem[1])
    index = oracle.indices(problem[1])
    assert carried.keys() == values.keys()
    for block in after.layout:
        here = torch.cat([index[n].flatten() for n in block.params])
        basis, found = basis_of(block, after.blocks[block.name], problem[1])
        assert_near(found, ((basis @ matrix[here[:, None], here]) * basis).sum(1))


def test_a_refresh_with_decay_keeps_the_trace_and_one_without_starts_anew():
    problem, y, averaged = given("mlp", "cross_entropy", "type2", decay=0.9)
    _, _, summed = given("mlp", "cross_entropy", "type2")
    data = batches(problem, y, [3, 3, 3])
    for est in (averaged, summed):
        state = stream(est, problem, data[1:], est.refresh(stream(est, problem, data[:1])))
        again = est.refresh(state)
        assert not torch.equal(again.basis["0.weight"].left, state.basis["0.weight"].left)
        assert_same(again.factors, state.factors, 0)
        before = cv.trace(est.finalize(state))
        if est is averaged:
            assert_near(cv.trace(est.finalize(again)), before)
            assert_same(again.eigen_counters, state.eigen_counters, 0)
        else:
            assert before > 0
            assert all((values == 0).all() for values in again.eigenvalues.values())
            assert all((c == 0).all() for c in again.eigen_counters)


@pytest.mark.parametrize("method", [cv.kfac, cv.ekfac])
def test_hyperparameters_are_checked(method):
    layout = layout_of(NETS["mlp"].build())
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay"):
            method(layout, likelihood=cv.mse(), decay=decay)
    for name in ("chunk_size", "vector_chunk", *(("basis_every",) if method is cv.ekfac else ())):
        with pytest.raises(ValueError, match=name):
            method(layout, likelihood=cv.mse(), **{name: 0})
    with pytest.raises(TypeError, match=r"cross_entropy\(\), got mse"):
        method(layout, likelihood=cv.mse)
    with pytest.raises(TypeError, match=r"fisher.*got type2"):
        method(layout, likelihood=cv.mse(), fisher=cv.type2)
    with pytest.raises(TypeError, match="sharing"):
        method(layout, likelihood=cv.mse(), sharing="expand")
    with pytest.raises(TypeError, match="layout"):
        method(NETS["mlp"], likelihood=cv.mse())


def test_order_of_the_steps_is_checked():
    problem, y, est = given("mlp", "cross_entropy", "type2")
    kfac = cv.kfac(est.setup.layout, likelihood=est.setup.likelihood)
    batch, empty = batches(problem, y, [9])[0], est.init(problem[1])
    with pytest.raises(ValueError, match="call refresh"):
        est.finalize(empty)
    with pytest.raises(ValueError, match="call refresh"):
        est.update_eigenvalues(empty, *problem[1:3], batch)
    with pytest.raises(ValueError, match="kfac"):
        kfac.update_eigenvalues(empty, *problem[1:3], batch)
    with pytest.raises(ValueError, match="forward_only"):
        cv.ekfac(est.setup.layout, likelihood=cv.mse(), fisher=cv.forward_only())
    assert kfac.refresh(empty) is empty
    for method, state in ((kfac, empty), (est, est.refresh(empty))):
        with pytest.raises(ValueError, match="has seen data"):
            method.finalize(state)


def test_params_are_those_of_the_layout():
    """Other shapes, and missing or additional parameters, are named."""
    problem, _, est = given("mlp", "cross_entropy", "type2")
    params = problem[1]
    for odd in (
        params | {"0.weight": randn(5, 3)},
        {k: v for k, v in params.items() if k != "0.weight"},
        {**params, "2.bias": randn(1)},
        {**params, "other": randn(1)},
    ):
        with pytest.raises(ValueError, match=r"parameters of the layout.*(0\.w|2\.b|other)"):
            est.init(odd)
    for method in METHODS.values():
        assert method(est.setup.layout, likelihood=cv.mse()).init(params).step.dtype == torch.int64


# --- merging ----------------------------------------------------------------------------------


@METHOD
@pytest.mark.parametrize("name", ["mlp", "everything", "tied_embedding"])
def test_merging_is_associative_and_commutative_and_streaming(name, method):
    """Eigenvalues in a basis that all have, too."""
    problem, y, est = given(name, "cross_entropy", "empirical", method=method)
    data = batches(problem, y, [4, 2, 3])
    basis = est.refresh(stream(est, problem, data))
    none = pytrees.map(torch.zeros_like, (basis.step, basis.factors, basis.counters))
    start = basis._replace(step=none[0], factors=none[1], counters=none[2])
    one, two, three = (stream(est, problem, [batch], start) for batch in data)
    expected = stream(est, problem, data, start)
    for merged in (
        cv.merge(cv.merge(one, two), three),
        cv.merge(one, cv.merge(two, three)),
        cv.merge(cv.merge(three, one), two),
        cv.merge(start, cv.merge(two, cv.merge(one, three))),
    ):
        assert_same(merged, expected, 1e-11)
        if method is cv.ekfac:
            assert merged.eigenvalues


def test_states_that_do_not_belong_together_are_not_merged():
    problem, y, est = given("mlp", "cross_entropy", "type2")
    data = batches(problem, y, [4, 5])
    one, two = (est.refresh(stream(est, problem, [batch])) for batch in data)
    with pytest.raises(ValueError, match="same basis"):
        cv.merge(one, two)
    with pytest.raises(ValueError, match="refresh"):
        cv.merge(est.init(problem[1]), two)
    for other in ("linear_no_bias", "deep_linear", "residual"):
        problem, _, est = given(other, "mse", "type2")
        with pytest.raises(ValueError, match="one estimator"):
            cv.merge(one._replace(basis={}, eigenvalues={}), est.init(problem[1]))


def test_states_of_other_shapes_are_not_merged():
    """A factor [1, 1, 1] would broadcast."""
    states = []
    for size in (1, 4):
        params, x = {"w": randn(size, size)}, randn(3, size)
        layout = cv.curvature_layout(lambda p, b, x: F.linear(x, p["w"]), params, None, x)
        states.append(cv.kfac(layout, likelihood=cv.mse()).init(params))
    with pytest.raises(ValueError, match="shapes"):
        cv.merge(*states)


def test_averages_of_two_workers_merge_into_that_of_both():
    """With a mean: as if every batch had been the batches of both."""
    problem, y, est = given("mlp", "cross_entropy", "type2", method=cv.kfac, decay=0.6)
    data = batches(problem, y, [2, 2, 1, 4])
    merged = cv.merge(*(stream(est, problem, part) for part in (data[:2], data[2:])))
    both = [
        tuple(torch.cat(sides) for sides in zip(*pair, strict=True))
        for pair in zip(data[:2], data[2:], strict=True)
    ]
    expected = est.finalize(stream(est, problem, both))
    assert_near(dense(est.finalize(merged), problem[1]), dense(expected, problem[1]))


# --- purity -----------------------------------------------------------------------------------


def _bits(tree) -> list:
    return [
        (x.clone(), x._version, x.requires_grad, x.grad)
        for x in pytrees.leaves(tree)
        if isinstance(x, Tensor)
    ]


def _unchanged(tree, before) -> bool:
    tensors = [x for x in pytrees.leaves(tree) if isinstance(x, Tensor)]
    return all(
        torch.equal(x, value) and (x._version, x.requires_grad, x.grad) == rest
        for x, (value, *rest_) in zip(tensors, before, strict=True)
        for rest in [tuple(rest_)]
    )


@pytest.mark.parametrize("fisher", [cv.type2, cv.monte_carlo, cv.empirical, cv.signed])
@pytest.mark.parametrize("name", ["everything", "batch_norm", "attention_self"])
def test_every_function_leaves_what_it_is_given(name, fisher):
    """No bit, no version, no .grad, no generator; parameters that require gradients too."""
    problem, y, _ = given(name, "cross_entropy", "type2")
    params = {k: v.clone().requires_grad_() for k, v in problem[1].items()}
    buffers, batch = problem[2], (problem[3], y)
    held = (params, buffers, batch)
    before, generator = _bits(held), torch.get_rng_state()
    layout = cv.curvature_layout(problem[0], params, buffers, problem[3])
    est = cv.ekfac(layout, likelihood=LIKELIHOODS["cross_entropy"](), fisher=fisher(), decay=0.9)
    states = [est.init(params)]
    calls = [
        lambda s: est.update(s, params, buffers, batch, KEY),
        est.refresh,
        lambda s: est.update(s, params, buffers, batch, torch.tensor(KEY)),
        lambda s: est.update_eigenvalues(s, params, buffers, batch, KEY),
        est.refresh,
        lambda s: cv.merge(s, s),
    ]
    for call in calls:
        kept = copy.deepcopy(_bits(pytrees.map(Tensor.detach, states[-1])))
        states.append(call(states[-1]))
        assert all(
            torch.equal(x, value)
            for x, (value, *_) in zip(pytrees.leaves(states[-2]), kept, strict=True)
        )
    assert not any(x.requires_grad for x in pytrees.leaves(states))  # nor held by a graph
    est.finalize(states[-1])
    assert _unchanged(held, before)
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["everything", "lstm", "tokens"])
def test_without_gradients_nothing_differs(name, mode):
    problem, y, est = given(name, "cross_entropy", "mc")
    data = batches(problem, y, [4, 5])

    def run():
        layout = cv.curvature_layout(*problem)
        est = cv.ekfac(layout, likelihood=LIKELIHOODS["cross_entropy"](), fisher=cv.monte_carlo(2))
        once = cv.build(est, *problem[1:3], data, KEY)
        state = est.refresh(stream(est, problem, data))
        state = stream(est, problem, data, state, "update_eigenvalues")
        return dense(once, problem[1]), dense(est.finalize(state), problem[1])

    expected = run()
    with mode():
        inner = run()
        inside = pytrees.map(torch.clone, problem[1])
    for found, wanted in zip(inner, expected, strict=True):
        assert torch.equal(found, wanted)
    after = cv.build(est, inside, problem[2], data, KEY)  # with parameters that were made there
    assert torch.isfinite(flat(after.blocks)).all()


# --- keys -------------------------------------------------------------------------------------


DRAWING = {"monte_carlo": lambda: cv.monte_carlo(3), "signed": cv.signed}


@METHOD
@pytest.mark.parametrize("fisher", DRAWING.values(), ids=DRAWING)
def test_kinds_that_draw_need_a_key(fisher, method):
    problem, y, _ = given("mlp", "cross_entropy", "type2")
    batch = problem[3], y
    est = method(layout_of(problem), likelihood=cv.cross_entropy(), fisher=fisher())
    state = est.init(problem[1])
    with pytest.raises(ValueError, match="expected a key"):
        est.update(state, *problem[1:3], batch)
    with pytest.raises(ValueError, match="expected a key"):
        cv.build(est, *problem[1:3], [batch])
    with pytest.raises(ValueError, match="one key"):
        est.update(state, *problem[1:3], batch, torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="int64"):
        est.update(state, *problem[1:3], batch, 1.5)
    with pytest.raises(TypeError, match="int64"):
        est.update(state, *problem[1:3], batch, torch.tensor(1.5))
    if method is cv.ekfac:
        state = est.refresh(est.update(state, *problem[1:3], batch, KEY))
        with pytest.raises(ValueError, match="expected a key"):
            est.update_eigenvalues(state, *problem[1:3], batch)


def test_labels_that_are_given_need_no_key():
    problem, y, est = given("mlp", "cross_entropy", "mc")
    labels = torch.stack([y, 2 - y], 1)
    for targets in (Labelled(y, labels), Weighted(Labelled(y, labels), torch.ones(9))):
        curv = cv.build(est, *problem[1:3], [(problem[3], targets)])
        other = cv.build(est, *problem[1:3], [(problem[3], targets)], 5)
        assert torch.equal(dense(curv, problem[1]), dense(other, problem[1]))
    assert not est.setup.fisher.draws(Weighted(Labelled(y, labels), torch.ones(9)))
    assert est.setup.fisher.draws(Weighted(y, torch.ones(9)))
    for kind in (cv.type2(), cv.empirical(), cv.forward_only()):
        assert not kind.draws(y)


@pytest.mark.parametrize("fisher", DRAWING.values(), ids=DRAWING)
@pytest.mark.parametrize("name", ["mlp", "tokens"])
def test_a_key_is_the_same_as_an_int_and_as_a_tensor_and_others_differ(name, fisher):
    problem, y, _ = given(name, "cross_entropy", "type2")
    batch = problem[3], y
    est = cv.ekfac(layout_of(problem), likelihood=LIKELIHOODS["cross_entropy"](), fisher=fisher())

    def matrix(key):
        return dense(cv.build(est, *problem[1:3], [batch], key), problem[1])

    assert torch.equal(matrix(3), matrix(torch.tensor(3)))
    if name != "mlp" or fisher is not cv.signed:  # with one term a sign changes nothing
        assert not torch.equal(matrix(3), matrix(4))
        assert not torch.equal(matrix(0), matrix(-1))
    else:
        assert_near(matrix(3), matrix(4))


@pytest.mark.parametrize("fisher", DRAWING.values(), ids=DRAWING)
@pytest.mark.parametrize("name", ["mlp", "cnn", "tokens"])
def test_chunks_have_the_labels_of_the_whole(name, fisher):
    """In both passes, for chunks of examples and of vectors."""
    problem, y, _ = given(name, "cross_entropy", "type2")
    layout, data = layout_of(problem), batches(problem, y, [5, 4])
    matrices = []
    for sizes in ({}, *({"chunk_size": c, "vector_chunk": v} for c, v in
                        [(1, None), (3, 1), (5, 2), (50, 1), (None, 2)])):  # fmt: skip
        for method in METHODS.values():
            est = method(
                layout, likelihood=LIKELIHOODS["cross_entropy"](), fisher=fisher(), **sizes
            )
            state = est.refresh(stream(est, problem, data))
            if method is cv.ekfac:
                state = stream(est, problem, data, state, "update_eigenvalues")
            matrices.append(dense(est.finalize(state), problem[1]))
    for k, matrix in enumerate(matrices):
        # The basis of EKFAC is rounded on its own; KFAC sums in another order.
        assert_near(matrix, matrices[k % 2], 1e-10 if k % 2 else TIGHT)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", ["grouped", "embedding", "layer_norm", "tokens", "tied_embedding"])
def test_chunks_change_no_sum(name, kind):
    problem, y, est = given(name, "cross_entropy", kind)
    batch = problem[3], y
    whole = est.refresh(stream(est, problem, [batch]))
    whole = stream(est, problem, [batch], whole, "update_eigenvalues")
    for c, v in itertools.product((1, 4, 9, 12), (None, 1, 2)):
        setup = est.setup._replace(chunk_size=c, vector_chunk=v)
        other = cv.ekfac(
            setup.layout,
            likelihood=setup.likelihood,
            fisher=setup.fisher,
            chunk_size=c,
            vector_chunk=v,
        )
        state = stream(other, problem, [batch])._replace(
            basis=whole.basis,
            eigenvalues=pytrees.map(torch.zeros_like, whole.eigenvalues),
        )
        state = stream(other, problem, [batch], state, "update_eigenvalues")
        assert_same(state, whole)


# --- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["mlp", "cnn", "layer_norm", "embedding", "class_token"])
def test_narrow_parameters_have_factors_of_float32(name, dtype):
    problem, y, est = given(name, "cross_entropy", "type2")
    expected = cv.trace(cv.build(est, *problem[1:3], [(problem[3], y)]))

    def cast(tree):
        return pytrees.map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)

    apply, params, buffers, inputs = problem[0], *(cast(part) for part in problem[1:])
    layout = cv.curvature_layout(apply, params, buffers, inputs)
    batch = inputs, y
    # Rounding of a few layers in the narrow dtype, relative to numbers of order one.
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5}[dtype]
    for method in METHODS.values():
        est = method(layout, likelihood=LIKELIHOODS["cross_entropy"]())
        state = est.refresh(stream(est, (apply, params, buffers), [batch]))
        if method is cv.ekfac:
            state = stream(est, (apply, params, buffers), [batch], state, "update_eigenvalues")
        floats = [
            x for x in pytrees.leaves((state.factors, state.basis, state.eigenvalues)) if x.ndim > 1
        ]
        assert {x.dtype for x in floats} == {torch.float32}
        assert {x.dtype for x in (*state.counters, *state.eigen_counters)} == {torch.float64}
        if method is cv.ekfac:
            found = cv.trace(est.finalize(state)).double()
            assert abs(found - expected) <= tolerance * expected
        built = cv.build(est, params, buffers, [batch])
        assert torch.isfinite(flat(built.blocks)).all()


@pytest.mark.parametrize("field", ["factors", "eigenvalues", "eigh"])
def test_precision_is_that_which_is_asked_for(field):
    problem, y, _ = given("everything", "cross_entropy", "type2")

    def cast(tree):
        return pytrees.map(lambda x: x.float() if x.is_floating_point() else x, tree)

    apply, params, buffers, inputs = problem[0], *(cast(part) for part in problem[1:])
    est = cv.ekfac(
        cv.curvature_layout(apply, params, buffers, inputs),
        likelihood=cv.cross_entropy(),
        precision=cv.Precision(**{field: torch.float64}),
    )
    narrow = (apply, params, buffers)
    state = est.refresh(stream(est, narrow, [(inputs, y)]))
    state = stream(est, narrow, [(inputs, y)], state, "update_eigenvalues")
    kinds = {
        name: {x.dtype for x in pytrees.leaves(getattr(state, name)) if x.ndim > 1}
        for name in ("factors", "basis", "eigenvalues")
    }
    wide = torch.float64 if field == "factors" else torch.float32
    assert kinds["factors"] == {wide}
    if field == "eigenvalues":
        assert kinds["eigenvalues"] == {torch.float64}
    values = pytrees.leaves(state.basis)
    for q in values:
        eye = torch.eye(q.shape[-1], dtype=torch.float64)
        error = (q.double().mT @ q.double() - eye).abs().max()
        assert error < (1e-12 if field == "factors" else 1e-5)
    build = cv.build(est, params, buffers, [(inputs, y)])
    assert_near(dense(build, params).double(), dense(est.finalize(state), params).double(), 1e-3)


def test_under_autocast_factors_are_of_float32():
    """Activations come in bfloat16; their products are summed in float32."""
    problem, y, _ = given("mlp", "cross_entropy", "type2")
    params = pytrees.map(Tensor.float, problem[1])
    batch = problem[3].float(), y

    def apply(params, buffers, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return problem[0](params, buffers, inputs)

    plain = cv.curvature_layout(problem[0], params, None, batch[0])
    layout = cv.curvature_layout(apply, params, None, batch[0])
    for method in METHODS.values():
        found, expected = (
            cv.build(method(x, likelihood=cv.cross_entropy()), params, None, [batch])
            for x in (layout, plain)
        )
        assert {x.dtype for x in pytrees.leaves(found.blocks)} == {torch.float32}
        assert_near(cv.trace(found), cv.trace(expected), 5e-2)  # eight bits
        assert not torch.equal(cv.trace(found), cv.trace(expected))


# --- odd data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("name", ["mlp", "cnn", "layer_norm", "shared_positions"])
def test_scales_that_are_far_from_one(name, scale):
    """Outputs times c: F times c², and the basis as it was."""
    problem, y, _ = given(name, "mse", "type2")

    def apply(params, buffers, inputs):
        return scale * problem[0](params, buffers, inputs)

    for method in METHODS.values():
        one, two = (
            dense(
                cv.build(
                    method(cv.curvature_layout(model, *problem[1:]), likelihood=cv.mse()),
                    *problem[1:3],
                    [(problem[3], y)],
                ),
                problem[1],
            )
            for model in (problem[0], apply)
        )
        assert_near(two / scale / scale, one, 1e-10)


@METHOD
@pytest.mark.parametrize("loss", LIKELIHOODS)
def test_one_example_one_input_and_one_output(loss, method):
    params, x = {"w": randn(1, 1), "b": randn(1)}, randn(1, 1)

    def apply(params, buffers, inputs):
        out = F.linear(inputs, params["w"], params["b"])
        return torch.cat([out, -out], 1) if loss == "cross_entropy" else out

    problem = apply, params, {}, x
    y = oracle.targets_for(oracle.LOSSES[loss], apply(params, {}, x))
    expected = oracle.ggn(problem, oracle.LOSSES[loss], y, "mean")
    est = method(cv.curvature_layout(*problem), likelihood=LIKELIHOODS[loss]())
    for size in (1, 10**9):
        curv = cv.build(est, params, None, [(x, y)], cache_limit=size)
        assert_near(dense(curv, params), expected)


@METHOD
def test_gradients_of_zero_are_a_curvature_of_zero(method):
    problem, _, _ = given("mlp", "mse", "empirical")
    params = pytrees.map(torch.zeros_like, problem[1])
    est = method(layout_of(problem), likelihood=cv.mse(), fisher=cv.empirical())
    batch = problem[3], torch.zeros(9, 3, dtype=torch.float64)
    for limit in (0, 10**9):
        curv = cv.build(est, params, None, [batch], cache_limit=limit)
        assert torch.equal(dense(curv, params), torch.zeros(43, 43, dtype=torch.float64))
        solved = cv.solve(curv, problem[1], damping=cv.exact(2.0))
        assert_near(flat(solved), flat(problem[1]) / 2)


def test_batches_that_are_none_are_refused():
    problem, y, est = given("mlp", "cross_entropy", "type2")
    x, state = problem[3], est.init(problem[1])
    for batch, kind, words in (
        ((x[:0], y[:0]), ValueError, "at least one example"),
        ((x, y[:3]), ValueError, r"one number of examples.*\[3, 9\]"),
        ((x, y, y), TypeError, r"\(inputs, targets\)"),
        (x, TypeError, r"\(inputs, targets\)"),
        ((x, None), TypeError, r"\(inputs, targets\)"),
        ((x, y.double()), ValueError, "integer labels"),
        ((x, y[:, None]), ValueError, "integer labels"),
    ):
        with pytest.raises(kind, match=words):
            est.update(state, *problem[1:3], batch)


def test_targets_of_another_shape_are_refused_by_gradients():
    problem, y, _ = given("mlp", "mse", "type2")
    est = cv.kfac(layout_of(problem), likelihood=cv.mse(), fisher=FISHERS["empirical"]())
    with pytest.raises(ValueError, match="targets of the shape of the outputs"):
        est.update(est.init(problem[1]), *problem[1:3], (problem[3], y[:, :2]))

"""Curvature under `torch.vmap` over stacked parameters and under `torch.compile`."""

from __future__ import annotations

import oracle
import pytest
import torch
from judged import FISHERS, KINDS, LIKELIHOODS, layout_of
from nets import NETS

from jdfunc import curvature as cv
from jdfunc import pytrees

METHODS = {"kfac": cv.kfac, "ekfac": cv.ekfac}
METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
KIND_OF = FISHERS | {"signed": cv.signed, "mc": lambda: cv.monte_carlo(2)}
ENSEMBLE = ["mlp", "cnn", "everything", "batch_norm", "tied_embedding"]


def assert_same(tree, other, tolerance: float) -> None:
    assert pytrees.same_structure(tree, other)
    for one, two in zip(pytrees.leaves(tree), pytrees.leaves(other), strict=True):
        distance, size = float((one.double() - two.double()).norm()), float(two.double().norm())
        assert one.dtype == two.dtype
        assert distance <= tolerance * size + 1e-300, f"distance {distance:.3e}, norm {size:.3e}"


def given(name: str, kind: str = "type2", method=cv.ekfac, loss: str = "cross_entropy", **kwargs):
    """A problem, its targets and an estimator."""
    problem = NETS[name].build()
    y = oracle.targets_for(oracle.LOSSES[loss], problem[0](*problem[1:]))
    est = method(
        layout_of(problem), likelihood=LIKELIHOODS[loss](), fisher=KIND_OF[kind](), **kwargs
    )
    return problem, y, est


def stacked(params, members: int = 3):
    """Parameters of several models, and a key for each."""
    one = pytrees.map(
        lambda p: torch.stack([(1 + 0.1 * k) * p + 0.02 * k for k in range(members)]), params
    )
    return one, torch.arange(members) * 7 + 1


# --- vmap -------------------------------------------------------------------------------------


@METHOD
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENSEMBLE)
def test_an_ensemble_below_vmap_is_a_loop(name, kind, method):
    """Update, refresh, eigenvalues, finalize, and what is computed with the curvature."""
    problem, y, est = given(name, kind, method)
    _, params, buffers, inputs = problem
    batch, (ensemble, keys) = (inputs, y), stacked(params)

    def run(params, key):
        state = est.update(est.init(params), params, buffers, batch, key)
        if method is cv.ekfac:
            state = est.update_eigenvalues(est.refresh(state), params, buffers, batch, key)
        curv = est.finalize(state)
        damping = cv.exact(0.1)
        return (
            state.counters,
            cv.trace(curv),
            cv.logdet(curv, damping),
            cv.matvec(curv, params),
            cv.solve(curv, params, damping=damping),
            cv.diag(curv, params),
        )

    found = torch.vmap(run)(ensemble, keys)
    for k in range(3):
        expected = run(pytrees.map(lambda p, k=k: p[k], ensemble), keys[k])
        # Both have eigenvectors of their own; where eigenvalues are close they differ.
        assert_same(pytrees.map(lambda x, k=k: x[k], found), expected, 1e-8)


@pytest.mark.parametrize("kind", ["mc", "signed"])
def test_members_have_labels_of_their_own_keys(kind):
    problem, y, est = given("tokens", kind, cv.kfac)
    _, params, buffers, inputs = problem

    def factor(key):
        state = est.update(est.init(params), params, buffers, (inputs, y), key)
        return state.factors["qkv.weight"].roles[0].left

    one, two, three = torch.vmap(factor)(torch.tensor([1, 2, 1]))
    assert torch.equal(one, three)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_streams_below_vmap_go_on_with_averages(name):
    """Stacked states go in and come out: one pass for both, decayed, in chunks."""
    problem, y, est = given(name, decay=0.8, chunk_size=2, vector_chunk=1)
    _, params, buffers, inputs = problem
    ensemble, keys = stacked(params)
    states = torch.vmap(est.init)(ensemble)

    def step(state, params, key):
        return est.update(state, params, buffers, (inputs, y), key)

    states = torch.vmap(est.refresh)(torch.vmap(step)(states, ensemble, keys))
    found = torch.vmap(step)(states, ensemble, keys)
    found = torch.vmap(cv.merge)(found, found)
    for k in range(3):
        one, own = (pytrees.map(lambda p, k=k: p[k], tree) for tree in (states, ensemble))
        once = step(one, own, keys[k])
        assert_same(pytrees.map(lambda x, k=k: x[k], found), cv.merge(once, once), 1e-11)


def test_what_looks_at_the_number_of_steps_is_refused_below_transforms():
    problem, y, est = given("mlp", basis_every=2)
    _, params, buffers, inputs = problem
    ensemble, _ = stacked(params)

    def step(params):
        return est.update(est.init(params), params, buffers, (inputs, y)).counters

    with pytest.raises(ValueError, match="basis_every=None"):
        torch.vmap(step)(ensemble)


# --- compile ----------------------------------------------------------------------------------

COMPILED = [("mlp", "type2"), ("cnn", "type2"), ("everything", "mc"), ("attention_self", "type2")]


def _cases() -> list:
    """One net for each method always, the others in the slow suite."""
    found = []
    for k, (name, kind) in enumerate(COMPILED):
        for name_of, method in METHODS.items():
            quick = k == 0 and method is cv.ekfac  # tracing takes ten seconds and more
            marks = [] if quick else [pytest.mark.slow]
            found.append(
                pytest.param(
                    name, kind, method, "aot_eager", marks=marks, id=f"{name}-{kind}-{name_of}"
                )
            )
    for name, kind in COMPILED[:2]:
        found.append(
            pytest.param(
                name, kind, cv.ekfac, "inductor", marks=[pytest.mark.slow], id=f"{name}-inductor"
            )
        )
    return found


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of inductor
@pytest.mark.parametrize(("name", "kind", "method", "backend"), _cases())
def test_compiled_updates_are_the_eager_ones_and_compile_once(name, kind, method, backend):
    """One pass for factors and eigenvalues; other values, keys and states compile nothing new."""
    problem, y, est = given(name, kind, method, decay=0.9)
    _, params, buffers, inputs = problem
    state = est.refresh(est.update(est.init(params), params, buffers, (inputs, y), 3))
    update = torch.compile(est.update, fullgraph=True, backend=backend)
    eager, compiled = state, state
    for k, stance in enumerate(["default", "fail_on_recompile"]):
        own = pytrees.map(lambda p, k=k: (1 + 0.1 * k) * p, params)
        key = torch.tensor(5 + k)
        with torch.compiler.set_stance(stance):
            compiled = update(compiled, own, buffers, (inputs, y), key)
        eager = est.update(eager, own, buffers, (inputs, y), key)
        assert_same(compiled, eager, 1e-11)
    expected, found = est.finalize(eager), est.finalize(compiled)
    assert_same(cv.matvec(found, params), cv.matvec(expected, params), 1e-11)


@pytest.mark.compile
def test_what_looks_at_the_number_of_steps_is_refused_when_compiled():
    problem, y, est = given("mlp", basis_every=2)
    _, params, buffers, inputs = problem
    update = torch.compile(est.update, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="basis_every=None"):
        update(est.init(params), params, buffers, (inputs, y))


@pytest.mark.compile
def test_compiled_kinds_that_draw_need_a_key_too():
    problem, y, est = given("mlp", "mc")
    _, params, buffers, inputs = problem
    update = torch.compile(est.update, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="expected a key"):
        update(est.init(params), params, buffers, (inputs, y))

"""Cases where curvlinops 3.0.1 is silently wrong, slow, or changes what it is given.

Each expects what brute force gives.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import oracle
import pytest
import torch
from judged import (
    KEY,
    Exact,
    Setting,
    batch_of,
    blocks_only,
    built,
    dense,
    estimator,
    exact,
    exact_for,
    layout_of,
)
from models import Fn, randn, seq
from nets import NETS, Everything
from torch import Tensor, nn

from jdfunc import curvature as cv
from jdfunc import pytrees

TIGHT = 1e-12
KINDS = "type2", "empirical", "mc"


def functional(module: nn.Module, x: Any) -> Any:
    """A problem of a module in float64."""
    module = module.double().eval()

    def apply(params: Any, buffers: Any, inputs: Any) -> Tensor:
        return torch.func.functional_call(module, (params, buffers), (inputs,))

    params = {k: v.detach() for k, v in module.named_parameters()}
    return apply, params, {k: v.detach() for k, v in module.named_buffers()}, x


def mlp(inputs: int = 3, classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return seq(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, classes))


def estimate(
    known: Exact, likelihood: Any, kind: str = "type2", method: Any = cv.ekfac, **kwargs: Any
) -> Any:
    """The estimate of a problem under a likelihood of its own."""
    setting = Setting("", "mse", kind, "sum")
    layout = layout_of(known.problem)
    est = estimator(setting, method, layout, likelihood=likelihood, **kwargs)
    return built(est, known.problem, [batch_of(known, kind)])


def assert_near(value: Tensor, expected: Tensor, tolerance: float = TIGHT) -> None:
    distance, size = float((value - expected).norm()), float(expected.norm())
    assert distance <= tolerance * size, f"distance {distance:.3e}, norm {size:.3e}"


# --- wrong numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [cv.ekfac, cv.kfac])
@pytest.mark.parametrize("joint", [True, False])
def test_tokens_through_attention(joint, method):
    """T·C columns: those of all tokens at once leave out the cross terms, or count them twice."""
    setting = Setting("tokens", "cross_entropy", "type2", "mean", joint)
    known = exact(*setting[:4])
    problem, module = known.problem, NETS["tokens"].module
    assert module is not None
    curv = built(
        estimator(setting, method, layout_of(problem)), problem, [batch_of(known, "type2")]
    )
    layers = oracle.layers_of(module(), problem[1], problem[3], known.vectors)
    if method is cv.kfac:
        expected = oracle.kfac_matrix(
            layers, len(known.matrix), known.weight, reduce=False, joint=joint
        )
        assert_near(dense(curv, problem[1]), expected)
    else:
        assert_near(cv.trace(curv), known.matrix.trace())
        expected = oracle.ekfac_matrix(
            layers, len(known.matrix), known.weight, reduce=False, joint=joint
        )
        assert_near(dense(curv, problem[1]), expected, 1e-8)
    # The columns of all tokens at once are another matrix.
    out, _ = oracle.jacobian(problem)
    roots = known.vectors.reshape(-1, *out.shape)
    classes = out.shape[-1]
    merged = roots.unflatten(0, (-1, classes)).sum(0)
    wrong = oracle.fisher(problem, oracle.cross_entropy(), known.targets, "mean", merged)
    assert abs(wrong.trace() / known.matrix.trace() - 1) > 0.05


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_apart(groups):
    """One position, one example, squared error: KFAC is exact, group by group."""
    torch.manual_seed(0)
    module = seq(nn.Conv2d(4, 4, 2, groups=groups), nn.Flatten())
    problem = functional(module, randn(1, 4, 2, 2))
    y = torch.zeros(1, 4, dtype=torch.float64)
    known = exact_for(problem, oracle.mse(), y, "type2", "sum")
    for method in (cv.kfac, cv.ekfac):
        curv = estimate(known, cv.mse(reduction=cv.sum), method=method)
        kept = blocks_only(known.matrix, curv, problem[1])
        assert_near(dense(curv, problem[1]), kept, 1e-11)
        # Nothing is lost by the groups: an output channel reads its own group alone.
        layer = curv.layout[0]
        assert layer.shape[0] == groups


@pytest.mark.parametrize("name", ["tied_same_role", "tied_modules", "tied_embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_used_twice(name, kind):
    setting = Setting(name, "cross_entropy", kind, "mean")
    known = exact(*setting[:4])
    est = estimator(setting, cv.ekfac, layout_of(known.problem))
    curv = built(est, known.problem, [batch_of(known, kind)])
    assert_near(cv.trace(curv), known.matrix.trace())


OPTIONS: dict[str, dict[str, Any]] = {
    "ignore_index": {"ignore_index": 1},
    "weight": {"weight": torch.tensor([0.2, 1.9, 0.7], dtype=torch.float64)},
    "label_smoothing": {"label_smoothing": 0.3},
    "all": {
        "ignore_index": 0,
        "weight": torch.tensor([0.2, 1.9, 0.7], dtype=torch.float64),
        "label_smoothing": 0.1,
    },
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_cross_entropy(name, kind, reduction):
    """Of an MLP on distinct inputs, whose first layer is not exact; and of one example, exact."""
    loss = oracle.cross_entropy(**OPTIONS[name])
    mean = {"mean": cv.mean, "sum": cv.sum}[reduction]
    likelihood = cv.cross_entropy(reduction=mean, **OPTIONS[name])
    for size in (6, 1):
        problem = functional(mlp(), randn(size, 3))
        y = torch.tensor([2, 1, 0, 2, 1, 1])[:size]
        known = exact_for(problem, loss, y, kind, reduction)
        curv = estimate(known, likelihood, kind)
        assert_near(cv.trace(curv), known.matrix.trace())
        if size == 1 and kind != "mc":
            kept = blocks_only(known.matrix, curv, problem[1])
            assert_near(dense(curv, problem[1]), kept, 1e-11)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_ignored_tokens_in_ragged_batches(kind, reduction):
    """Half of the tokens ignored, more in one batch than in the other; class axis 1 as in torch."""
    net, ignored = NETS["tokens"], -100
    apply, params, buffers, x = net.build(size=5)
    y = torch.randint(0, 3, (5, 4))
    y[:2, 1:] = ignored
    y[3] = ignored
    loss = oracle.cross_entropy()
    mean = {"mean": cv.mean, "sum": cv.sum}[reduction]

    def classes_first(params, buffers, inputs):
        return apply(params, buffers, inputs).movedim(-1, 1)

    known = exact_for((apply, params, buffers, x), loss, y, kind, reduction)
    known = known._replace(problem=(classes_first, params, buffers, x))
    likelihood = cv.cross_entropy(reduction=mean)
    curv = estimate(known, likelihood, kind)
    assert_near(cv.trace(curv), known.matrix.trace())
    if kind == "mc":
        return
    setting = Setting("", "mse", kind, "sum")
    est = estimator(setting, cv.ekfac, layout_of(known.problem), likelihood=likelihood)
    streamed = built(est, known.problem, [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])])
    assert_near(dense(streamed, params), dense(curv, params), 1e-10)


def test_nothing_but_ignored_terms_is_no_curvature():
    problem = functional(mlp(), randn(3, 3))
    y = torch.full((3,), -100)
    layout = layout_of(problem)
    for mean in (cv.mean, cv.sum):
        est = cv.ekfac(layout, likelihood=cv.cross_entropy(reduction=mean), fisher=cv.type2())
        curv = built(est, problem, [(problem[3], y)])
        assert torch.equal(dense(curv, problem[1]), torch.zeros_like(dense(curv, problem[1])))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True])
def test_weights_of_binary_cross_entropy(soft, kind, reduction):
    options = {
        "weight": torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64),
        "pos_weight": torch.tensor([3.0, 0.5, 1.0], dtype=torch.float64),
    }
    mean = {"mean": cv.mean, "sum": cv.sum}[reduction]
    problem = functional(mlp(), randn(6, 3))
    y = torch.rand(6, 3, dtype=torch.float64)
    y = y if soft else y.round()
    known = exact_for(problem, oracle.bce(**options), y, kind, reduction)
    curv = estimate(known, cv.bce_with_logits(reduction=mean, **options), kind)
    assert_near(cv.trace(curv), known.matrix.trace())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_labels(kind, reduction):
    options = {
        "weight": torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64),
        "label_smoothing": 0.2,
    }
    mean = {"mean": cv.mean, "sum": cv.sum}[reduction]
    problem = functional(mlp(), randn(6, 3))
    y = torch.randn(6, 3, dtype=torch.float64).softmax(1)
    known = exact_for(problem, oracle.cross_entropy(**options), y, kind, reduction)
    curv = estimate(known, cv.cross_entropy(reduction=mean, **options), kind)
    assert_near(cv.trace(curv), known.matrix.trace())


@pytest.mark.parametrize("name", ["shared_positions", "cnn", "tokens"])
def test_reduce_with_fewer_examples_than_widths_is_one_matrix(name, monkeypatch):
    """Eigenvectors of a null space are arbitrary: two ways of eigh give one EKFAC."""
    problem = NETS[name].build(size=2)
    loss = oracle.cross_entropy()
    y = oracle.targets_for(loss, problem[0](*problem[1:]))
    known = exact_for(problem, loss, y, "type2", "mean")
    setting = Setting("", "cross_entropy", "type2", "mean", True, "reduce")
    layout = layout_of(problem)

    def estimated() -> Tensor:
        est = estimator(setting, cv.ekfac, layout)
        return dense(built(est, problem, [(problem[3], y)]), problem[1])

    one, eigh = estimated(), torch.linalg.eigh

    def other(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The same decomposition of a matrix in another order of the axes."""
        order = torch.arange(matrix.shape[-1] - 1, -1, -1)
        values, vectors = eigh(matrix[..., order, :][..., order], *args, **kwargs)
        return torch.return_types.linalg_eigh((values, -vectors[..., order, :]))

    monkeypatch.setattr(torch.linalg, "eigh", other)
    assert_near(estimated(), one, 1e-9)
    assert_near(one.trace(), known.matrix.trace())


@pytest.mark.parametrize("kind", KINDS)
def test_a_net_of_layers_that_others_refuse(kind):
    """Norms, an embedding, Conv1d, Conv3d and a free tensor: every parameter is covered."""
    torch.manual_seed(0)
    problem = functional(Everything(), torch.randint(0, 5, (4, 4)))
    loss = oracle.cross_entropy()
    y = torch.tensor([0, 1, 1, 0])
    known = exact_for(problem, loss, y, kind, "mean")
    curv = estimate(known, cv.cross_entropy(), kind)
    assert_near(cv.trace(curv), known.matrix.trace())
    assert {name for block in curv.layout for name in block.params} == set(problem[1])


# --- work and side effects --------------------------------------------------------------------


class Counting:
    """Data that counts how often it is traversed."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes, self.given = batches, 0, 0

    def __iter__(self):
        self.passes += 1
        for batch in self.batches:
            self.given += 1
            yield batch


@pytest.mark.parametrize(("method", "passes"), [(cv.ekfac, 2), (cv.kfac, 1)])
def test_data_is_traversed_once_a_pass(method, passes):
    problem = functional(mlp(), randn(7, 3))
    x, y = problem[3], torch.randint(0, 3, (7,))
    data = Counting([(x[:4], y[:4]), (x[4:], y[4:])])
    layout = layout_of(problem)
    forwards = 0
    apply = layout.apply

    def counted(params: Any, buffers: Any, inputs: Any) -> Tensor:
        nonlocal forwards
        forwards += 1
        return apply(params, buffers, inputs)

    est = method(layout._replace(apply=counted), likelihood=cv.cross_entropy(), fisher=cv.type2())
    curv = built(est, problem, data)
    assert data.passes <= passes
    assert forwards <= 2 * passes
    before = data.passes, forwards
    cv.matvec(curv, problem[1])
    cv.solve(curv, problem[1], damping=cv.exact(0.1))
    cv.trace(curv)
    assert (data.passes, forwards) == before


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytrees.leaves(tree) if isinstance(leaf, Tensor)]


def test_nothing_that_is_given_changes():
    """Parameters, buffers, data, states and the global generator are bit-identical afterwards."""
    torch.manual_seed(0)
    module = Fn(
        lambda self, x: self.head(self.norm(self.body(x)).tanh()),
        body=nn.Linear(3, 4),
        norm=nn.BatchNorm1d(4),
        head=nn.Linear(4, 3),
    )
    problem = functional(module, randn(5, 3))
    apply, params, buffers, x = problem
    y = torch.tensor([0, 1, 2, 2, 0])
    given = (params, buffers, x, y)
    copies = copy.deepcopy(given)
    generator = torch.get_rng_state()
    own = copy.deepcopy(module.state_dict())

    def unchanged(now: Any, before: Any) -> bool:
        pairs = zip(_tensors(now), _tensors(before), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    for kind in (cv.type2(), cv.empirical(), cv.monte_carlo(samples=2)):
        for method in (cv.ekfac, cv.kfac):
            est = method(layout_of(problem), likelihood=cv.cross_entropy(), fisher=kind)
            state = est.init(params)
            for step in ("update", "refresh", "update_eigenvalues"):
                if method is cv.kfac and step != "update":
                    continue
                kept = copy.deepcopy(_tensors(state))
                fn = getattr(est, step)
                new = fn(state) if step == "refresh" else fn(state, params, buffers, (x, y), KEY)
                assert unchanged(_tensors(state), kept), step
                state = new
            kept = copy.deepcopy(_tensors(state))
            curv = est.finalize(state)
            first = dense(curv, params)
            vector = {k: torch.randn_like(v) for k, v in params.items()}
            held = copy.deepcopy(vector)
            generator = torch.get_rng_state()
            cv.matvec(curv, vector)
            cv.solve(curv, vector, damping=cv.exact(0.1))
            cv.logdet(curv, cv.exact(0.1))
            cv.metric_gramian(curv, {k: v[None] for k, v in vector.items()}, damping=cv.exact(0.1))
            cv.merge(state, state)
            assert unchanged(vector, held)
            assert unchanged(_tensors(state), kept)
            assert torch.equal(dense(curv, params), first)  # damping is not added in place
    assert unchanged(given, copies)
    assert unchanged(module.state_dict(), own)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(p.requires_grad for p in params.values())
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_kfac_is_there_after_ekfac():
    """The factors of a state survive its eigenvalues."""
    problem = functional(mlp(), randn(6, 3))
    data = problem[3], torch.tensor([0, 1, 2, 2, 0, 1])
    layout = layout_of(problem)
    estimators = [
        method(layout, likelihood=cv.cross_entropy(), fisher=cv.type2())
        for method in (cv.ekfac, cv.kfac)
    ]
    ekfac, kfac = estimators
    state = ekfac.init(problem[1])
    state = ekfac.update(state, problem[1], problem[2], data, KEY)
    state = ekfac.update_eigenvalues(ekfac.refresh(state), problem[1], problem[2], data, KEY)
    after = kfac.finalize(state)
    expected = built(kfac, problem, [data])
    assert_near(dense(after, problem[1]), dense(expected, problem[1]))
    once = built(ekfac, problem, [data])
    assert_near(dense(ekfac.finalize(state), problem[1]), dense(once, problem[1]), 1e-9)


@pytest.mark.parametrize("method", [cv.ekfac, cv.kfac])
def test_loading_a_state_touches_no_parameter(method):
    problem = functional(mlp(), randn(6, 3))
    data = problem[3], torch.tensor([0, 1, 2, 2, 0, 1])
    layout = layout_of(problem)
    est = method(layout, likelihood=cv.cross_entropy(), fisher=cv.type2())
    state = est.update(est.init(problem[1]), problem[1], problem[2], data, KEY)
    saved = cv.state_dict(state, layout)
    assert all(isinstance(value, Tensor) for value in saved.values())
    moved = {k: v + 1 for k, v in problem[1].items()}
    kept = copy.deepcopy(moved)
    loaded = cv.load_state_dict(saved, layout)
    assert all(torch.equal(moved[k], kept[k]) for k in moved)
    for one, two in zip(_tensors(state), _tensors(loaded), strict=True):
        assert torch.equal(one, two)
    other = layout_of(functional(mlp(inputs=2), randn(6, 2)))
    with pytest.raises(ValueError, match="layout"):
        cv.load_state_dict(saved, other)


@pytest.mark.parametrize("method", [cv.ekfac, cv.kfac])
def test_logdet_is_damped(method):
    """Undamped it is -inf where F is singular, and a determinant of a thousand factors is no 0."""
    problem = functional(mlp(), randn(2, 3))
    known = exact_for(problem, oracle.mse(), torch.zeros(2, 3).double(), "type2", "mean")
    curv = estimate(known, cv.mse(), method=method)
    matrix = dense(curv, problem[1])
    damped = matrix + 0.1 * torch.eye(len(matrix), dtype=matrix.dtype)
    assert_near(cv.logdet(curv, cv.exact(0.1)), damped.logdet(), 1e-11)
    assert_near(cv.det(curv, cv.exact(0.1)), damped.det(), 1e-10)
    assert cv.logdet(curv) == -math.inf or cv.logdet(curv) < -300
    small = cv.logdet(curv, cv.exact(1e-30))
    assert torch.isfinite(small)
    assert_near(cv.frobenius_norm(curv), matrix.norm())

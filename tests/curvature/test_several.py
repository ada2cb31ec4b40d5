"""Several heads on one trunk against the sum of their exact matrices, and affinities of curvatures.

Everything is float64; tolerances are 1e-12 relative, some hundred roundings, unless it is said why.
"""

from __future__ import annotations

import itertools
from typing import Any

import judged
import oracle
import pytest
import synthetic_blocks
import torch
from torch import Tensor, nn

from jdfunc import curvature as cv
from jdfunc import pytrees
from jdfunc.curvature.losses.several import several
from jdfunc.curvature.losses.targets import Labelled
from jdfunc.curvature.operate.affinity import affinity

TOL = 1e-12
LOSSES = {"tag": oracle.cross_entropy(), "size": oracle.mse(), "flags": oracle.bce()}
MAKERS = {
    "tag": lambda **options: cv.cross_entropy(class_axis=-1, **options),
    "size": cv.mse,
    "flags": cv.bce_with_logits,
}
WEIGHTS = {"tag": 0.5, "flags": 3.0}


class Model(nn.Module):
    """Three heads on one trunk that mixes positions: tokens [b, 3, 4], [b] and [b, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.mix = nn.Linear(2, 4), nn.Linear(3, 3)
        self.tag, self.size, self.flags = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.mix(torch.tanh(self.trunk(x)).mT)).mT
        return {
            "tag": self.tag(h),
            "size": self.size(h.mean(1)).squeeze(-1),
            "flags": self.flags(h.flatten(1)),
        }


def _problem(n: int = 5) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Model().double(), torch.randn(n, 3, 2, dtype=torch.float64)
    params = {k: v.detach() for k, v in model.named_parameters()}
    return (lambda p, b, x: torch.func.functional_call(model, p, (x,))), params, {}, x


APPLY, PARAMETERS, _, X = _problem()
OUTPUTS = APPLY(PARAMETERS, {}, X)
TARGETS = {name: oracle.targets_for(LOSSES[name], OUTPUTS[name], 3) for name in LOSSES}
LAYOUT = cv.curvature_layout(APPLY, PARAMETERS, {}, X)


def head(name: str, x: Tensor = X) -> Any:
    """The problem of one head, its outputs [b, *terms, C]."""

    def apply(params: Any, buffers: Any, x: Tensor) -> Tensor:
        out = APPLY(params, buffers, x)[name]
        return out[:, None] if out.ndim == 1 else out

    return apply, PARAMETERS, {}, x


def _shaped(name: str, y: Tensor) -> Tensor:
    return y[:, None] if name == "size" else y


def exact_of(name: str, kind: str, reduction: str, y: Tensor, labels: Tensor) -> Tensor:
    """F of one head."""
    loss, y = LOSSES[name], _shaped(name, y)
    out, _ = oracle.jacobian(head(name))
    if kind == "type2":
        return oracle.ggn(head(name), loss, y, reduction)
    if kind == "mc":
        drawn = labels.movedim(1, 0)
        drawn = drawn[..., None] if name == "size" else drawn
        vectors = oracle.monte_carlo_vectors(loss, out, y, drawn)
    else:
        vectors = oracle.empirical_vectors(loss, out, y)
    return oracle.fisher(head(name), loss, y, reduction, vectors)


def _labels() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        drawn = {k: [LOSSES[k].draw(OUTPUTS[k]) for _ in range(2)] for k in LOSSES}
    return {k: torch.stack(v, 1) for k, v in drawn.items()}


LABELS = _labels()
KINDS = {"type2": cv.type2(), "mc": cv.monte_carlo(2), "empirical": cv.empirical()}


def heads(reduction: str = "mean", **options: Any) -> Any:
    """The likelihoods of the three heads."""
    own = judged.REDUCTIONS[reduction]
    return several({k: make(reduction=own) for k, make in MAKERS.items()}, **options)


def build(likelihood: Any, kind: str = "type2", data: Any = None, method: Any = cv.ekfac) -> Any:
    """The curvature of the model."""
    targets = TARGETS
    if kind == "mc":
        targets = {k: Labelled(TARGETS[k], LABELS[k]) for k in TARGETS}
    est = method(LAYOUT, likelihood=likelihood, fisher=KINDS[kind])
    return cv.build(est, PARAMETERS, {}, [(X, targets)] if data is None else data)


def close(value: Any, exact: Any, tol: float = TOL) -> None:
    value, exact = torch.as_tensor(value), torch.as_tensor(exact)
    assert float((value - exact).norm()) <= tol * float(exact.norm())


@pytest.mark.parametrize(
    ("kind", "reduction"), list(itertools.product(KINDS, judged.REDUCTIONS)), ids="-".join
)
def test_trace_and_basis_of_the_sum_of_all_heads(kind: str, reduction: str) -> None:
    exact = sum(
        WEIGHTS.get(k, 1.0) * exact_of(k, kind, reduction, TARGETS[k], LABELS[k]) for k in LOSSES
    )
    curv = build(heads(reduction, weights=WEIGHTS), kind)
    close(cv.trace(curv), torch.trace(exact))
    for block in curv.layout:
        rows, values = judged.basis_of(block, curv.blocks[block.name], PARAMETERS)
        here = judged.positions(block, PARAMETERS)
        close(((rows @ exact[here[:, None], here]) * rows).sum(1), values)


@pytest.mark.parametrize("reduction", judged.REDUCTIONS)
def test_kfac_of_heads_is_exact_for_one_example_and_linear_heads(reduction: str) -> None:
    """The blocks of the heads alone have A of their inputs and B = w Σ v vᵀ, for N = 1."""
    x, y = X[:1], {k: v[:1] for k, v in TARGETS.items()}
    curv = build(heads(reduction), data=[(x, y)], method=cv.kfac)
    exact = oracle.ggn(head("flags", x), LOSSES["flags"], y["flags"], reduction)
    here = judged.positions(next(b for b in curv.layout if "flags" in b.name), PARAMETERS)
    close(judged.dense(curv, PARAMETERS)[here[:, None], here], exact[here[:, None], here])


@pytest.mark.parametrize("reduction", judged.REDUCTIONS)
def test_streams_merges_and_single_heads_add_up(reduction: str) -> None:
    whole = cv.trace(build(heads(reduction, weights=WEIGHTS)))
    est = cv.ekfac(LAYOUT, likelihood=heads(reduction, weights=WEIGHTS), fisher=cv.type2())
    parts = [
        (X[s], {k: v[s] for k, v in TARGETS.items()})
        for s in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    first = est.update(est.init(PARAMETERS), PARAMETERS, {}, parts[0])
    rest = est.init(PARAMETERS)
    for part in parts[1:]:
        rest = est.update(rest, PARAMETERS, {}, part)
    state = est.refresh(cv.merge(cv.merge(first, rest), est.init(PARAMETERS)))
    for part in parts:
        state = est.update_eigenvalues(state, PARAMETERS, {}, part)
    close(cv.trace(est.finalize(state)), whole)
    loaded = cv.load_state_dict(cv.state_dict(state, LAYOUT), LAYOUT)
    close(cv.trace(est.finalize(loaded)), whole)
    singles = [
        WEIGHTS.get(k, 1.0) * cv.trace(build(several({k: v})))
        for k, v in heads(reduction).likelihoods.items()
    ]
    close(sum(singles), whole)


def test_a_single_head_is_that_of_its_likelihood_alone() -> None:
    layout = cv.curvature_layout(*head("tag"))
    alone = cv.ekfac(layout, likelihood=MAKERS["tag"](), fisher=cv.type2())
    alone = cv.build(alone, PARAMETERS, {}, [(X, TARGETS["tag"])])
    close(cv.trace(build(several({"tag": MAKERS["tag"]()}))), cv.trace(alone))


def test_chunks_of_vectors_and_examples() -> None:
    est = cv.ekfac(LAYOUT, likelihood=heads(), fisher=cv.type2(), chunk_size=2, vector_chunk=5)
    chunked = cv.build(est, PARAMETERS, {}, [(X, TARGETS)])
    close(cv.trace(chunked), cv.trace(build(heads())))


@pytest.mark.slow
def test_monte_carlo_and_signs_are_unbiased() -> None:
    """The mean trace over 200 keys lies within 4 standard errors of the exact one."""
    exact = float(cv.trace(build(heads())))
    for fisher in (cv.monte_carlo(1), cv.signed(), None):
        est = cv.ekfac(LAYOUT, likelihood=heads(), fisher=fisher)
        state = est.init(PARAMETERS)
        basis = est.refresh(est.update(state, PARAMETERS, {}, (X, TARGETS), 0))
        draws = torch.stack(
            [
                cv.trace(
                    est.finalize(est.update_eigenvalues(basis, PARAMETERS, {}, (X, TARGETS), key))
                )
                for key in range(200)
            ]
        )
        error = draws.std() / 200**0.5
        assert float(error) > 0
        assert abs(float(draws.mean()) - exact) < 4 * float(error)


def test_heads_draw_labels_of_their_own() -> None:
    """Two equal heads: with one draw for both, the two traces would be the same."""

    def apply(params: Any, buffers: Any, x: Tensor) -> dict[str, Tensor]:
        return {"a": x @ params["a"], "b": x @ params["b"]}

    w = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params, x = {"a": w, "b": w.clone()}, X[:, 0]
    y = {k: torch.zeros(5, dtype=torch.int64) for k in params}
    layout = cv.curvature_layout(apply, params, None, x)
    likelihood = several({k: cv.cross_entropy() for k in params})
    est = cv.ekfac(layout, likelihood=likelihood, fisher=cv.monte_carlo(1))
    curv = cv.build(est, params, None, [(x, y)], key=1)
    first, second = (curv.blocks[k].eigenvalues.sum() for k in params)
    assert not torch.isclose(first, second)


def test_ignored_terms_are_refused_until_their_divisor_is_given() -> None:
    y = dict(TARGETS, tag=TARGETS["tag"].clone())
    y["tag"][0], y["tag"][1, 1] = -100, -100
    with pytest.raises(
        ValueError, match=r"fixed proportion.*'tag': 2.2, 'size': 1.0, 'flags': 2.0"
    ):
        build(heads(), data=[(X, y)])
    curv = build(heads(divisors={"tag": 2.2}), data=[(X, y)])
    exact = [exact_of(k, "type2", "mean", y[k], LABELS[k]).trace() for k in LOSSES]
    close(cv.trace(curv), sum(exact))
    curv = build(heads("sum"), data=[(X, y)])
    exact = [exact_of(k, "type2", "sum", y[k], LABELS[k]).trace() for k in LOSSES]
    close(cv.trace(curv), sum(exact))


def test_the_divisors_that_are_advised_are_those_of_heads_that_have_any() -> None:
    """Examples that add (1, 0, 2) and (2, 0, 2) to the divisors."""
    counted = [3, 0, 4, 1 * 3 + 2 * 4, 0, 2 * 3 + 2 * 4, 1 + 4, 0, 4 + 4]
    with pytest.raises(ValueError, match=r"divisors=\{'tag': 1.5, 'flags': 2.0\}"):
        heads().reduction(torch.tensor(counted, dtype=torch.float64), torch.tensor(2.0))


def test_one_mask_for_all_heads_is_exact() -> None:
    """Divisors that vary in proportion are no obstacle, nor are examples without any term."""
    tags = several({"tag": MAKERS["tag"](), "again": MAKERS["tag"](label_smoothing=0.3)})
    y = TARGETS["tag"].clone()
    y[0], y[1, 1] = -100, -100

    def apply(params: Any, buffers: Any, x: Tensor) -> dict[str, Tensor]:
        out = APPLY(params, buffers, x)["tag"]
        return {"tag": out, "again": out}

    layout = cv.curvature_layout(apply, PARAMETERS, {}, X)
    est = cv.ekfac(layout, likelihood=tags, fisher=cv.type2())
    curv = cv.build(
        est,
        PARAMETERS,
        {},
        [(X[:1], {"tag": y[:1], "again": y[:1]})] + [(X[1:], {"tag": y[1:], "again": y[1:]})],
    )
    smooth = oracle.cross_entropy(label_smoothing=0.3)
    exact = oracle.ggn(head("tag"), smooth, y, "sum").trace() / float((y != -100).sum())
    close(cv.trace(curv), exact + oracle.ggn(head("tag"), LOSSES["tag"], y, "mean").trace())


@pytest.mark.parametrize("order", [["tag", "size"], ["size", "tag"]])
def test_a_head_without_any_term_takes_nothing_from_the_others(order: list[str]) -> None:
    y = dict(TARGETS, tag=torch.full_like(TARGETS["tag"], -100))
    curv = build(several({k: MAKERS[k]() for k in order}), data=[(X, y)])
    close(cv.trace(curv), exact_of("size", "type2", "mean", y["size"], LABELS["size"]).trace())


def test_averages_of_batches_of_different_sizes() -> None:
    est = cv.ekfac(LAYOUT, likelihood=heads(), fisher=cv.type2(), decay=0.5)
    state = est.refresh(est.update(est.init(PARAMETERS), PARAMETERS, {}, (X, TARGETS)))
    traces, sizes = [], (2, 3)
    for s in (slice(0, 2), slice(2, 5)):
        part = X[s], {k: v[s] for k, v in TARGETS.items()}
        traces.append(cv.trace(build(heads(), data=[part])))
        state = est.update(state, PARAMETERS, {}, part)
    weights = [0.5 * sizes[0], sizes[1]]
    wanted = sum(w * t for w, t in zip(weights, traces, strict=True)) / sum(weights)
    close(cv.trace(est.finalize(state)), wanted)


def _trace(est: Any, params: Any, x: Tensor, y: Any) -> Tensor:
    """The trace of one batch, all steps by hand."""
    state = est.refresh(est.update(est.init(params), params, None, (x, y)))
    if est.setup.eigenvalues:
        state = est.update_eigenvalues(state, params, None, (x, y))
    return cv.trace(est.finalize(state))


@pytest.mark.parametrize("method", [cv.kfac, cv.ekfac])
def test_under_vmap_over_models(method: Any) -> None:
    est = method(LAYOUT, likelihood=heads(), fisher=cv.type2())
    stacked = pytrees.map(lambda p: torch.stack([p, 0.5 * p]), PARAMETERS)
    traces = torch.vmap(lambda params: _trace(est, params, X, TARGETS))(stacked)
    for k in range(2):
        close(traces[k], _trace(est, pytrees.map(lambda p, k=k: p[k], stacked), X, TARGETS))


@pytest.mark.compile
@pytest.mark.slow
def test_compiled() -> None:
    est = cv.ekfac(LAYOUT, likelihood=heads(), fisher=cv.type2())
    state = est.refresh(est.update(est.init(PARAMETERS), PARAMETERS, {}, (X, TARGETS)))

    def step(state: Any, x: Tensor, y: Any) -> Any:
        return est.update_eigenvalues(state, PARAMETERS, {}, (x, y))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    close(cv.trace(est.finalize(compiled(state, X, TARGETS))), _trace(est, PARAMETERS, X, TARGETS))


def test_labels_of_some_heads_need_a_key_for_the_others() -> None:
    some = {k: Labelled(TARGETS[k], LABELS[k]) if k == "tag" else TARGETS[k] for k in TARGETS}
    with pytest.raises(ValueError, match="expected a key"):
        build(heads(), "mc", data=[(X, some)])


def test_what_cannot_be_exact_is_nan_under_vmap() -> None:
    y = dict(TARGETS, tag=TARGETS["tag"].clone())
    y["tag"][0] = -100
    est = cv.kfac(LAYOUT, likelihood=heads(), fisher=cv.type2())

    def trace(scale: Tensor) -> Tensor:
        params = pytrees.map(lambda p: scale * p, PARAMETERS)
        return cv.trace(est.finalize(est.update(est.init(params), params, {}, (X, y))))

    assert torch.vmap(trace)(torch.ones(1, dtype=torch.float64)).isnan().all()


def test_forward_only() -> None:
    est = cv.kfac(LAYOUT, likelihood=heads(), fisher=cv.forward_only())
    curv = cv.build(est, PARAMETERS, {}, [(X, TARGETS)])
    block = next(b for b in curv.layout if b.name == "trunk.weight")
    a = torch.cat([X, torch.ones_like(X[..., :1])], -1).flatten(0, 1)
    close(cv.trace(curv._replace(layout=(block,))), 4 * (a.T @ a / len(a)).trace())


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: several({}), ValueError, "at least one head"),
        (lambda: several({"a": cv.mse}), TypeError, "expected a Likelihood"),
        (
            lambda: several({"a": cv.mse(), "b": cv.mse(reduction=cv.sum)}),
            ValueError,
            "one reduction.*mean_reduction.*sum_reduction",
        ),
        (lambda: several({"a": cv.mse()}, weights={"b": 1}), ValueError, r"weights of \['a'\]"),
        (lambda: several({"a": cv.mse()}, divisors={"b": 1}), ValueError, "divisors of"),
        (lambda: several({"a": cv.mse()}, weights={"a": -1}), ValueError, "at least 0"),
        (lambda: several({"a": cv.mse()}, divisors={"a": 0}), ValueError, "greater than 0"),
        (lambda: heads("sum", divisors={"tag": 1}), ValueError, "divisors of means"),
        (lambda: build(heads(), data=[(X, TARGETS["tag"])]), TypeError, "targets to be a dict"),
        (
            lambda: build(heads(), data=[(X, {"tag": TARGETS["tag"]})]),
            ValueError,
            r"got no targets of \['size', 'flags'\]",
        ),
        (
            lambda: build(several({"other": cv.mse()})),
            ValueError,
            r"got no outputs of \['other'\]",
        ),
        (lambda: build(cv.mse()), TypeError, "got dict; .*several"),
    ],
)
def test_errors(make: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make()


# --- affinity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product(synthetic_blocks.KINDS, repeat=2)), ids="-".join
)
def test_affinity_is_the_trace_of_the_product(first: str, second: str) -> None:
    torch.manual_seed(0)
    one, two = (synthetic_blocks.curvature(kind) for kind in (first, second))
    matrices = [synthetic_blocks.dense(case) for case in (one, two)]
    close(affinity(one.curv, two.curv), (matrices[0] @ matrices[1]).trace())


def test_affinity_of_tasks() -> None:
    curvs = [build(several({k: v})) for k, v in heads("sum").likelihoods.items()]
    for one, two in itertools.product(curvs, repeat=2):
        dense = [judged.dense(curv, PARAMETERS) for curv in (one, two)]
        close(affinity(one, two), (dense[0] * dense[1]).sum())
    close(affinity(curvs[0], curvs[0]), cv.frobenius_norm(curvs[0]) ** 2)
    joint = build(heads("sum"))
    with pytest.raises(ValueError, match="the same blocks"):
        affinity(joint._replace(layout=joint.layout[1:]), joint)

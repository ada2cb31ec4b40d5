"""Rows in the metric of F: dense, factored and thin against J (F + d)⁻¹ Jᵀ, the gate T12."""

from __future__ import annotations

from typing import Any

import pytest
import synthetic_blocks as synthetic
import torch
import torch.nn.functional as F
from synthetic_blocks import (
    F64,
    KINDS,
    LAYOUT,
    close,
    columns_tree,
    curvature,
    dense_rows,
    eye,
    factored_rows,
    few_blocks,
    flat,
    params_tree,
    randn,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import jdfunc as jd
from jdfunc import algebra, pytrees
from jdfunc import curvature as cv
from jdfunc.curvature.blocks import Block, Factors, Spectrum
from jdfunc.curvature.operate import metric as metrics
from jdfunc.curvature.operate import operators
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.damping import exact, heuristic, per_block, plain, pseudo, relative
from jdfunc.curvature.operate.metric import metric_gramian
from jdfunc.curvature.operate.operators import inverse, to_dense
from jdfunc.factored.leaves import OneHot, Outer

NAMES = pytrees.names(params_tree())
TOLERANCE = 1e-11  # T12, float64
kinds = pytest.mark.parametrize("kind", KINDS)


def damped_inverse(case: Any, rule: Any) -> Tensor:
    """(F + d)⁻¹ in the order of the leaves, by products with unit vectors (`test_operators`)."""
    return to_dense(inverse(case.curv, rule), NAMES)


def truth(case: Any, d: float) -> Tensor:
    F = synthetic.dense(case)
    return (F + d * eye(len(F))).inverse()


# --- T12 --------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [1, 400, 1 << 30])
def test_exact(kind: str, shared: bool, size: int) -> None:
    """Dense and factored rows, one batch and two, with blocks of any size, are one product."""
    case, one, two = curvature(kind), factored_rows(3, shared), factored_rows(4, shared)
    J, K = flat(dense_rows(one)), flat(dense_rows(two))
    M = truth(case, 0.1)
    options: Any = {"max_block_bytes": size}
    for rows, other in ((one, two), (dense_rows(one), dense_rows(two)), (one, dense_rows(two))):
        G = metric_gramian(case.curv, rows, **options)
        close(G, J @ M @ J.T, TOLERANCE)
        close(G, G.T, 1e-14)
        assert torch.linalg.eigvalsh(G).min() > -1e-13 * G.trace()
        close(metric_gramian(case.curv, rows, other, **options), J @ M @ K.T, TOLERANCE)
    norms = inverse(case.curv).squared_norms(one, **options)
    close(norms, (J @ M @ J.T).diagonal(), TOLERANCE)


RULES = {
    "plain": plain(0.1, 0.3),
    "heuristic": heuristic(0.1),
    "relative": relative(0.1),
    "pseudo": pseudo(),
    "mixed": per_block({"linear.bias": plain(0.2), "conv.weight": exact(1.0)}, heuristic(0.2)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["kfac", "known"])
@pytest.mark.parametrize("shared", [False, True])
def test_products_and_rules(kind: str, rule: str, shared: bool) -> None:
    case, one, two = curvature(kind), factored_rows(3, shared), factored_rows(4, shared)
    J, K = flat(dense_rows(one)), flat(dense_rows(two))
    M, options = damped_inverse(case, RULES[rule]), {"damping": RULES[rule]}
    for rows, other in ((one, two), (dense_rows(one), dense_rows(two)), (dense_rows(one), two)):
        close(metric_gramian(case.curv, rows, **options), J @ M @ J.T, TOLERANCE)
        close(metric_gramian(case.curv, rows, other, **options), J @ M @ K.T, TOLERANCE)


@pytest.mark.parametrize("rule", ["plain", "heuristic", "pseudo"])
def test_rows_of_products_stay_factored(rule: str) -> None:
    """Nothing of the size of a row times the number of rows, joint biases and one-hot included."""
    prepared = inverse(curvature("kfac").curv, RULES[rule])
    leaves = [leaf for (leaf,) in prepared.whitened(factored_rows(3, True))]
    held = dict(zip((b.name for b in LAYOUT), leaves, strict=True))
    for name in ("stored.weight", "linear.weight", "conv.weight", "alone.weight", "embedding"):
        assert not isinstance(held[name], Tensor), name
    linear = held["linear.weight"]
    assert linear.right.shape == (
        1,
        1,
        3,
        5,
    )  # a position and a column for the bias; all rows share
    assert isinstance(held["embedding"].left, OneHot)  # a diagonal factor


def test_rows_of_an_unused_weight_are_not_materialised() -> None:
    """`structured` gives a sum over no positions, of whatever shape."""
    case, rows = curvature("kfac"), factored_rows(3)
    weight = params_tree()["linear"]["weight"]
    rows["linear"]["weight"] = Outer(randn(3, 1, 0, 12), randn(3, 1, 0, 1), weight)
    leaves = [leaf for (leaf,) in inverse(case.curv, plain(0.1)).whitened(rows)]
    held = leaves[[block.name for block in LAYOUT].index("linear.weight")]
    assert held.right.shape == (3, 1, 1, 5)  # that of the bias alone
    J, M = flat(dense_rows(rows)), damped_inverse(case, plain(0.1))
    close(metric_gramian(case.curv, rows, damping=plain(0.1)), J @ M @ J.T, TOLERANCE)


def test_autocast_rounds_nothing() -> None:
    case = curvature("known")
    blocks = pytrees.map(lambda leaf: leaf.float(), dict(case.curv.blocks))
    metric = inverse(case.curv._replace(blocks=blocks))
    rows = pytrees.map(lambda leaf: leaf.float(), columns_tree(3))
    G, norms = metric.gram(rows), metric.squared_norms(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric.gram(rows), G)
        assert torch.equal(metric.squared_norms(rows), norms)


def test_gram_leaves_rows_to_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """`jdfunc.gram` materialises rows for a metric that is a function alone, not for this one."""
    case, rows = curvature("kfac"), factored_rows(3)
    metric = inverse(case.curv, plain(0.1))
    wanted = metric.gram(rows)
    close(algebra.gram(rows, metric=lambda tree: metric(tree)), wanted, TOLERANCE)
    monkeypatch.delattr(algebra, "to_dense")
    assert torch.equal(algebra.gram(rows, metric=metric), wanted)
    assert torch.equal(algebra.gram(rows, metric=case.curv), case.curv.gram(rows))


def test_blocks_of_rows_are_bounded() -> None:
    """Rotated rows are materialised some columns at a time."""
    block = Block(("w",), ((8, 16),), ((1, 8, 16),), activations=1)
    P, Q = synthetic.orthonormal(8, 8)[None], synthetic.orthonormal(16, 16)[None]
    curv = Curvature((block,), {"w": Spectrum(P, Q, torch.rand(1, 8, 16).double())}, exact(0.1))
    rows = {"w": Outer(randn(5, 1, 2, 8), randn(5, 1, 2, 16), randn(8, 16))}
    for columns in (1, 3, 16):
        size = 5 * 8 * 8 * columns
        leaves = [leaf for (leaf,) in inverse(curv).whitened(rows, max_block_bytes=size)]
        assert [leaf.numel() * 8 for leaf in leaves[:-1]] == [size] * (len(leaves) - 1)
        assert len(leaves) == -(-16 // columns)


@pytest.mark.parametrize("first", ["bias", "table"])
@pytest.mark.parametrize("rule", [exact(0.1), plain(0.1, 0.3)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_one_hot_vectors_beside_a_joined_part(first: str, rule: Any, diagonal: bool) -> None:
    """Rows of an embedding above or below those of another parameter: indices move."""
    parts = {"bias": ((3,), (1, 1, 3)), "table": ((5, 3), (1, 5, 3))}
    order = sorted(parts, reverse=first == "table")
    shapes, matrices = zip(*(parts[name] for name in order), strict=True)
    block = Block(tuple(order), shapes, matrices, -2, 0)
    left = torch.rand(1, 6, dtype=F64) if diagonal else synthetic.spd(6)[None]
    curv = Curvature((block,), {first: Factors(left, synthetic.spd(3)[None])}, rule)
    onehot = OneHot(torch.randint(0, 5, (4, 1, 2)))  # pyright: ignore
    rows = {"bias": randn(4, 3), "table": Outer(onehot, randn(4, 1, 2, 3), randn(5, 3))}
    dense = dense_rows(rows)
    J = torch.cat([dense[name].reshape(4, -1) for name in order], 1)
    M = to_dense(inverse(curv))
    close(metric_gramian(curv, rows), J @ M @ J.T, TOLERANCE)


# --- thin bases -------------------------------------------------------------------------------


def thin(r: int, q: int, d: float, dtype: torch.dtype = F64) -> tuple[Curvature, Tensor]:
    block = Block(("w",), ((5, 6),), ((1, 5, 6),), activations=1)
    P, Q = synthetic.orthonormal(5, r), synthetic.orthonormal(6, q)
    values = torch.rand(r, q, dtype=F64) + 0.5
    vectors = torch.kron(P, Q)
    F = vectors @ torch.diag(values.flatten()) @ vectors.T
    spectrum = Spectrum(P[None].to(dtype), Q[None].to(dtype), values[None].to(dtype))
    return Curvature((block,), {"w": spectrum}, exact(d)), (F + d * eye(30)).inverse()


@pytest.mark.parametrize(("r", "q"), [(2, 3), (5, 3), (2, 6), (1, 1), (5, 6)])
@pytest.mark.parametrize("rows", ["dense", "outer", "onehot", "no positions"])
def test_thin(r: int, q: int, rows: str) -> None:
    curv, M = thin(r, q, 0.2)
    left = {
        "outer": randn(4, 1, 3, 5),
        "onehot": OneHot(torch.randint(0, 5, (4, 1, 3))),  # pyright: ignore
        "no positions": randn(4, 1, 0, 5),
    }
    J: Any = {"w": randn(4, 5, 6)}
    if rows != "dense":
        positions = 0 if rows == "no positions" else 3
        J = {"w": Outer(left[rows], randn(4, 1, positions, 6), randn(5, 6))}
    D = dense_rows(J)["w"].reshape(4, 30)
    K = {"w": randn(2, 5, 6)}
    close(metric_gramian(curv, J), D @ M @ D.T, TOLERANCE)
    close(metric_gramian(curv, J, K), D @ M @ K["w"].reshape(2, 30).T, TOLERANCE)


def test_thin_product() -> None:
    """plain damping in thin bases: each side has its own complement."""
    curv, _ = thin(2, 3, 0.2)
    a, b = torch.rand(1, 2, dtype=F64), torch.rand(1, 3, dtype=F64)
    held = curv.blocks["w"]
    assert isinstance(held, Spectrum)
    known = held._replace(eigenvalues=a[..., None] * b[..., None, :], sides=(a, b))
    curv = curv._replace(blocks={"w": known}, damping=plain(0.1, 0.4))
    M = to_dense(inverse(curv))
    outer = Outer(randn(4, 1, 3, 5), randn(4, 1, 3, 6), randn(5, 6))
    onehot = OneHot(torch.randint(0, 5, (4, 1, 3)))  # pyright: ignore
    for J in (outer, outer._replace(left=onehot), randn(4, 5, 6)):
        D = dense_rows({"w": J})["w"].reshape(4, 30)
        close(metric_gramian(curv, {"w": J}), D @ M @ D.T, TOLERANCE)


@pytest.mark.parametrize("factored", [False, True])
def test_thin_with_small_damping(factored: bool) -> None:
    """Rows in the span, as those of the training data are: (1/d) |J|² − (1/d) |J~|² would cancel.

    In float32 with d = 1e-6 those terms are some 1e6 times as large as G, and rounding as G itself;
    squares of what is outside, rounded at 1e-7 of the row, are 1e-14 / d = 1e-8 of G.
    """
    curv, M = thin(2, 3, 1e-6, torch.float32)
    held = curv.blocks["w"]
    assert isinstance(held, Spectrum)
    P, Q = held.left, held.right
    assert P is not None
    assert Q is not None
    left, right = torch.randn(4, 1, 3, 2) @ P.mT, torch.randn(4, 1, 3, 3) @ Q.mT
    J: Any = {"w": Outer(left, right, torch.zeros(5, 6))}
    inside = torch.einsum(
        "rhsi,rhsj->rhij", left.double() @ P.double(), right.double() @ Q.double()
    )
    wanted = inside.reshape(4, -1) / (held.eigenvalues.double() + 1e-6).flatten()
    wanted = wanted @ inside.reshape(4, -1).T
    if not factored:
        J = {
            "w": dense_rows({"w": Outer(left.double(), right.double(), J["w"].param)})["w"].float()
        }
    close(metric_gramian(curv, J), wanted, 1e-5)


# --- more than one row axis, dtypes, edges ----------------------------------------------------


@kinds
@pytest.mark.parametrize("m", [0, 1])
def test_few_rows(kind: str, m: int) -> None:
    case, rows = curvature(kind), columns_tree(m)
    J = flat(rows)
    close(metric_gramian(case.curv, rows), J @ truth(case, 0.1) @ J.T, TOLERANCE)
    assert inverse(case.curv).squared_norms(rows).shape == (m,)


@kinds
def test_two_row_axes(kind: str) -> None:
    case, rows = curvature(kind), columns_tree(2, 3)
    J = flat(rows)
    M = truth(case, 0.1)
    G = metric_gramian(case.curv, rows, row_ndim=2)
    close(G, torch.einsum("abn,nk,cdk->abdc", J, M, J), TOLERANCE)
    assert G.shape == (2, 3, 3, 2)
    variance = metrics.laplace_variance(case.curv, rows, 0.1, row_ndim=2)
    close(variance, torch.einsum("abn,nk,abk->ab", J, M, J), TOLERANCE)


def test_two_row_axes_factored() -> None:
    curv, M = thin(5, 6, 0.2)
    J = {"w": Outer(randn(2, 1, 1, 4, 5), randn(1, 3, 1, 4, 6), randn(5, 6))}
    D = torch.einsum("ahsi,bhsj->abhij", J["w"].left[:, 0], J["w"].right[0]).reshape(2, 3, 30)
    got = metric_gramian(curv, J, row_ndim=2)
    close(got, torch.einsum("abn,nk,cdk->abdc", D, M, D), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    """Of rows of lower precision: computed in the dtype of the blocks; G is float32 at least."""
    case = curvature("known")
    rows = pytrees.map(lambda leaf: leaf.to(dtype), columns_tree(3))
    J = flat(pytrees.map(lambda leaf: leaf.double(), rows))
    G = metric_gramian(case.curv, rows)
    assert G.dtype == torch.float32
    close(G, J @ truth(case, 0.1) @ J.T, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metric_gramian(case.curv, rows), G)


def test_refusals() -> None:
    case, rows = curvature("kfac"), columns_tree(2)
    with pytest.raises(ValueError, match=r"without \['embedding'\]"):
        metric_gramian(case.curv, {k: v for k, v in rows.items() if k != "embedding"})
    with pytest.raises(ValueError, match="no block covers"):
        metric_gramian(case.curv, rows, rows | {"more": randn(2, 2)})
    with pytest.raises(ValueError, match="has its own"):
        metric_gramian(inverse(case.curv), rows, damping=exact(1.0))
    with pytest.raises(ValueError, match="empty pytree"):
        metric_gramian(Curvature((), {}, exact(1.0)), {})


# --- what it is read as -----------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["kfac", "ekfac"])
@pytest.mark.parametrize("d", [0.3, 1e-6])
def test_leverage_scores_and_kernels(estimator: str, d: float) -> None:
    """diag X (XᵀX + d)⁻¹ Xᵀ of a linear model, whose Σ JᵀJ is half the F of summed squares."""
    X, y, params = randn(7, 4), randn(7, 1), {"w": randn(1, 4), "b": randn(1)}

    def model(p: Any, buffers: Any, x: Tensor) -> Tensor:
        return F.linear(x, p["w"], p["b"])

    layout = cv.curvature_layout(model, params, None, X)
    est = getattr(cv, estimator)(layout, likelihood=cv.mse(reduction=cv.sum))
    curv = cv.build(est, params, None, [(X, y)])
    rows = torch.func.jacrev(lambda p: model(p, {}, X)[:, 0])(params)
    ones = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    wanted = ones @ torch.linalg.solve(ones.T @ ones + d * eye(5), ones.T)
    G = 2 * metric_gramian(curv, rows, damping=exact(2 * d))
    close(G, wanted, TOLERANCE)
    close(2 * metrics.laplace_variance(curv, rows, 2 * d), wanted.diagonal(), TOLERANCE)
    if d < 1e-5:  # as many degrees of freedom as parameters
        assert abs(float(G.trace()) - 5) < 1e-4
    close(jd.gram(rows), ones @ ones.T, 1e-14)


@kinds
def test_natural_step_raises_no_loss(kind: str) -> None:
    """UPGrad on G_F: J F⁻¹ Jᵀ w ≥ 0. Preconditioning what was projected first does not have it."""
    worst = 0.0
    for _ in range(5):
        case, one, noise = curvature(kind), columns_tree(1), columns_tree(4)
        rows = pytrees.map(in_conflict, one, noise)
        J, M = flat(rows), truth(case, 0.01)
        step = flat(metrics.natural_step(case.curv, rows, exactly, damping=exact(0.01)))
        G = J @ M @ J.T
        close(step, M @ J.T @ exactly(G), 1e-9)
        assert (J @ step).min() >= -1e-11 * G.trace()
        worst = min(worst, float((J @ M @ J.T @ exactly(J @ J.T)).min()))
    assert worst < -1e-3


def in_conflict(one: Tensor, noise: Tensor) -> Tensor:
    """Rows ± one, and some noise."""
    return torch.cat([one, -one, one, -one]) + 0.2 * noise


def exactly(gramian: Tensor) -> Tensor:
    return jd.upgrad(gramian, norm_eps=0.0, reg_eps=0.0)


def test_influence() -> None:
    """Retraining a quadratic: its change of the test loss, divided by −ε."""
    block = Block(("w",), ((3,),), ((1, 1, 3),))
    X, y, x, t = randn(8, 3), randn(8), randn(2, 3), randn(2)
    H = X.T @ X
    curv = Curvature((block,), {"w": Factors(torch.ones(1, 1, dtype=F64), H[None])}, exact(0.5))

    def trained(weights: Tensor) -> Tensor:
        return torch.linalg.solve(X.T @ (weights[:, None] * X) + 0.5 * eye(3), X.T @ (weights * y))

    ones, eps = torch.ones(8, dtype=F64), 1e-6
    w = trained(ones)
    train, test = X * (X @ w - y)[:, None], x * (x @ w - t)[:, None]
    found = metrics.influence(curv, {"w": test}, {"w": train})
    for n in range(8):
        more = trained(ones + eps * torch.eye(8, dtype=F64)[n])
        change = ((x @ more - t).square() - (x @ w - t).square()) / 2
        close(found[:, n], -change / eps, 1e-4)
    assert found.abs().max() > 1e-2


def test_laplace_variance() -> None:
    """The diagonal of J (F + δ)⁻¹ Jᵀ, with a precision for each block, and Bayes by hand."""
    case, rows = curvature("kfac"), factored_rows(4)
    J = flat(dense_rows(rows))
    for prior in (0.3, torch.tensor(0.3, dtype=F64), exact(0.3)):
        got = metrics.laplace_variance(case.curv, rows, prior)
        close(got, (J @ truth(case, 0.3) @ J.T).diagonal(), TOLERANCE)
    rule = per_block({"conv.bias": exact(5.0)}, exact(0.3))
    got = metrics.laplace_variance(case.curv, rows, rule)
    close(got, (J @ damped_inverse(case, rule) @ J.T).diagonal(), TOLERANCE)
    draws = flat(operators.sample(case.curv, params_tree(), 0, 20000, exact(0.3)))
    sampled = (draws @ J.T).var(0)
    wanted = metrics.laplace_variance(case.curv, rows, 0.3)
    assert ((sampled / wanted - 1).abs() < 6 * (2 / 20000) ** 0.5).all()


# --- in a step --------------------------------------------------------------------------------


def model_fn(params: Any, buffers: Any, batch: Tensor) -> Tensor:
    """One loss per example: a layer with a bias, one stored transposed, an unused leaf."""
    h = torch.tanh(torch.nn.functional.linear(batch, params["a"]["w"], params["a"]["b"]))
    return (h @ params["c"] + params["s"]).square().sum(-1)


MODEL_LAYOUT = (
    Block(("a.w", "a.b"), ((3, 4), (3,)), ((1, 3, 4), (1, 3, 1)), -1, 1),
    Block(("c",), ((3, 2),), ((1, 3, 2),), -1, 0),
    Block(("s",), ((),), ((1, 1, 1),)),
    Block(("z",), ((2, 2),), ((1, 1, 4),)),
)


def model_case() -> tuple[Any, Curvature]:
    params = {
        "a": {"w": randn(3, 4), "b": randn(3)},
        "c": randn(3, 2),
        "s": randn(),
        "z": randn(2, 2),
    }
    blocks = {
        "a.w": Factors(synthetic.spd(3)[None], synthetic.spd(5)[None]),
        "c": Factors(synthetic.spd(3)[None], synthetic.spd(2)[None]),
        "s": Spectrum(None, None, torch.rand(1, 1, 1).double()),
        "z": Spectrum(None, None, torch.zeros(1, 1, 4).double()),
    }
    return params, Curvature(MODEL_LAYOUT, blocks, exact(0.1))


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("linearize", [jd.structured, jd.dense, jd.matrix_free])
@pytest.mark.parametrize("rule", [exact(0.1), plain(0.1), relative(0.1)])
@pytest.mark.parametrize("prepared", [False, True])
def test_step(batch_dim: Any, linearize: Any, rule: Any, prepared: bool) -> None:
    params, curv = model_case()
    curv, x = curv._replace(damping=rule), randn(5, 4)
    M = to_dense(inverse(curv), pytrees.names(params))
    rows = torch.func.jacrev(lambda p: model_fn(p, {}, x))(params)
    J = torch.cat([leaf.reshape(5, -1) for leaf in pytrees.leaves(rows)], 1)
    metric = inverse(curv) if prepared else curv
    options: Any = {"batch_dim": batch_dim, "linearize": linearize, "metric": metric}
    G = jd.gramian(model_fn, params, x, **options)
    close(G, J @ M @ J.T, TOLERANCE)
    info, step = jd.value_and_jd_step(model_fn, params, x, **options)
    direction = torch.cat([leaf.flatten() for leaf in pytrees.leaves(step)])
    close(direction, M @ J.T @ info.weights, 1e-10)
    close(info.gramian, G, 1e-12)
    mean = jd.jd_step(model_fn, params, x, weighting=jd.weightings.mean, **options)
    wanted = M @ J.T @ torch.full((5,), 0.2, dtype=F64)
    close(torch.cat([leaf.flatten() for leaf in pytrees.leaves(mean)]), wanted, 1e-10)


# --- transforms -------------------------------------------------------------------------------


@kinds
def test_inputs_are_never_modified(kind: str) -> None:
    case, rows = curvature(kind), factored_rows(3)
    before = [leaf.clone() for leaf in pytrees.leaves([dict(case.curv.blocks), rows])]
    metric_gramian(case.curv, rows)
    metric_gramian(case.curv, rows, factored_rows(2))
    metrics.laplace_variance(case.curv, rows, 0.1)
    after = pytrees.leaves([dict(case.curv.blocks), rows])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@kinds
def test_vmap(kind: str) -> None:
    """An ensemble of curvatures with rows of each."""
    cases, rows = [curvature(kind) for _ in range(2)], columns_tree(2, 3)
    stacked = pytrees.map(lambda *xs: torch.stack(xs), *(dict(c.curv.blocks) for c in cases))
    leaves, restore = pytrees.flatten(stacked)

    def run(blocks: Any, tree: Any) -> Tensor:
        return metric_gramian(Curvature(LAYOUT, restore(blocks), exact(0.1)), tree)

    got = torch.vmap(run)(leaves, rows)
    for k, case in enumerate(cases):
        J = flat(rows)[k]
        close(got[k], J @ truth(case, 0.1) @ J.T, TOLERANCE)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kfac", "thin"])
def test_compile(kind: str) -> None:
    curv, rows = few_blocks(curvature(kind), factored_rows(3))
    prepared, counter = inverse(curv), CompileCounterWithBackend("aot_eager")

    def run(curv: Any, metric: Any, tree: Any, d: Tensor) -> Any:
        return metric_gramian(curv, tree, damping=exact(d)), metric_gramian(metric, tree)

    compiled, compilations = torch.compile(run, fullgraph=True, backend=counter), []
    for d in (0.1, 0.3):
        given = torch.tensor(d, dtype=F64)
        pairs = zip(
            compiled(curv, prepared, rows, given), run(curv, prepared, rows, given), strict=True
        )
        for got, wanted in pairs:
            close(got, wanted, 1e-12)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1] > 0


@pytest.mark.compile
@pytest.mark.slow
def test_compiled_step() -> None:
    params, curv = model_case()
    metric, x = inverse(curv), randn(5, 4)

    def step(p: Any, batch: Tensor) -> Any:
        return jd.jd_step(
            model_fn, p, batch, batch_dim=0, metric=metric, weighting=jd.weightings.mean
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    pairs = zip(pytrees.leaves(compiled(params, x)), pytrees.leaves(step(params, x)), strict=True)
    for got, wanted in pairs:
        close(got, wanted, 1e-12)


# --- taps of a real model ---------------------------------------------------------------------


def net(params: Any, buffers: Any, inputs: Any) -> Tensor:
    """A convolution in groups, an embedding, a norm, a linear layer, a product."""
    images, tokens = inputs
    h = F.conv2d(images, params["conv"]["w"], params["conv"]["b"], groups=2)
    h = torch.tanh(h).flatten(1) + F.embedding(tokens, params["table"]).sum(1)
    h = F.layer_norm(h, (8,), params["norm"]["w"], params["norm"]["b"])
    return torch.tanh(F.linear(h, params["out"]["w"], params["out"]["b"])) @ params["head"]


def net_params() -> Any:
    return {
        "conv": {"w": randn(2, 1, 2, 2), "b": randn(2)},
        "table": randn(6, 8),
        "norm": {"w": randn(8), "b": randn(8)},
        "out": {"w": randn(5, 8), "b": randn(5)},
        "head": randn(5, 3),
    }


@pytest.mark.parametrize("estimator", ["kfac", "ekfac"])
@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_taps(estimator: str, joint_bias: bool, batch_dim: Any) -> None:
    """Rows of `structured` stay factored in the layout of the curvature, and agree with dense."""
    params, n = net_params(), 6
    inputs = (randn(n, 2, 3, 3), torch.randint(0, 6, (n, 3)))
    layout = cv.curvature_layout(net, params, None, inputs)
    likelihood = cv.cross_entropy()
    est = getattr(cv, estimator)(layout, likelihood=likelihood, joint_bias=joint_bias)
    curv = cv.build(est, params, None, [(inputs, torch.randint(0, 3, (n,)))])

    def losses(p: Any, buffers: Any, batch: Any) -> Tensor:
        return net(p, buffers, batch).square().sum(1)

    lin = jd.structured(losses, params, inputs, batch_dim=batch_dim)
    rows = torch.func.jacrev(lambda p: losses(p, {}, inputs))(params)
    J = torch.cat([leaf.reshape(n, -1) for leaf in pytrees.leaves(rows)], 1)
    rules = [exact(0.1), relative(0.1)] + (
        [plain(0.1), pseudo(1e-6)] if estimator == "kfac" else []
    )
    for rule in rules:
        metric = inverse(curv, rule)
        M = to_dense(metric, pytrees.names(params))
        close(metric.gram(lin.rows), J @ M @ J.T, TOLERANCE)
        close(lin.gram(metric), J @ M @ J.T, TOLERANCE)
    if estimator == "kfac":
        metric = inverse(curv, plain(0.1))
        leaves = [leaf for (leaf,) in metric.whitened(lin.rows)]
        kinds = dict(zip((block.name for block in curv.layout), leaves, strict=True))
        for name in ("conv.w", "table", "out.w", "head"):
            held = pytrees.leaves(lin.rows, algebra.is_rows)[pytrees.names(params).index(name)]
            assert isinstance(kinds[name], Tensor) == isinstance(held, Tensor), name
        assert sum(not isinstance(leaf, Tensor) for leaf in leaves) >= 2

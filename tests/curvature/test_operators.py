"""F and its powers on trees, against matrices assembled block by block: the gate T4."""

from __future__ import annotations

from typing import Any

import pytest
import synthetic_blocks as synthetic
import torch
from synthetic_blocks import (
    F64,
    KINDS,
    LAYOUT,
    close,
    columns_tree,
    curvature,
    dense,
    eye,
    few_blocks,
    flat,
    matrix_power,
    params_tree,
    randn,
)
from torch._dynamo.testing import CompileCounterWithBackend

from jdfunc import pytrees
from jdfunc.curvature.blocks import Block, Factors, Spectrum
from jdfunc.curvature.operate import operators, scalars
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.damping import exact, per_block, plain, pseudo, relative
from jdfunc.curvature.operate.operators import matmat, matvec, power, solve, to_dense

NAMES = pytrees.names(params_tree())
# float64 and condition numbers up to 1e4, by T4
TOLERANCE = 1e-10
kinds = pytest.mark.parametrize("kind", KINDS)


def same(tree: Any, other: Any, tolerance: float = TOLERANCE) -> None:
    assert pytrees.same_structure(tree, other)
    for a, b in zip(pytrees.leaves(tree), pytrees.leaves(other), strict=True):
        close(a, b, tolerance)


def plus(tree: Any, scale: float, other: Any) -> Any:
    return pytrees.map(lambda a, b: a + scale * b, tree, other)


# --- T4 ---------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("columns", [(), (1,), (3,), (2, 3), (0,)])
def test_matvec(kind: str, columns: tuple[int, ...]) -> None:
    case, tree = curvature(kind), columns_tree(*columns)
    F = dense(case)
    got = matvec(case.curv, tree)
    assert pytrees.same_structure(got, tree)
    assert [x.shape for x in pytrees.leaves(got)] == [x.shape for x in pytrees.leaves(tree)]
    close(flat(got), flat(tree) @ F, 1e-12)
    same(matmat(case.curv, tree), got, 0)
    same(operators.apply(case.curv, tree, power=1), got, 0)


@kinds
def test_columns_are_vectors(kind: str) -> None:
    """K columns at once are K calls, for F and for a power of it."""
    case, tree = curvature(kind), columns_tree(3)
    for fn in (lambda t: matvec(case.curv, t), power(case.curv, -0.7)):
        each = [fn(pytrees.map(lambda leaf, k=k: leaf[k], tree)) for k in range(3)]
        same(fn(tree), pytrees.map(lambda *xs: torch.stack(xs), *each), 1e-13)


@kinds
def test_dense(kind: str) -> None:
    """Symmetric, positive semidefinite, in the order of the leaves or of the layout."""
    case = curvature(kind)
    F, got = dense(case), to_dense(case.curv, NAMES)
    close(got, F, 1e-12)
    close(got, got.T, 1e-14)
    assert torch.linalg.eigvalsh((got + got.T) / 2).min() > -1e-12
    order = [name for block in LAYOUT for name in block.params]
    by_layout = to_dense(case.curv)
    close(by_layout, to_dense(case.curv, order), 0)
    close(by_layout.trace(), F.trace(), 1e-12)
    weight, bias = columns_of("stored.weight"), columns_of("stored.bias")
    index = torch.cat([weight, bias])
    close(by_layout[:10, :10], F[index[:, None], index], 1e-12)


def columns_of(name: str) -> torch.Tensor:
    sizes = [leaf.numel() for leaf in pytrees.leaves(params_tree())]
    start = sum(sizes[: NAMES.index(name)])
    return torch.arange(start, start + sizes[NAMES.index(name)])


@kinds
@pytest.mark.parametrize("p", [-1, -0.5, 0, 0.5, 1, 2, -1.7])
def test_powers(kind: str, p: float) -> None:
    case = curvature(kind)
    F = dense(case) + 0.3 * eye(len(dense(case)))
    got = power(case.curv, p, exact(0.3))
    close(to_dense(got, NAMES), matrix_power(F, p), TOLERANCE)
    tree = columns_tree(2)
    close(
        flat(operators.apply(case.curv, tree, p, exact(0.3))),
        flat(tree) @ matrix_power(F, p),
        TOLERANCE,
    )


@kinds
@pytest.mark.parametrize("p", [-1, -0.5, 0, 0.5, 1, 2])
def test_undamped_powers(kind: str, p: float) -> None:
    """Zero eigenvalues, of a zero block and outside thin bases, have powers 0; 0 the identity."""
    case = curvature(kind)
    got = to_dense(power(case.curv, p, pseudo()), NAMES)
    close(got, matrix_power(dense(case), p) if p else eye(len(got)), 1e-8)


@kinds
def test_solve_undoes_matvec(kind: str) -> None:
    case, x = curvature(kind), columns_tree()
    same(solve(case.curv, plus(matvec(case.curv, x), 0.1, x)), x)
    same(solve(case.curv, plus(matvec(case.curv, x), 0.4, x), exact(0.4)), x)
    same(case.curv(plus(matvec(case.curv, x), 0.1, x)), x)
    same(operators.apply(case.curv, plus(matvec(case.curv, x), 0.1, x)), x)
    inverse = operators.inverse(case.curv)
    same(inverse(plus(matvec(case.curv, x), 0.1, x)), x)


@kinds
def test_roots(kind: str) -> None:
    """power(½) twice is F, power(−½) twice the inverse, with the curvature's own damping."""
    case, x = curvature(kind), columns_tree()
    root = power(case.curv, 0.5)
    same(root(root(x)), matvec(case.curv, x))
    root = power(case.curv, -0.5)
    same(root(root(x)), solve(case.curv, x))


@kinds
def test_scalars(kind: str) -> None:
    case = curvature(kind)
    F = dense(case)
    close(scalars.trace(case.curv), F.trace(), 1e-12)
    close(scalars.frobenius_norm(case.curv), torch.linalg.matrix_norm(F), 1e-12)
    damped = F + 0.2 * eye(len(F))
    close(scalars.logdet(case.curv, exact(0.2)), damped.logdet(), TOLERANCE)
    close(scalars.det(case.curv, exact(0.2)) / damped.det(), torch.ones((), dtype=F64), TOLERANCE)
    assert scalars.logdet(case.curv) == -torch.inf
    assert scalars.det(case.curv) == 0
    found = scalars.eigenvalues(case.curv)
    assert {n: v.shape for n, v in found.items()} == {b.name: b.shape for b in LAYOUT}
    every = torch.cat([v.flatten() for v in found.values()]).sort()[0]
    close(every, torch.linalg.eigvalsh(F), 1e-12)


@kinds
def test_logdet_without_damping(kind: str) -> None:
    """Of a curvature that is not singular it is finite: thin bases and zero blocks are."""
    case = curvature(kind)
    names = [b for b in LAYOUT if not b.name.startswith("unused")]
    curv = Curvature(tuple(names), case.curv.blocks, exact(0.0))
    F = to_dense(curv)
    wanted = -torch.inf if kind == "thin" else torch.linalg.slogdet(F)[1]
    torch.testing.assert_close(
        scalars.logdet(curv), torch.as_tensor(wanted, dtype=F64), rtol=1e-8, atol=1e-8
    )


@kinds
def test_diag(kind: str) -> None:
    case, params = curvature(kind), params_tree()
    F = dense(case)
    own = operators.diag(case.curv, params)
    assert [x.shape for x in pytrees.leaves(own)] == [x.shape for x in pytrees.leaves(params)]
    close(flat(own), F.diagonal(), 1e-12)
    damped = F + 0.1 * eye(len(F))
    close(flat(operators.diag(case.curv, params, power=-1)), damped.inverse().diagonal(), TOLERANCE)
    close(flat(operators.diag(case.curv, params, exact(0.1))), damped.diagonal(), 1e-12)
    other = operators.diag(case.curv, params, exact(0.1), power=0.5)
    close(flat(other), matrix_power(damped, 0.5).diagonal(), TOLERANCE)


def test_diag_of_a_product_in_thin_bases() -> None:
    block = Block(("w",), ((5, 4),), ((1, 5, 4),), activations=1)
    P, Q = synthetic.orthonormal(5, 2)[None], synthetic.orthonormal(4, 3)[None]
    a, b = torch.rand(1, 2, dtype=F64), torch.rand(1, 3, dtype=F64)
    spectrum = Spectrum(P, Q, a[..., None] * b[..., None, :], (a, b))
    curv = Curvature((block,), {"w": spectrum}, plain(0.1))
    params = {"w": randn(5, 4)}
    got = operators.diag(curv, params, power=-1)["w"]
    close(got.flatten(), to_dense(operators.inverse(curv)).diagonal(), 1e-12)


# --- sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "thin"])
def test_sample_covariance(kind: str) -> None:
    """z-test of every element of the second moment: 6 σ for some 3600 correlated elements."""
    case, n = curvature(kind), 40000
    draws = flat(operators.sample(case.curv, params_tree(), 7, n, exact(0.5)))
    wanted = matrix_power(dense(case) + 0.5 * eye(draws.shape[1]), -1)
    deviation = ((wanted.square() + wanted.diagonal()[:, None] * wanted.diagonal()) / n).sqrt()
    assert ((draws.T @ draws / n - wanted) / deviation).abs().max() < 6
    assert (draws.mean(0) / (wanted.diagonal() / n).sqrt()).abs().max() < 6


def test_sample_is_a_function_of_its_key() -> None:
    case, params = curvature("kfac"), params_tree()
    one = operators.sample(case.curv, params, 3, 5)
    same(operators.sample(case.curv, params, torch.tensor(3), 5), one, 0)
    fewer = operators.sample(case.curv, params, 3, 2)
    same(fewer, pytrees.map(lambda x: x[:2], one), 1e-13)
    assert (flat(operators.sample(case.curv, params, 4, 5)) != flat(one)).all()
    z = flat(one)
    assert len(z.unique()) == z.numel()  # no two blocks draw the same numbers
    assert flat(operators.sample(case.curv, params, 3, 0)).shape[0] == 0
    narrow = operators.sample(case.curv, pytrees.map(lambda x: x.bfloat16(), params), 3, 5)
    assert {x.dtype for x in pytrees.leaves(narrow)} == {torch.bfloat16}
    with pytest.raises(ValueError, match="number of samples"):
        operators.sample(case.curv, params, 3, -1)


def test_samples_do_not_depend_on_the_choice_of_eigenvectors() -> None:
    case, params = curvature("known"), params_tree()
    blocks = {
        name: s._replace(left=None if s.left is None else -s.left)
        for name, s in case.curv.blocks.items()
        if isinstance(s, Spectrum)
    }
    turned = case.curv._replace(blocks=case.curv.blocks | blocks)
    same(operators.sample(turned, params, 1, 3), operators.sample(case.curv, params, 1, 3), 1e-13)


# --- zeros, dtypes, scales --------------------------------------------------------------------


def test_parameters_without_curvature() -> None:
    """Undamped, or damped in proportion, a zero block has a zero inverse: never NaN."""
    case, x = curvature("ekfac"), columns_tree()
    for rule in (exact(0.0), relative(1e-3), pseudo(), plain(0.0)):
        rule = per_block({"unused.0": rule, "unused.1": rule}, otherwise=exact(0.1))
        got = solve(case.curv, x, rule)
        assert (got["unused"][0] == 0).all()
        assert (got["unused"][1] == 0).all()
        assert all(bool(leaf.isfinite().all()) for leaf in pytrees.leaves(got))
        draws = operators.sample(case.curv, x, 1, 2, rule)
        assert (draws["unused"][0] == 0).all()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39])
def test_eigenvalues_whose_inverse_overflows_count_as_zero(value: float) -> None:
    block = Block(("w",), ((2,),), ((1, 1, 2),))
    curv = Curvature(
        (block,), {"w": Spectrum(None, None, torch.tensor([[[value, 1.0]]]))}, exact(0.0)
    )
    assert curv({"w": torch.tensor([0.0, 1.0])})["w"].tolist() == [0.0, 1.0]
    assert power(curv, -0.5)({"w": torch.ones(2)})["w"].tolist() == [0.0, 1.0]


def test_nan_goes_on() -> None:
    block = Block(("w",), ((2,),), ((1, 1, 2),))
    for rule in (exact(0.1), relative(0.1), pseudo(), exact(0.0)):
        curv = Curvature(
            (block,), {"w": Spectrum(None, None, torch.tensor([[[torch.nan, 1.0]]]))}, rule
        )
        assert curv({"w": torch.ones(2)})["w"][0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_trees_keep_their_dtypes(dtype: torch.dtype) -> None:
    """Computed in the dtype of the blocks; rounded once, at the end."""
    case = curvature("known")
    x = pytrees.map(lambda leaf: leaf.to(dtype), columns_tree(2))
    wide = pytrees.map(lambda leaf: leaf.double(), x)
    for fn in (lambda t: matvec(case.curv, t), power(case.curv, -1)):
        wanted = pytrees.map(lambda leaf: leaf.to(dtype), fn(wide))
        same(
            pytrees.map(lambda leaf: leaf.double(), fn(x)),
            pytrees.map(lambda leaf: leaf.double(), wanted),
            0,
        )
        assert {leaf.dtype for leaf in pytrees.leaves(fn(x))} == {dtype}


def test_blocks_of_half_precision_are_computed_in_float32() -> None:
    block = Block(("w",), ((3,),), ((1, 1, 3),))
    Q = torch.linalg.qr(torch.randn(1, 3, 3))[0].bfloat16()
    spectrum = Spectrum(None, Q, torch.rand(1, 1, 3).half())  # nor are their dtypes the same
    x = {"w": torch.randn(3)}
    got = matvec(Curvature((block,), {"w": spectrum}, exact(0.1)), x)["w"]
    wanted = Q[0].double() @ (
        spectrum.eigenvalues[0, 0].double() * (Q[0].double().T @ x["w"].double())
    )
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)


def test_autocast_rounds_nothing() -> None:
    case, x = curvature("known"), columns_tree(2)
    narrow = pytrees.map(lambda leaf: leaf.float(), x)
    blocks = pytrees.map(lambda leaf: leaf.float(), dict(case.curv.blocks))
    curv = case.curv._replace(blocks=blocks)
    plain_result = power(curv, -1)(narrow), matvec(curv, narrow)
    with torch.autocast("cpu", torch.bfloat16):
        prepared = power(curv, -1)
        same(prepared(narrow), plain_result[0], 0)
        same(matvec(curv, narrow), plain_result[1], 0)


# --- refusals ---------------------------------------------------------------------------------


def test_refusals() -> None:
    case, x = curvature("kfac"), columns_tree(2)
    with pytest.raises(ValueError, match=r"without \['embedding'\]"):
        matvec(case.curv, {k: v for k, v in x.items() if k != "embedding"})
    with pytest.raises(ValueError, match=r"\['more'\], which no block covers"):
        solve(case.curv, x | {"more": randn(2, 3)})
    with pytest.raises(ValueError, match=r"'embedding' of shape \[\*columns, \*\(5, 3\)\]"):
        matvec(case.curv, x | {"embedding": randn(2, 3, 5)})
    with pytest.raises(ValueError, match="'embedding' of shape"):
        matvec(case.curv, x | {"embedding": randn(3)})
    with pytest.raises(ValueError, match="same column axes"):
        matvec(case.curv, x | {"embedding": randn(4, 5, 3)})
    with pytest.raises(TypeError, match="int64 at 'embedding'"):
        matvec(case.curv, x | {"embedding": torch.ones(2, 5, 3, dtype=torch.int64)})
    with pytest.raises(TypeError, match="a power that is a number"):
        power(case.curv, "2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="finite power"):
        power(case.curv, torch.inf)
    with pytest.raises(ValueError, match="every parameter once"):
        to_dense(case.curv, [*NAMES, NAMES[0]])
    with pytest.raises(ValueError, match="without"):
        to_dense(case.curv, NAMES[1:])
    bad = case.curv.blocks | {
        "alone.weight": Factors(torch.full((1, 3, 3), torch.nan), eye(2)[None])
    }
    with pytest.raises(ValueError, match="alone.weight"):
        power(case.curv._replace(blocks=bad), -1)


def test_no_parameters() -> None:
    curv = Curvature((), {}, exact(0.1))
    assert matvec(curv, {}) == {}
    assert curv({}) == {}
    assert scalars.trace(curv) == scalars.logdet(curv) == scalars.frobenius_norm(curv) == 0
    assert to_dense(curv).shape == (0, 0)


def test_an_empty_parameter() -> None:
    block = Block(("w",), ((0, 3),), ((1, 0, 3),), activations=1)
    held = Factors(torch.zeros(1, 0, 0, dtype=F64), eye(3)[None])
    for rule in (exact(0.1), plain(0.1), pseudo()):
        curv = Curvature((block,), {"w": held}, rule)
        assert curv({"w": randn(2, 0, 3)})["w"].shape == (2, 0, 3)
        assert scalars.logdet(curv, rule) == 0


# --- transforms -------------------------------------------------------------------------------


@kinds
def test_inputs_are_never_modified(kind: str) -> None:
    case, x = curvature(kind), columns_tree(2)
    before = [leaf.clone() for leaf in pytrees.leaves([dict(case.curv.blocks), x])]
    inverse = operators.inverse(case.curv)
    held = [leaf.clone() for leaf in pytrees.leaves(inverse.parts)]
    for _ in range(2):
        matvec(case.curv, x), inverse(x), power(case.curv, 0.5)(x), solve(case.curv, x)
        operators.sample(case.curv, params_tree(), 1, 2), operators.diag(case.curv, params_tree())
        scalars.logdet(case.curv), scalars.eigenvalues(case.curv), to_dense(case.curv)
    after = pytrees.leaves([dict(case.curv.blocks), x])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held, pytrees.leaves(inverse.parts), strict=True))


@kinds
def test_vmap_over_stacked_blocks(kind: str) -> None:
    """An ensemble: blocks with a leading axis, and a vector for each."""
    cases = [curvature(kind) for _ in range(3)]
    x = columns_tree(3)
    stacked = pytrees.map(lambda *xs: torch.stack(xs), *(dict(c.curv.blocks) for c in cases))

    leaves, restore = pytrees.flatten(stacked)  # torch.vmap takes no None, an identity basis

    def run(blocks: Any, tree: Any) -> Any:
        curv = Curvature(LAYOUT, restore(blocks), exact(0.1))
        return (
            matvec(curv, tree),
            solve(curv, tree),
            power(curv, -0.5)(tree),
            scalars.logdet(curv, exact(0.1)),
            operators.diag(curv, tree, power=-1),
        )

    got = torch.vmap(run)(leaves, x)
    for k, case in enumerate(cases):
        wanted = run(
            pytrees.leaves(dict(case.curv.blocks)), pytrees.map(lambda leaf, k=k: leaf[k], x)
        )
        same(pytrees.map(lambda leaf, k=k: leaf[k], got), wanted, 1e-12)


def test_vmap_over_damping() -> None:
    case, x = curvature("kfac"), columns_tree()
    many = torch.tensor([0.1, 1.0], dtype=F64)
    got = torch.vmap(lambda d: solve(case.curv, x, exact(d)))(many)
    for k, d in enumerate(many):
        same(
            pytrees.map(lambda leaf, k=k: leaf[k], got), solve(case.curv, x, exact(float(d))), 1e-12
        )


@kinds
def test_differentiable(kind: str) -> None:
    case = curvature(kind)
    x = pytrees.map(lambda leaf: leaf.requires_grad_(), columns_tree())
    inverse = power(case.curv, -1)
    y = flat(inverse(x))
    grads = torch.autograd.grad(y.square().sum(), pytrees.leaves(x))
    wanted = 2 * to_dense(inverse, NAMES) @ y.detach()
    close(torch.cat([g.flatten() for g in grads]), wanted, TOLERANCE)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kfac", "thin"])
def test_compile(kind: str) -> None:
    case, tree = curvature(kind), columns_tree(2)
    curv, x = few_blocks(case, tree)
    inverse, counter = operators.inverse(curv), CompileCounterWithBackend("aot_eager")

    def run(curv: Curvature, prepared: Any, tree: Any, d: torch.Tensor) -> Any:
        return matvec(curv, tree), prepared(tree), operators.solve(curv, tree, exact(d))

    compiled, compilations = torch.compile(run, fullgraph=True, backend=counter), []
    for d in (0.1, 0.3):
        given = torch.tensor(d, dtype=F64)
        same(compiled(curv, inverse, x, given), run(curv, inverse, x, given), 1e-12)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1] > 0

"""Damping rules against damped dense matrices, built factor by factor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import synthetic_blocks as synthetic
import torch
from synthetic_blocks import LAYOUT, close, curvature, eye, group_matrices, matrix_power, whole
from torch import Tensor

from jdfunc import pytrees
from jdfunc.curvature.blocks import Block, Spectrum
from jdfunc.curvature.operate import damping as rules
from jdfunc.curvature.operate.operators import inverse, power, to_dense
from jdfunc.curvature.operate.scalars import logdet

NAMES = pytrees.names(synthetic.params_tree())
# float64, condition numbers up to 1e4: 1e-10 leaves two digits
TOLERANCE = 1e-10
PRODUCTS = [b.name for b in LAYOUT if b.activations is not None]


def damped_matrices(case: Any, d_A: Any, d_B: Any, d: float) -> dict[str, list[Tensor]]:
    """(B + d_B) ⊗ (A + d_A) of products, in the order of their sides; F + d of the others."""
    found = {}
    for block in LAYOUT:
        found[block.name] = []
        for k, truth in enumerate(case.truth[block.name]):
            if block.name in PRODUCTS:
                left, right = truth
                a, b = (left, right) if block.activations == 0 else (right, left)
                a, b = a + d_A(a, b) * eye(len(a)), b + d_B(a, b) * eye(len(b))
                found[block.name].append(
                    torch.kron(*((a, b) if block.activations == 0 else (b, a)))
                )
            else:
                own = group_matrices(case, block)[k]
                found[block.name].append(own + d * eye(len(own)))
    return found


def check(case: Any, rule: Any, matrices: dict[str, list[Tensor]]) -> None:
    F = whole(matrices)
    for p in (1.0, -1.0, -0.5, 0.3):
        close(to_dense(power(case.curv, p, rule), NAMES), matrix_power(F, p), TOLERANCE)
    close(logdet(case.curv, rule), torch.linalg.slogdet(F)[1], TOLERANCE)


@pytest.mark.parametrize("kind", synthetic.KINDS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_exact(kind: str, as_tensor: bool) -> None:
    case = curvature(kind)
    rule = rules.exact(torch.tensor(0.03) if as_tensor else 0.03)
    d = float(torch.tensor(0.03)) if as_tensor else 0.03
    check(
        case,
        rule,
        {b.name: [F + d * eye(len(F)) for F in group_matrices(case, b)] for b in LAYOUT},
    )


@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_relative(kind: str) -> None:
    """The mean is over all h i j eigenvalues; a zero block stays zero and has no inverse."""
    case = curvature(kind)
    matrices = {}
    for block in LAYOUT:
        own = group_matrices(case, block)
        mean = sum(float(F.trace()) for F in own) / math.prod(block.shape)
        matrices[block.name] = [F + 0.2 * mean * eye(len(F)) for F in own]
    rule = rules.relative(0.2)
    for p in (1.0, -1.0, 0.5):
        got = to_dense(power(case.curv, p, rule), NAMES)
        close(got, matrix_power(whole(matrices), p), TOLERANCE)
    assert logdet(case.curv, rule) == -torch.inf


@pytest.mark.parametrize("kind", ["kfac", "known"])
@pytest.mark.parametrize("given", [(0.1,), (0.1, 0.4)])
def test_plain(kind: str, given: tuple[float, ...]) -> None:
    d_A, d_B = given[0], given[-1]
    case = curvature(kind)
    matrices = damped_matrices(case, lambda a, b: d_A, lambda a, b: d_B, d_B)
    check(case, rules.plain(*given), matrices)


def pi(a: Tensor, b: Tensor) -> float:
    return math.sqrt(float(a.trace()) / len(a) / (float(b.trace()) / len(b)))


@pytest.mark.parametrize("kind", ["kfac", "known"])
@pytest.mark.parametrize("minimum", [0.0, 0.3])
def test_heuristic(kind: str, minimum: float) -> None:
    d, case = 0.05, curvature(kind)
    matrices = damped_matrices(
        case,
        lambda a, b: max(pi(a, b) * math.sqrt(d), minimum),
        lambda a, b: max(math.sqrt(d) / pi(a, b), minimum),
        d,
    )
    check(case, rules.heuristic(d, minimum), matrices)


def thin_sides() -> tuple[Block, Spectrum, Tensor, Tensor]:
    """A product of two factors of low rank, held in thin bases; activations on the right."""
    block = Block(("w",), ((5, 4),), ((1, 5, 4),), activations=1)
    P, Q = synthetic.orthonormal(5, 2), synthetic.orthonormal(4, 3)
    a, b = torch.rand(2).double() + 0.1, torch.rand(3).double() + 0.1
    spectrum = Spectrum(P[None], Q[None], (a[:, None] * b)[None], (a[None], b[None]))
    return block, spectrum, P @ torch.diag(a) @ P.T, Q @ torch.diag(b) @ Q.T


@pytest.mark.parametrize("d_B", [0.3, 0.0])
def test_plain_in_thin_bases(d_B: float) -> None:
    """The complement of a product is not of one eigenvalue: d_A λ_B, d_B λ_A and d_A d_B."""
    block, spectrum, B, A = thin_sides()
    curv = synthetic.Curvature((block,), {"w": spectrum}, rules.exact(0.1))
    F = torch.kron(B + d_B * eye(5), A + 0.2 * eye(4))
    rule = rules.plain(0.2, d_B)
    for p in (-1, 0.5, -0.5):
        close(to_dense(power(curv, p, rule)), matrix_power(F, p), TOLERANCE)
    if d_B:
        close(logdet(curv, rule), F.logdet(), TOLERANCE)
    else:
        assert logdet(curv, rule) == -torch.inf
    d_A, d_B = math.sqrt(0.1) * pi(A, B), math.sqrt(0.1) / pi(A, B)
    F = torch.kron(B + d_B * eye(5), A + d_A * eye(4))
    close(to_dense(inverse(curv, rules.heuristic(0.1))), F.inverse(), TOLERANCE)


def test_heuristic_of_a_zero_factor() -> None:
    """π = 1 where a trace is zero: damping √d on both sides, no NaN."""
    block = Block(("w",), ((2, 3),), ((1, 2, 3),), activations=1)
    a, b = torch.zeros(1, 2), torch.rand(1, 3)
    for sides in ((a, b), (a, 0 * b), (a + 1, 0 * b)):
        spectrum = Spectrum(None, None, sides[0][..., None] * sides[1][..., None, :], sides)
        left, right = rules.heuristic(0.25)(block, spectrum)
        torch.testing.assert_close(left.values, sides[0] + 0.5)
        torch.testing.assert_close(right.values, sides[1] + 0.5)


def test_heuristic_at_extreme_scales() -> None:
    """π of factors some 1e38 apart, in float32, is finite."""
    block = Block(("w",), ((1, 1),), ((1, 1, 1),), activations=1)
    sides = (torch.full((1, 1), 1e-30), torch.full((1, 1), 1e30))
    spectrum = Spectrum(None, None, sides[0][..., None] * sides[1][..., None, :], sides)
    left, right = rules.heuristic(1e-4)(block, spectrum)
    torch.testing.assert_close(left.values, torch.full((1, 1), 1.01e-30), rtol=1e-5, atol=0)
    torch.testing.assert_close(right.values, torch.full((1, 1), 1.01e30), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["kfac", "known"])
def test_pseudo(kind: str) -> None:
    """The pseudo-inverse of factors of rank 2, up to rounding of their eigenvalues."""
    case = curvature(kind, rank=2)
    matrices = {
        b.name: [torch.linalg.pinv(F, rtol=1e-10) for F in group_matrices(case, b)] for b in LAYOUT
    }
    close(to_dense(inverse(case.curv, rules.pseudo()), NAMES), whole(matrices), 1e-9)


def test_pseudo_cuts_each_factor_at_its_own_largest() -> None:
    block = Block(("w",), ((2, 2),), ((1, 2, 2),), activations=1)
    a, b = torch.tensor([[1e-4, 1.0]]), torch.tensor([[1e-2, 10.0]])
    spectrum = Spectrum(None, None, a[..., None] * b[..., None, :], (a, b))
    left, right = rules.pseudo(2e-3)(block, spectrum)
    assert left.values.tolist() == [[0.0, 1.0]]
    assert right.values.tolist() == [[0.0, 10.0]]
    values = rules.pseudo(2e-3)(block, spectrum._replace(sides=None)).values
    torch.testing.assert_close(values, torch.tensor([[[0.0, 0.0], [0.0, 10.0]]]))


def test_per_block() -> None:
    """By the name of any parameter of a block; blocks of their own damping."""
    case = curvature("ekfac")
    rule = rules.per_block(
        {"linear.bias": rules.exact(1.0), "embedding": rules.relative(2.0)},
        otherwise=rules.exact(0.1),
    )
    matrices = {b.name: group_matrices(case, b) for b in LAYOUT}
    added = dict.fromkeys(matrices, 0.1) | {"linear.weight": 1.0}
    added["embedding"] = 2 * float(matrices["embedding"][0].trace()) / 15
    damped = {name: [F + added[name] * eye(len(F)) for F in own] for name, own in matrices.items()}
    check(case, rule, damped)


def test_refusals() -> None:
    case = curvature("ekfac")
    for rule in (rules.plain(0.1), rules.heuristic(0.1)):
        with pytest.raises(ValueError, match=r"'stored.weight'.*EKFAC"):
            inverse(case.curv, rule)
    for make in (rules.exact, rules.relative, rules.plain, rules.heuristic, rules.pseudo):
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="not negative"):
                make(bad)
        with pytest.raises(TypeError, match="number"):
            make("0.1")
    with pytest.raises(ValueError, match="d_B"):
        rules.plain(1.0, -1.0)
    with pytest.raises(ValueError, match="minimum"):
        rules.heuristic(1.0, -1.0)
    with pytest.raises(ValueError, match="without axes"):
        rules.exact(torch.ones(2))
    with pytest.raises(ValueError, match="nowhere"):
        inverse(case.curv, rules.per_block({"nowhere": rules.exact(1.0)}, rules.exact(1.0)))
    both = {"linear.weight": rules.exact(1.0), "linear.bias": rules.exact(1.0)}
    with pytest.raises(ValueError, match="one damping rule for a block"):
        inverse(case.curv, rules.per_block(both, rules.exact(1.0)))
    with pytest.raises(TypeError, match="damping rule"):
        inverse(case.curv, 0.1)  # pyright: ignore[reportArgumentType]

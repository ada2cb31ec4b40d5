"""The dual-cone solver: optimality conditions, closed forms, an oracle and composition."""

import functools

import hypothesis.strategies as st
import pytest
import samplers
import torch
from hypothesis import given, settings
from properties import assert_kkt
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from jdfunc.solvers import dual_cone, lcp, quadprog

RIDGE = 1e-10

# Dynamo itself creates the object that its warning is about.
quiet_dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def problem(family: str, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return samplers.gramian(samplers.draw(family, m, seed)), torch.eye(m, dtype=torch.float64) / m


# The ridge shows in the residual as ridge · max z; z stays below 100 on every family.
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 16, 30, 64])
@pytest.mark.parametrize("family", samplers.FAMILIES)
def test_kkt(family, m):
    gramian, bounds = problem(family, m)
    assert_kkt(gramian, bounds, dual_cone(gramian, bounds), atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("m", [3, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("family", samplers.FAMILIES)
def test_always_converges(family, m):
    for seed in range(20 if m < 64 else 4):
        gramian, bounds = problem(family, m, seed)
        assert_kkt(gramian, bounds, dual_cone(gramian, bounds), atol=2e-8)


# With the ridge moved into G the solution is exact, so the residual is rounding alone.
@settings(max_examples=40)
@given(
    family=st.sampled_from(sorted(samplers.FAMILIES)),
    m=st.integers(1, 40),
    k=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_kkt_of_random_bounds(family, m, k, seed):
    gramian, _ = problem(family, m, seed)
    diagonal = gramian.diagonal()
    gramian = gramian + torch.diag(1e-8 * torch.where(diagonal > 0, diagonal, 1))
    bounds = torch.randn(k, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    bounds = bounds / gramian.diagonal().sqrt()
    assert_kkt(gramian, bounds, dual_cone(gramian, bounds, ridge=0.0), atol=1e-10)


@pytest.mark.parametrize("m", [2, 3, 8, 24, 40])
@pytest.mark.parametrize("family", ["full", "tall", "near_dup", "camps", "spread", "integer"])
def test_quadprog_agrees(family, m):
    gramian, bounds = problem(family, m)
    mine, peer = dual_cone(gramian, bounds, ridge=1e-6), quadprog(gramian, bounds, ridge=1e-6)
    torch.testing.assert_close(mine, peer, rtol=1e-7, atol=1e-7 * peer.abs().max().item())


def test_closed_form_of_two():
    gramian = torch.tensor([[4.0, -3.0], [-3.0, 9.0]], dtype=torch.float64)
    v = dual_cone(gramian, torch.eye(2), ridge=0.0)
    torch.testing.assert_close(
        v, torch.tensor([[1, 3 / 9], [3 / 4, 1]], dtype=torch.float64), rtol=1e-12, atol=0
    )


@settings(max_examples=100)
@given(st.floats(-1, 1), st.floats(-3, 3), st.floats(-3, 3), st.floats(-4, 4), st.floats(-4, 4))
def test_two_objectives_agree_with_the_general_path(cosine, u, v, scale_a, scale_b):
    root = torch.tensor([10**scale_a, 10**scale_b], dtype=torch.float64)
    gramian = torch.tensor([[1, cosine], [cosine, 1]], dtype=torch.float64) * root * root[:, None]
    bounds = torch.tensor([[u, v]], dtype=torch.float64) / root
    q = bounds @ gramian
    closed = dual_cone(gramian, bounds, ridge=1e-6) - bounds
    general = lcp(gramian, q, bounds=bounds, ridge=1e-6)
    torch.testing.assert_close(closed * root, general * root, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("m", [2, 4, 9, 30])
def test_homogeneous_and_scale_free(m):
    gramian, bounds = problem("full", m)
    v = dual_cone(gramian, bounds)
    for scale in (1e-24, 1e-6, 1e24):
        torch.testing.assert_close(dual_cone(scale * gramian, bounds), v, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            dual_cone(gramian, scale * bounds) / scale, v, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("m", [2, 3, 8, 30])
def test_batched_looped_and_mapped(m):
    jacobians = torch.stack([samplers.draw("full", m, seed) for seed in range(6)])
    gramians = samplers.gramian(jacobians).reshape(2, 3, m, m)
    bounds = torch.eye(m, dtype=torch.float64).expand(2, 3, m, m)
    batched = dual_cone(gramians, bounds)
    looped = torch.stack([dual_cone(g, bounds[0, 0]) for g in gramians.reshape(6, m, m)])
    mapped = torch.vmap(torch.vmap(dual_cone))(gramians, bounds)
    shared = torch.vmap(torch.vmap(dual_cone, (0, None)), (0, None))(gramians, bounds[0, 0])
    for other in (looped.reshape(batched.shape), mapped, shared):
        torch.testing.assert_close(batched, other, rtol=1e-10, atol=1e-10)
    assert dual_cone(gramians[:0], bounds[:0]).shape == (0, 3, m, m)


@pytest.mark.parametrize("m", [2, 3, 30])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 1), (1, 1)])
def test_not_finite_poisons_its_own_element(m, value, place):
    gramian, bounds = problem("full", m)
    broken = gramian.clone()
    broken[place] = broken[place[::-1]] = value
    out = dual_cone(torch.stack([gramian, broken]), bounds.expand(2, m, m))
    torch.testing.assert_close(out[0], dual_cone(gramian, bounds), rtol=1e-12, atol=1e-12)
    assert out[1].isnan().all()
    assert dual_cone(broken, bounds).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [2, 3, 16, 40])
def test_narrow_dtypes(dtype, m):
    gramian, bounds = problem("full", m)
    out = dual_cone((gramian / m).to(dtype), bounds.to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_indefinite_input_gets_a_larger_ridge():
    gramian = torch.tensor([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]], dtype=torch.float64)
    assert torch.linalg.eigvalsh(gramian)[0] < -0.5
    assert dual_cone(gramian, torch.eye(3)).isfinite().all()


@pytest.mark.parametrize("m", [2, 3, 5, 30])
@pytest.mark.parametrize("seed", [1, 2])
def test_gradients(m, seed):
    jacobian = samplers.draw("full", m, seed)[:m, : m + 2].clone().requires_grad_()
    bounds = (torch.rand(2, m, dtype=torch.float64) + 0.1).requires_grad_()

    def projected(jacobian, bounds):
        return dual_cone(samplers.gramian(jacobian), bounds, ridge=1e-6) @ jacobian

    assert torch.autograd.gradcheck(projected, (jacobian, bounds), fast_mode=m > 5)
    if m < 30:
        assert torch.autograd.gradgradcheck(projected, (jacobian, bounds), fast_mode=True)


def test_gradients_under_vmap():
    jacobians = torch.stack([samplers.draw("full", 4, seed) for seed in range(3)])

    def total(jacobian):
        return dual_cone(samplers.gramian(jacobian), torch.eye(4)).square().sum()

    mapped = torch.vmap(torch.func.grad(total))(jacobians)
    looped = torch.stack([torch.func.grad(total)(j) for j in jacobians])
    outside = torch.func.grad(lambda js: torch.vmap(total)(js).sum())(jacobians)
    torch.testing.assert_close(mapped, looped, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outside, looped, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", samplers.FAMILIES)
def test_gradients_are_finite(family):
    jacobian = samplers.draw(family, 5).requires_grad_()
    dual_cone(samplers.gramian(jacobian), torch.eye(5)).sum().backward()
    assert jacobian.grad.isfinite().all()


@quiet_dynamo
@pytest.mark.compile
@pytest.mark.parametrize("m", [2, 3, 30])
def test_compiles_whole(m):
    gramian, bounds = problem("full", m)
    compiled = torch.compile(dual_cone, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(gramian, bounds), dual_cone(gramian, bounds), rtol=1e-10, atol=1e-10
    )
    leaf = gramian.clone().requires_grad_()
    compiled(leaf, bounds).sum().backward()
    other = gramian.clone().requires_grad_()
    dual_cone(other, bounds).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-9)


@quiet_dynamo
@pytest.mark.compile
def test_compiles_mapped():
    gramians = torch.stack([problem("full", 4, seed)[0] for seed in range(3)])
    mapped = torch.vmap(functools.partial(dual_cone, bounds=torch.eye(4)))
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gramians), mapped(gramians), rtol=1e-10, atol=1e-10)


def test_operator_passes_opcheck():
    gramian, bounds = problem("full", 4)
    torch.library.opcheck(
        torch.ops.jdfunc.lcp.default,
        (gramian, bounds @ gramian, bounds, RIDGE),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("m", [2, 3, 40])
def test_traces_without_reading_values(m):
    gramian, bounds = problem("full", m)
    with FakeTensorMode():
        assert dual_cone(torch.empty(m, m), torch.empty(m, m)).shape == (m, m)
        assert dual_cone(torch.empty(4, m, m), torch.empty(4, m, m)).shape == (4, m, m)
    traced = make_fx(lambda g, b: dual_cone(g, b))(gramian, bounds)
    other, _ = problem("camps", m)
    torch.testing.assert_close(
        traced(other, bounds), dual_cone(other, bounds), rtol=1e-10, atol=1e-10
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused_not_dropped():
    gramian, bounds = problem("full", 3)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda g: dual_cone(g, bounds), (gramian,), (gramian,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        dual_cone(torch.autograd.forward_ad.make_dual(gramian, gramian), bounds)

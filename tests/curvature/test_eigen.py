"""Eigenvalue problems of factors: scales, ranks, failures and their retries, and null spaces."""

from __future__ import annotations

import contextlib

import pytest
import torch
from models import randn
from torch import Tensor

from jdfunc.curvature import eigen
from jdfunc.curvature.eigen import completed, eigh, eigh_all
from jdfunc.curvature.estimate.thin import thin_basis

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]


def moment(n: int, d: int, *groups: int) -> Tensor:
    x = randn(*groups, n, d)
    return x.mT @ x


def check(matrix: Tensor, values: Tensor, vectors: Tensor, tolerance: float = 1e-13) -> None:
    """Q diag(λ) Qᵀ is the matrix, Q is orthonormal, λ is ascending and not negative."""
    size, eye = matrix.abs().max(), torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    d = matrix.shape[-1]
    assert ((vectors * values[..., None, :]) @ vectors.mT - matrix).abs().max() <= tolerance * (
        d * size
    )
    assert (vectors.mT @ vectors - eye).abs().max() <= tolerance * d
    assert (values >= 0).all()
    assert (values.diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("n", [0, 1, 3, 9])
def test_eigh_of_any_rank_and_scale(n, scale, dtype):
    """Zeros, rank one, deficient, full."""
    matrix = (moment(n, 5) * scale).to(dtype)
    compute = dtype if scale == 1 or dtype == torch.float64 else torch.float64
    check(matrix, *eigh(matrix, compute), tolerance=1e-13 if dtype == torch.float64 else 1e-6)
    values, vectors = eigh(matrix, None)
    assert values.dtype == vectors.dtype == dtype
    assert vectors.is_contiguous()


def test_one_number_and_none():
    check(torch.tensor([[3.0]]), *eigh(torch.tensor([[3.0]])))
    values, vectors = eigh(torch.zeros(2, 0, 0))
    assert values.shape == (2, 0)
    assert vectors.shape == (2, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_matrices_are_decomposed_in_float32_at_least(dtype):
    values, vectors = eigh(torch.eye(3, dtype=dtype) * 2, None)
    assert values.dtype == vectors.dtype == dtype
    assert torch.equal(values, torch.full((3,), 2.0, dtype=dtype))


def test_matrices_are_symmetrised_and_values_clamped():
    matrix = moment(9, 4)
    skew = torch.triu(randn(4, 4), 1)
    values, vectors = eigh(matrix + skew - skew.mT)
    check(matrix, values, vectors)
    assert torch.equal(eigh(torch.diag(torch.tensor([-1.0, 2.0])))[0], torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_matrices_that_are_not_finite_are_refused_by_name(bad):
    matrix = moment(4, 3)
    matrix[1, 1] = bad
    with pytest.raises(ValueError, match="finite"):
        eigh(matrix)
    with pytest.raises(ValueError, match="'second'"):
        eigh_all({"first": moment(4, 3, 1), "second": matrix[None]})


class Failing:
    """`torch.linalg.eigh` that fails its first calls, or gives NaN; keeps what it was given."""

    def __init__(self, times: int, kind: str) -> None:
        self.times, self.kind, self.given = times, kind, []
        self.real = torch.linalg.eigh

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        self.given.append(matrix)
        if len(self.given) > self.times:
            return self.real(matrix)
        if self.kind == "raises":
            raise LinAlgError("no convergence")
        values, vectors = self.real(matrix)
        if self.kind == "nan values":
            return values * float("nan"), vectors
        return values, vectors * float("inf")


@pytest.mark.parametrize("kind", ["raises", "nan values", "inf vectors"])
@pytest.mark.parametrize("times", [0, 1, 2, 3, 5, 6])
def test_what_fails_is_tried_again(monkeypatch, times, kind):
    """In its dtype, in float64, with growing jitter, on the CPU."""
    failing = Failing(times, kind)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    matrix = moment(9, 4).float()
    values, vectors = eigh(matrix, None)
    assert values.dtype == torch.float32
    check(matrix, values, vectors, 1e-6)
    assert len(failing.given) == times + 1
    assert failing.given[0].dtype == torch.float32
    assert all(g.dtype == torch.float64 for g in failing.given[1:])
    mean = matrix.double().diagonal().mean()
    for given, jitter in zip(failing.given[1:], (0, *eigen.JITTERS, 0), strict=False):
        added = given - (matrix.double() + matrix.double().mT) / 2
        assert (added - jitter * mean * torch.eye(4)).abs().max() <= 1e-14 * mean


@pytest.mark.parametrize("kind", ["raises", "nan values", "inf vectors"])
def test_what_always_fails_is_said_to(monkeypatch, kind):
    failing = Failing(100, kind)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(ValueError, match="eigenvalues"):
        eigh(moment(9, 4))
    assert len(failing.given) == 3 + len(eigen.JITTERS)


def test_matrices_of_one_size_are_decomposed_in_one_call(monkeypatch):
    counting = Failing(0, "")
    monkeypatch.setattr(torch.linalg, "eigh", counting)
    matrices = {
        "a": moment(9, 4, 1),
        "b": moment(9, 3, 2),
        "c": moment(9, 4, 3),
        "d": moment(9, 4, 1).float(),
        "e": moment(2, 4, 1),
    }
    found = eigh_all(matrices)
    assert found.keys() == matrices.keys()
    assert sorted(len(m) for m in counting.given) == [1, 2, 5]
    for name, matrix in matrices.items():
        check(matrix, *found[name], tolerance=1e-13 if matrix.dtype == torch.float64 else 1e-6)
        assert found[name][1].dtype == matrix.dtype
        assert torch.equal(found[name][0], eigh(matrix)[0])


def test_eigh_below_vmap_has_one_attempt(monkeypatch):
    matrices = moment(9, 4, 3)
    values, vectors = torch.vmap(eigh)(matrices)
    check(matrices, values, vectors)
    counting = Failing(0, "")
    monkeypatch.setattr(torch.linalg, "eigh", counting)
    nan = torch.vmap(lambda m: eigh(m * float("nan"))[0])
    with contextlib.suppress(LinAlgError):  # as the library has it
        assert nan(matrices).isnan().all()
    assert len(counting.given) == 1


# --- null spaces ------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-20, 1e20), (1e15, 1e-15)])
@pytest.mark.parametrize("n", [0, 1, 2, 4, 9])
def test_completed_decides_in_the_null_space_by_the_other_matrix(n, scales):
    """Q diagonalises the first, and, within its null space, the second."""
    x, full = randn(n, 5), moment(9, 5) * scales[1]
    reduced = x.mT @ x * scales[0]
    q = completed(reduced, full)
    eye = torch.eye(5, dtype=torch.float64)
    assert (q.mT @ q - eye).abs().max() < 1e-12
    first = q.mT @ reduced @ q / scales[0]
    assert (first - first.diagonal().diag()).abs().max() <= 1e-11 * (1 + first.abs().max())
    rank = min(n, 5)
    null = q[:, : 5 - rank]
    assert (x @ null).abs().max() < 1e-7 if x.numel() and rank < 5 else True
    second = null.mT @ full @ null / scales[1]
    assert (second - second.diagonal().diag()).abs().max() <= 1e-9 if rank < 5 else True


def test_completed_does_not_depend_on_the_order_of_the_eigenvectors():
    x, full = randn(2, 6), moment(20, 6)
    reduced = x.mT @ x
    permutation = torch.randperm(6)
    one = completed(reduced, full)
    two = completed(reduced[permutation][:, permutation], full[permutation][:, permutation])
    for column in range(6):
        turned = two[:, column]
        assert abs(one[permutation, column] @ turned).sub(1).abs() < 1e-10


def test_completed_of_zeros_is_a_basis():
    zeros = torch.zeros(2, 4, 4)
    q = completed(zeros, zeros)
    assert (q.mT @ q - torch.eye(4)).abs().max() < 1e-6
    assert q.dtype == torch.float32


# --- few vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize(("h", "n", "d"), [(1, 3, 7), (2, 1, 4), (1, 4, 4), (3, 2, 5)])
def test_a_thin_basis_is_that_of_the_second_moment(h, n, d, scale):
    x = scale * randn(h, n, d)
    q = thin_basis(x)
    assert q.shape == (h, d, n)
    eye = torch.eye(n, dtype=torch.float64)
    assert (q.mT @ q - eye).abs().max() < 1e-12
    y = x / scale
    rotated = q.mT @ (y.mT @ y) @ q
    off = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() <= 1e-12 * rotated.abs().max()
    assert (y - y @ q @ q.mT).abs().max() <= 1e-12 * y.abs().max()  # nothing outside the span
    values = eigh(y.mT @ y)[0][..., -n:]
    assert (rotated.diagonal(dim1=-2, dim2=-1) - values).abs().max() <= 1e-12 * values.max()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_thin_basis_of_dependent_vectors_is_orthonormal(dtype):
    """Equal rows, and rows of zero: the basis goes on somewhere."""
    for x in (torch.ones(1, 3, 5), torch.zeros(1, 2, 5)):
        q = thin_basis(x, dtype)
        assert q.dtype == torch.float32
        assert (q.mT @ q - torch.eye(x.shape[1])).abs().max() < 1e-6
        assert (x - x @ q @ q.mT).abs().max() < 1e-6

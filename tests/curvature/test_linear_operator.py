"""F and its powers as SciPy's linear operators, and what SciPy then does with them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic_blocks as synthetic
import torch
from scipy.sparse.linalg import LinearOperator, cg, eigsh
from synthetic_blocks import KINDS, curvature, dense, eye, params_tree

from jdfunc import pytrees
from jdfunc.curvature.operate import linear_operator
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.damping import exact
from jdfunc.curvature.operate.linear_operator import as_linear_operator
from jdfunc.curvature.operate.operators import power

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_products(kind: str) -> None:
    """Vectors, columns [n, K] and transposes, in the order of the leaves."""
    case = curvature(kind)
    F = dense(case).numpy()
    A = as_linear_operator(case.curv, params_tree())
    assert isinstance(A, LinearOperator)
    assert A.shape == F.shape
    assert A.dtype == np.float64
    X = synthetic.randn(len(F), 3).numpy()
    for K in (1, 3):
        np.testing.assert_allclose(A @ X[:, :K], F @ X[:, :K], atol=1e-12)
        np.testing.assert_allclose(A.T @ X[:, :K], F @ X[:, :K], atol=1e-12)
        np.testing.assert_allclose(A.H @ X[:, :K], F @ X[:, :K], atol=1e-12)
    np.testing.assert_allclose(A @ X[:, 0], F @ X[:, 0], atol=1e-12)
    np.testing.assert_allclose(A.rmatvec(X[:, 0]), F @ X[:, 0], atol=1e-12)
    np.testing.assert_allclose(A @ X[:, :1].astype(np.float32), F @ X[:, :1], atol=1e-5)
    assert (A @ X[:, 0]).shape == (len(F),)
    assert (A @ X[:, :0]).shape == (len(F), 0)
    assert (A @ X[:, :1]).shape == (len(F), 1)


@kinds
def test_solvers(kind: str) -> None:
    """Conjugate gradients with an inverse to precondition, and the largest eigenvalue."""
    case = curvature(kind)
    F = (dense(case) + 0.1 * eye(len(dense(case)))).numpy()
    params = params_tree()
    A = as_linear_operator(power(case.curv, 1, exact(0.1)), params)
    inverse = as_linear_operator(power(case.curv, -1), params)
    x = np.arange(len(F)) / len(F)
    found, failed = cg(A, F @ x, M=inverse, rtol=1e-12, maxiter=5)  # one step would do
    assert failed == 0
    np.testing.assert_allclose(found, x, atol=1e-9)
    largest = eigsh(A, k=1, return_eigenvectors=False)
    np.testing.assert_allclose(largest, np.linalg.eigvalsh(F)[-1:], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    """NumPy has no bfloat16: float32 at least."""
    case = curvature("ekfac")
    params = pytrees.map(lambda leaf: leaf.to(dtype), params_tree())
    A = as_linear_operator(case.curv, params)
    assert A.dtype == np.float32
    y = A @ np.ones(A.shape[0])
    assert y.dtype == np.float32
    wanted = dense(case).numpy() @ np.ones(A.shape[0])
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


def test_inputs_are_never_modified() -> None:
    case, params = curvature("kfac"), params_tree()
    before = [leaf.clone() for leaf in pytrees.leaves(params)]
    x = np.ones(sum(leaf.numel() for leaf in before))
    for leaf in pytrees.leaves(params):
        leaf.requires_grad_()
    as_linear_operator(case.curv, params) @ x
    assert (x == 1).all()
    pairs = zip(before, pytrees.leaves(params), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_parameters() -> None:
    assert as_linear_operator(Curvature((), {}, exact(0.1)), {}).shape == (0, 0)


def test_scipy_is_imported_late() -> None:
    """`import jdfunc` does without SciPy: only the function imports it, or a type checker."""
    body = ast.parse(Path(linear_operator.__file__).read_text()).body
    top = [node for node in body if isinstance(node, ast.ImportFrom | ast.Import)]
    assert not any("scipy" in ast.unparse(node) for node in top)
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from jdfunc.curvature.operate.linear_operator import as_linear_operator\n"
        "from jdfunc.curvature.operate.curvature import Curvature\n"
        "try:\n    as_linear_operator(Curvature((), {}, None), {})\n"
        "except ImportError as error:\n    print('late')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "late"

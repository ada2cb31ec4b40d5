"""The external solver: what it says when it is not installed."""

import sys

import pytest
import torch

from jdfunc.solvers import quadprog


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "qpsolvers", None)
    with pytest.raises(ImportError, match=r"jdfunc\[solvers\]"):
        quadprog(torch.eye(2), torch.eye(2))


def test_batches_and_dtype():
    gramian = torch.eye(3).expand(2, 3, 3)
    out = quadprog(gramian, gramian)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.eye(3).expand(2, 3, 3))

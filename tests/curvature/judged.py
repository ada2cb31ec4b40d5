"""Estimates of `jdfunc.curvature` side by side with the exact matrices of the oracle."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import oracle
import torch
from nets import NETS, Problem
from torch import Tensor

from jdfunc import curvature as cv
from jdfunc import pytrees
from jdfunc.curvature.blocks import Block, params_of
from jdfunc.curvature.losses.targets import Labelled

KEY = 7
SAMPLES = 2
KINDS = "type2", "empirical", "mc"
REDUCTIONS = {"mean": cv.mean, "sum": cv.sum}
SHARINGS = {"expand": cv.expand, "reduce": cv.reduce}
LIKELIHOODS = {
    "mse": cv.mse,
    "cross_entropy": functools.partial(cv.cross_entropy, class_axis=-1),
    "bce": cv.bce_with_logits,
}


class Setting(NamedTuple):
    """One estimate of one net."""

    net: str
    loss: str
    kind: str
    reduction: str
    joint: bool = True
    sharing: str = "expand"

    def __str__(self) -> str:
        bias = "joint" if self.joint else "separate"
        return "-".join([*self[:4], bias, self.sharing])


class Exact(NamedTuple):
    """What the oracle knows.

    Attributes:
        problem: of the net.
        targets: y.
        labels: drawn labels [M, b, …].
        vectors: v [V, b, *terms, C], without w.
        weight: w.
        matrix: F [n, n].
    """

    problem: Problem
    targets: Tensor
    labels: Tensor
    vectors: Tensor
    weight: float
    matrix: Tensor


def given(inputs: Any, targets: Tensor, labels: Tensor | None) -> tuple[Any, Any]:
    """A batch whose drawn labels [M, b, …] are these, if any are given."""
    if labels is None:
        return inputs, targets
    return inputs, Labelled(targets, labels.movedim(0, 1))


def batch_of(known: Exact, kind: str) -> tuple[Any, Any]:
    """The whole data of a problem, with its labels where they are drawn."""
    return given(known.problem[3], known.targets, known.labels if kind == "mc" else None)


def exact_for(problem: Problem, loss: oracle.Loss, y: Tensor, kind: str, reduction: str) -> Exact:
    """F of a problem, with labels drawn where they are needed."""
    out, _ = oracle.jacobian(problem)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        labels = torch.stack([loss.draw(out) for _ in range(SAMPLES)])
    w = oracle.weight_of(loss, out, y, reduction)
    if kind == "type2":
        vectors = oracle.type2_vectors(loss, out, y)
        matrix = oracle.ggn(problem, loss, y, reduction)
        return Exact(problem, y, labels, vectors, w, matrix)
    vectors = (
        oracle.empirical_vectors(loss, out, y)
        if kind == "empirical"
        else oracle.monte_carlo_vectors(loss, out, y, labels)
    )
    matrix = oracle.fisher(problem, loss, y, reduction, vectors)
    return Exact(problem, y, labels, vectors, w, matrix)


@functools.lru_cache(maxsize=64)
def exact(net: str, loss: str, kind: str, reduction: str) -> Exact:
    """F of a net of the zoo."""
    problem = NETS[net].build()
    out = problem[0](*problem[1:])
    y = oracle.targets_for(oracle.LOSSES[loss], out)
    return exact_for(problem, oracle.LOSSES[loss], y, kind, reduction)


FISHERS = {
    "type2": cv.type2,
    "empirical": cv.empirical,
    "mc": functools.partial(cv.monte_carlo, samples=SAMPLES),
}


def layout_of(problem: Problem, batch_axis: int = 0, **kwargs: Any) -> Any:
    """The layout of a problem."""
    if batch_axis:
        kwargs["batch_dim"] = batch_axis
    return cv.curvature_layout(*problem, **kwargs)


def estimator(setting: Setting, method: Any, layout: Any, **kwargs: Any) -> Any:
    """`cv.ekfac` or `cv.kfac` with the options of a setting."""
    options: dict[str, Any] = {
        "likelihood": LIKELIHOODS[setting.loss](reduction=REDUCTIONS[setting.reduction]),
        "fisher": FISHERS[setting.kind](),
        "sharing": SHARINGS[setting.sharing],
        "joint_bias": setting.joint,
    }
    return method(layout, **(options | kwargs))


@functools.lru_cache(maxsize=256)
def curvature(setting: Setting, method: Any) -> Any:
    """The finished estimate of a setting."""
    known = exact(*setting[:4])
    layout = layout_of(known.problem, NETS[setting.net].batch_axis)
    est = estimator(setting, method, layout)
    return built(est, known.problem, [batch_of(known, setting.kind)])


def built(est: Any, problem: Problem, data: Any, key: int = KEY) -> Any:
    """`cv.build` on the parameters of a problem."""
    return cv.build(est, problem[1], problem[2], data, key)


def dense(curv: Any, params: Any) -> Tensor:
    """F as a matrix over the parameters in the order of the leaves."""
    return cv.to_dense(curv, order=pytrees.names(params))


def positions(block: Block, params: Any) -> Tensor:
    """Where the numbers of a block stand among the n, parameter by parameter."""
    index = oracle.indices(params)
    return torch.cat([index[name].flatten() for name in block.params])


def basis_of(block: Block, held: Any, params: Any) -> tuple[Tensor, Tensor]:
    """The basis of a spectrum as rows [r, numbers of the block], and its eigenvalues [r]."""
    h, i, j = block.shape
    eye_i, eye_j = (torch.eye(size, dtype=torch.float64).expand(h, -1, -1) for size in (i, j))
    left = eye_i if held.left is None else held.left
    right = eye_j if held.right is None else held.right
    found = []
    for g, p, q in itertools.product(range(h), range(left.shape[2]), range(right.shape[2])):
        matrix = torch.zeros(h, i, j, dtype=torch.float64)
        matrix[g] = torch.outer(left[g, :, p], right[g, :, q])
        named = params_of(block, matrix)
        found.append(torch.cat([named[name].flatten() for name in block.params]))
    return torch.stack(found), held.eigenvalues.flatten()


def blocks_only(matrix: Tensor, curv: Any, params: Any) -> Tensor:
    """The exact matrix with zeros between blocks, and between the groups of one block."""
    kept = torch.zeros_like(matrix)
    for block in curv.layout:
        here = positions(block, params)
        h, i, j = block.shape
        groups = torch.arange(h)[:, None, None].expand(h, i, j)
        named = params_of(block, groups)
        group = torch.cat([named[name].flatten() for name in block.params])
        same = group[:, None] == group
        kept[here[:, None], here] = matrix[here[:, None], here] * same
    return kept


def flat(tree: Any) -> Tensor:
    """A pytree like the params as one vector [n]."""
    return torch.cat([leaf.flatten() for leaf in pytrees.leaves(tree)])

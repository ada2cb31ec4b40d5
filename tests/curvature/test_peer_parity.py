"""Operators and inverses of curvlinops 3.0.1 on the same data, in float64.

EKFAC with reduce is compared by its eigenvalues in the peer's basis: its own basis is arbitrary in
the null space of the factors, and gradients lie there.
"""

from __future__ import annotations

import itertools
import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from judged import LIKELIHOODS, REDUCTIONS, SHARINGS, built, dense, given, layout_of
from models import randn, seq
from torch import Tensor, nn

from jdfunc import curvature as cv
from jdfunc import pytrees
from jdfunc.curvature.estimate.basis import Basis

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts a function when it is imported
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

SAMPLES, SEED = 2, 2147483647
PEER_LOSSES = {
    "mse": nn.MSELoss,
    "cross_entropy": nn.CrossEntropyLoss,
    "bce": nn.BCEWithLogitsLoss,
}
KINDS = {
    "type2": "type-2",
    "mc": "mc",
    "empirical": "empirical",
    "forward_only": "forward-only",
}
OPERATOR, INVERSE = 1e-12, 1e-10
DAMPING = 1e-2
SETTINGS = list(itertools.product(PEER_LOSSES, REDUCTIONS, KINDS, SHARINGS, (True, False)))


class Network(NamedTuple):
    """A module, its data in ragged batches, and its pure function."""

    module: nn.Module
    inputs: tuple[Tensor, ...]


def mlp() -> Network:
    torch.manual_seed(0)
    module = seq(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)
    )
    return Network(module.double(), (randn(9, 4), randn(8, 4)))


def cnn() -> Network:
    torch.manual_seed(0)
    module = seq(
        *(nn.Conv2d(2, 3, 2, padding=1, stride=2), nn.ReLU()),
        *(nn.Conv2d(3, 2, (2, 1), dilation=(1, 2)), nn.Tanh(), nn.Flatten()),
        nn.Linear(2 * 2 * 3, 3),
    )
    return Network(module.double(), (randn(6, 2, 4, 4), randn(5, 2, 4, 4)))


NETWORKS = {"mlp": mlp, "cnn": cnn}


def data_of(network: Network, loss: str) -> list[tuple[Tensor, Tensor]]:
    outputs = [network.module(x).detach() for x in network.inputs]
    return [
        (x, oracle.targets_for(oracle.LOSSES[loss], out, seed))
        for seed, (x, out) in enumerate(zip(network.inputs, outputs, strict=True))
    ]


def problem_of(network: Network) -> Any:
    def apply(params: Any, buffers: Any, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(network.module, params, (inputs,))

    params = {k: v.detach() for k, v in network.module.named_parameters()}
    return apply, params, {}, network.inputs[0]


def peer(network: Network, data: Any, method: Any, loss: str, *options: Any) -> Any:
    """The peer's operator, on the parameters in the order of our leaves."""
    reduction, kind, sharing, joint = options
    named = dict(network.module.named_parameters())
    return method(
        network.module,
        PEER_LOSSES[loss](reduction=reduction),
        [named[name] for name in pytrees.names(named)],
        data,
        fisher_type=KINDS[kind],
        mc_samples=SAMPLES if kind == "mc" else 1,
        seed=SEED,
        kfac_approx=sharing,
        separate_weight_and_bias=not joint,
        check_deterministic=False,
    )


def peer_labels(network: Network, data: Any, loss: str) -> list[Tensor]:
    """The labels that the peer draws in a pass: batch by batch, sample by sample."""
    generator = torch.Generator().manual_seed(SEED)
    found = []
    for x, _ in data:
        out = network.module(x).detach()
        draws = []
        for _ in range(SAMPLES):
            if loss == "mse":
                noise = torch.randn(out.shape, dtype=out.dtype, generator=generator)
                draws.append(out + math.sqrt(0.5) * noise)
            elif loss == "bce":
                draws.append(out.sigmoid().bernoulli(generator=generator))
            else:
                draws.append(out.softmax(1).multinomial(1, generator=generator).squeeze(-1))
        found.append(torch.stack(draws))
    return found


def estimator_of(
    network: Network, data: Any, method: Any, loss: str, *options: Any
) -> tuple[Any, list[Any]]:
    """Our estimator, and the batches with the labels that the peer draws."""
    reduction, kind, sharing, joint = options
    fisher = {
        "type2": cv.type2,
        "mc": partial(cv.monte_carlo, samples=SAMPLES),
        "empirical": cv.empirical,
        "forward_only": cv.forward_only,
    }[kind]()
    labels = peer_labels(network, data, loss) if kind == "mc" else [None] * len(data)
    batches = [given(x, y, label) for (x, y), label in zip(data, labels, strict=True)]
    problem = problem_of(network)
    est = method(
        layout_of(problem),
        likelihood=LIKELIHOODS[loss](reduction=REDUCTIONS[reduction]),
        fisher=fisher,
        sharing=SHARINGS[sharing],
        joint_bias=joint,
    )
    return est, batches


def ours(network: Network, data: Any, *options: Any) -> Any:
    """Our estimate."""
    est, batches = estimator_of(network, data, *options)
    return built(est, problem_of(network), batches)


def matrix_of(operator: Any) -> Tensor:
    size = operator.shape[0]
    return operator @ torch.eye(size, dtype=torch.float64)


def assert_near(value: Tensor, expected: Tensor, tolerance: float) -> None:
    distance, size = float((value - expected).norm()), float(expected.norm())
    assert distance <= tolerance * size, f"distance {distance:.3e}, norm {size:.3e}"


def ids(setting: tuple[Any, ...]) -> str:
    return "-".join("joint" * s + "separate" * (not s) if s in (0, 1) else s for s in setting)


each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=ids)
each_network = pytest.mark.parametrize("name", NETWORKS)


@each_setting
@each_network
def test_kfac(name, setting):
    """Operator, trace, norm, and the three inverses."""
    network = NETWORKS[name]()
    loss, joint = setting[0], setting[-1]
    data = data_of(network, loss)
    theirs = peer(network, data, KFACLinearOperator, *setting)
    curv = ours(network, data, cv.kfac, *setting)
    expected = matrix_of(theirs)
    assert_near(dense(curv, problem_of(network)[1]), expected, OPERATOR)
    assert_near(cv.trace(curv), theirs.trace, OPERATOR)
    assert_near(cv.frobenius_norm(curv), theirs.frobenius_norm, OPERATOR)
    eye = torch.eye(len(expected), dtype=torch.float64)
    # Damping relative to the matrix, so that the inverse has a condition number of about 100.
    scale = float(expected.trace() / len(expected))
    for rule, options in (
        (cv.exact(DAMPING), {"damping": DAMPING, "use_exact_damping": True}),
        (cv.plain(DAMPING), {"damping": DAMPING}),
        (cv.plain(0.3, DAMPING), {"damping": (0.3, DAMPING)}),
        (cv.exact(scale), {"damping": scale, "use_exact_damping": True}),
        (cv.heuristic(DAMPING), {"damping": DAMPING, "use_heuristic_damping": True}),
    ):
        if "use_heuristic_damping" in options and not joint:
            continue  # the peer damps a separate bias as if it were a product
        inverse = matrix_of(KFACInverseLinearOperator(theirs, **options))
        assert_near(_solved(curv, eye, rule), inverse, INVERSE)


@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s[2] != "forward_only" and s[3] == "expand"], ids=ids
)
@each_network
def test_ekfac(name, setting):
    """Operator, trace, norm and the exact inverse; expand."""
    network = NETWORKS[name]()
    data = data_of(network, setting[0])
    theirs = peer(network, data, EKFACLinearOperator, *setting)
    curv = ours(network, data, cv.ekfac, *setting)
    expected = matrix_of(theirs)
    # Bases agree to the rounding of a factor over the gap of its eigenvalues.
    assert_near(dense(curv, problem_of(network)[1]), expected, 1e-9)
    assert_near(cv.trace(curv), theirs.trace, OPERATOR)
    assert_near(cv.frobenius_norm(curv), theirs.frobenius_norm, 1e-9)
    inverse = KFACInverseLinearOperator(theirs, damping=DAMPING, use_exact_damping=True)
    eye = torch.eye(len(expected), dtype=torch.float64)
    assert_near(_solved(curv, eye, cv.exact(DAMPING)), matrix_of(inverse), 1e-8)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[2] != "forward_only"], ids=ids)
@each_network
def test_ekfac_eigenvalues_in_the_peers_basis(name, setting):
    """λ of a second pass over a state that holds the bases of the peer."""
    network = NETWORKS[name]()
    data = data_of(network, setting[0])
    theirs = peer(network, data, EKFACLinearOperator, *setting)
    matrix_of(theirs)
    params = problem_of(network)[1]
    est, batches = estimator_of(network, data, cv.ekfac, *setting)
    state = est.init(params)
    for batch in batches:
        state = est.update(state, params, {}, batch, 0)
    state = est.refresh(state)
    lefts, rights = (
        {f"{k}.weight": basis[None] for k, basis in held.items()}
        for held in (
            theirs._gradient_covariances_eigenvectors,
            theirs._input_covariances_eigenvectors,
        )
    )
    state = state._replace(basis={k: Basis(lefts[k], rights[k]) for k in state.basis})
    for batch in batches:
        state = est.update_eigenvalues(state, params, {}, batch, 0)
    curv = est.finalize(state)
    names = pytrees.names(params)
    for block in curv.layout:
        expected = theirs._corrected_eigenvalues[block.name.rsplit(".", 1)[0]]
        if isinstance(expected, dict):
            expected = expected[names.index(block.name)]
        found = curv.blocks[block.name].eigenvalues
        assert_near(found.reshape(expected.shape), expected, 1e-11)


def _solved(curv: Any, rows: Tensor, damping: Any) -> Tensor:
    """(F + damping)⁻¹ of the rows."""
    example = curv_params(curv)
    leaves, restore = pytrees.flatten(example)
    pieces = rows.split([leaf.numel() for leaf in leaves], 1)
    tree = restore([p.reshape(-1, *leaf.shape) for p, leaf in zip(pieces, leaves, strict=True)])
    solved = cv.solve(curv, tree, damping=damping)
    return torch.cat([leaf.flatten(1) for leaf in pytrees.leaves(solved)], 1)


def curv_params(curv: Any) -> dict[str, Tensor]:
    """Zeros like the parameters that a curvature covers."""
    return {
        name: torch.zeros(shape, dtype=torch.float64)
        for block in curv.layout
        for name, shape in zip(block.params, block.shapes, strict=True)
    }

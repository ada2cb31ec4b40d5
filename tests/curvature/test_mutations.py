"""Gates that bite: each wrong version of one function, and the gate of `test_gates` that sees it.

The gates are distances, of order 1e-14 as the code is. Traces see what is lost or counted twice in
λ; they cannot see a wrong basis, nor the scale of A, of which the last test makes sure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from judged import (
    KEY,
    Exact,
    Setting,
    basis_of,
    batch_of,
    blocks_only,
    dense,
    estimator,
    exact,
    exact_for,
    layout_of,
    positions,
)
from models import randn
from nets import NETS
from torch import Tensor

from jdfunc import curvature as cv
from jdfunc.curvature.estimate import build as building
from jdfunc.curvature.estimate import eigenvalues, factors, finalize, passes, steps
from jdfunc.curvature.estimate.basis import Basis
from jdfunc.curvature.estimate.pairs import Pair
from jdfunc.curvature.estimate.sharing import reduce
from jdfunc.curvature.losses import likelihoods, softmax

SOUND = 1e-11  # float64; the rounding of a basis included
BROKEN = 0.05  # of what is measured, relative: nothing that a tolerance could hide

Case = tuple[Setting, Exact]


# --- gates ------------------------------------------------------------------------------------


def estimated(case: Case, method: Any, **options: Any) -> Any:
    setting, known = case
    est = estimator(setting, method, layout_of(known.problem))
    data = [batch_of(known, setting.kind)]
    return cv.build(est, *known.problem[1:3], data, KEY, **options)


def trace_gap(case: Case, **options: Any) -> float:
    """T1: the trace of EKFAC is that of F."""
    wanted = case[1].matrix.trace()
    return float((cv.trace(estimated(case, cv.ekfac, **options)) - wanted).abs() / wanted)


def basis_gap(case: Case) -> float:
    """T2: diag(Qᵀ F Q) = λ in the basis that the operator has."""
    known, curv, worst = case[1], estimated(case, cv.ekfac), 0.0
    for block in curv.layout:
        basis, values = basis_of(block, curv.blocks[block.name], known.problem[1])
        here = positions(block, known.problem[1])
        diagonal = ((basis @ known.matrix[here[:, None], here]) * basis).sum(1)
        worst = max(worst, float((diagonal - values).norm() / diagonal.norm()))
    return worst


def distance(case: Case, method: Any) -> float:
    known, curv = case[1], estimated(case, method)
    kept = blocks_only(known.matrix, curv, known.problem[1])
    return oracle.error(dense(curv, known.problem[1]), kept)


def nearness_gap(case: Case) -> float:
    """T3: by how much KFAC is nearer to F than EKFAC, if it is."""
    return distance(case, cv.ekfac) - distance(case, cv.kfac)


def kfac_gap(case: Case) -> float:
    """T9: KFAC is F, where it is exact."""
    return distance(case, cv.kfac)


# --- cases ------------------------------------------------------------------------------------


def zoo(*options: Any) -> Case:
    return Setting(*options), exact(*options[:4])


def masked() -> Case:
    """Some tokens ignored, in every example another number of them."""
    problem = NETS["tokens"].build()
    y = oracle.targets_for(oracle.LOSSES["cross_entropy"], problem[0](*problem[1:]))
    y[0, 1:], y[1, 0] = -100, -100
    setting = Setting("tokens", "cross_entropy", "type2", "sum")
    return setting, exact_for(problem, oracle.LOSSES["cross_entropy"], y, *setting[2:4])


def linear(
    weight_shape: tuple[int, ...],
    shape: tuple[int, ...],
    function: Callable[[Tensor, Tensor], Tensor],
) -> Case:
    """A model that is linear in its weight, for which KFAC of squared errors is exact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params, x = {"w": randn(*weight_shape)}, randn(*shape)
    problem = (lambda params, buffers, x: function(params["w"], x)), params, {}, x
    setting = Setting("", "mse", "type2", "mean")
    y = torch.zeros_like(function(params["w"], x))
    return setting, exact_for(problem, oracle.LOSSES["mse"], y, *setting[2:4])


def two_uses() -> Case:
    """One weight for two inputs of different sizes."""
    return linear(
        (4, 3), (5, 2, 3), lambda w, x: torch.stack([F.linear(x[:, 0], w), 3 * x[:, 1] @ w.mT], 1)
    )


def two_groups() -> Case:
    """A convolution of two channels in each of two groups."""
    return linear((4, 2, 1), (5, 4, 3), lambda w, x: F.conv1d(x, w, groups=2).flatten(1))


# --- wrong versions ---------------------------------------------------------------------------

# What the wrong versions call, looked up before anything is replaced.
weight, divided, joint_vectors = steps._weight, finalize._divided, passes.joint_vectors
pairs_of, squares, turned = eigenvalues.pairs_of, eigenvalues._squares, eigenvalues.turned
probabilities = softmax._probabilities


def without_examples(setup: Any, counters: Any, num_data: Any) -> Tensor:
    """The mean without its 1/N."""
    return weight(setup, counters, num_data) * counters.examples


def without_classes(f: Tensor) -> Tensor:
    """The divisor of a mean without C."""
    return torch.full((), f.numel() / f.shape[-1], dtype=f.dtype)


def squared_first(a: Tensor, g: Tensor, *others: Any) -> Tensor:
    """Σ_s (g ⊗ a)² for (Σ_s g ⊗ a)²: every position an example."""
    a, g = (x.movedim(-2, 1).flatten(0, 1).unsqueeze(-2) for x in (a, g))
    return squares(a, g, *others)


def reduced_pairs(*args: Any) -> list[Pair]:
    """The mean of activations and the sum of cotangents in λ."""
    return reduce.pairs(pairs_of(*args))


def first_use(*args: Any) -> list[Pair]:
    """A tied weight counted once."""
    return pairs_of(*args)[:1]


def first_activations(*args: Any) -> list[Pair]:
    """A of the first use for all uses."""
    first, *others = pairs_of(*args)
    return [first, *(pair._replace(activation=first.activation) for pair in others)]


def averaged_groups(*args: Any) -> list[Pair]:
    """Every group with the patches of the mean group."""
    pairs = pairs_of(*args)
    means = [pair.activation.mean(2, keepdim=True) for pair in pairs]
    return [
        pair._replace(activation=mean.expand_as(pair.activation))
        for pair, mean in zip(pairs, means, strict=True)
    ]


def without_ones(*args: Any) -> list[Pair]:
    """A joint bias whose column of ones is missing."""
    return [pair._replace(one=0.0 if pair.one else pair.one) for pair in pairs_of(*args)]


def unmasked(f: Tensor, y: Tensor, class_axis: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Ignored terms that count as terms of class 0."""
    return probabilities(f, torch.where(y == ignore_index, 0, y), class_axis, ignore_index)


def all_terms(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Type-2 vectors of all terms added up, without random signs."""
    f, vectors, count = joint_vectors(*args)
    return f, vectors.unflatten(0, (f.shape[1:-1].numel(), -1)).sum(0), count


def random_basis(setup: Any, chunks: Any) -> dict[str, Basis]:
    """Orthogonal matrices that have nothing to do with the factors."""
    generator = torch.Generator().manual_seed(0)

    def orthogonal(h: int, d: int) -> Tensor:
        return torch.linalg.qr(torch.randn(h, d, d, dtype=torch.float64, generator=generator))[0]

    blocks = [layer.block(setup.joint_bias) for layer in setup.layout.layers]
    return {
        block.name: Basis(*(orthogonal(block.shape[0], d) for d in block.shape[1:]))
        for block in blocks
    }


def turned_back(side: Tensor, vectors: Tensor, one: float | None = None) -> Tensor:
    """λ in the basis Qᵀ, for an operator that has Q."""
    return turned(side, vectors.mT, one)


def per_example(held: Any, role: int, count: Tensor, *others: Any) -> Any:
    """A divided by the examples, not by their two positions too."""
    return divided(held, role, count / 2, *others)


# --- each is seen -----------------------------------------------------------------------------


class Mutation(NamedTuple):
    """A wrong version of a function.

    Attributes:
        gate: what sees it.
        case: what the gate is computed on.
        module: where the function is looked up.
        function: its name there.
        wrong: the wrong version.
    """

    gate: Callable[[Case], float]
    case: Callable[[], Case]
    module: Any
    function: str
    wrong: Callable[..., Any]


def on(*options: Any) -> Callable[[], Case]:
    return functools.partial(zoo, *options)


MLP = on("mlp", "cross_entropy", "type2", "mean")
EXACT = on("deep_linear", "mse", "type2", "mean")
TOKENS = on("tokens", "cross_entropy", "type2", "mean")
CNN = on("cnn", "mse", "empirical", "sum")

MUTATIONS = {
    "lost 1/N": Mutation(trace_gap, MLP, steps, "_weight", without_examples),
    "lost 1/C": Mutation(
        trace_gap, on("mlp", "bce", "empirical", "mean"), likelihoods, "count", without_classes
    ),
    "squared before the sum": Mutation(trace_gap, CNN, eigenvalues, "_squares", squared_first),
    "reduced activations": Mutation(trace_gap, CNN, eigenvalues, "pairs_of", reduced_pairs),
    "ties once": Mutation(
        trace_gap,
        on("tied_same_role", "mse", "type2", "mean"),
        eigenvalues,
        "pairs_of",
        first_use,
    ),
    "A of one use": Mutation(kfac_gap, two_uses, factors, "pairs_of", first_activations),
    "groups averaged in λ": Mutation(
        trace_gap, on("grouped", "bce", "type2", "mean"), eigenvalues, "pairs_of", averaged_groups
    ),
    "groups averaged in A": Mutation(kfac_gap, two_groups, factors, "pairs_of", averaged_groups),
    "masks": Mutation(trace_gap, masked, softmax, "_probabilities", unmasked),
    "terms at once": Mutation(trace_gap, TOKENS, passes, "joint_vectors", all_terms),
    "no ones in λ": Mutation(trace_gap, MLP, eigenvalues, "pairs_of", without_ones),
    "no ones in A": Mutation(kfac_gap, EXACT, factors, "pairs_of", without_ones),
    "random basis": Mutation(nearness_gap, EXACT, building, "spanned_basis", random_basis),
    "λ in another basis": Mutation(basis_gap, MLP, eigenvalues, "turned", turned_back),
    "scale of A": Mutation(kfac_gap, two_uses, finalize, "_divided", per_example),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, case, module, function, wrong = MUTATIONS[name]
    known = case()
    assert gate(known) <= SOUND
    monkeypatch.setattr(module, function, wrong)
    assert gate(known) >= BROKEN


@pytest.mark.parametrize("name", ["random basis", "λ in another basis", "scale of A"])
def test_traces_do_not_see_the_basis_nor_the_scale_of_a(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the other gates are there for a reason. In one pass, and in two, which divide factors."""
    _, case, module, function, wrong = MUTATIONS[name]
    monkeypatch.setattr(module, function, wrong)
    for limit in (None, 0):
        assert trace_gap(case(), cache_limit=limit) <= SOUND

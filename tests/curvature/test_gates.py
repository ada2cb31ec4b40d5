"""What an estimate of curvature must satisfy, against dense matrices made by brute force."""

from __future__ import annotations

import functools
import itertools

import oracle
import pytest
import torch
from judged import (
    FISHERS,
    KEY,
    KINDS,
    LIKELIHOODS,
    REDUCTIONS,
    SHARINGS,
    Setting,
    basis_of,
    batch_of,
    blocks_only,
    built,
    curvature,
    dense,
    estimator,
    exact,
    exact_for,
    flat,
    layout_of,
    positions,
)
from models import Fn, randn, seq
from nets import NETS
from torch import Tensor, nn

import jdfunc as jd
from jdfunc import curvature as cv
from jdfunc import pytrees

TIGHT = 1e-12  # float64, sums of up to a few thousand products
METHODS = {"kfac": cv.kfac, "ekfac": cv.ekfac}
OPTIONS = list(itertools.product(LIKELIHOODS, REDUCTIONS, (True, False), SHARINGS))
HOOKED = [net.name for net in NETS.values() if net.module]
POOLED = [name for name in HOOKED if NETS[name].terms == 0]
ONE_POSITION = ["mlp", "linear_no_bias", "deep_linear", "residual"]


def some(names: list[str]) -> list[Setting]:
    """Every net with every kind of Fisher; the other options take turns."""
    settings = []
    for k, (name, kind) in enumerate(itertools.product(names, KINDS)):
        loss, reduction, joint, sharing = OPTIONS[7 * k % len(OPTIONS)]
        settings.append(Setting(name, loss, kind, reduction, joint, sharing))
    return settings


def many(names: list[str]) -> list[Setting]:
    """Every net with every kind and a quarter of the other options, another for each pair."""
    return [
        Setting(name, loss, kind, reduction, joint, sharing)
        for k, (name, kind) in enumerate(itertools.product(names, KINDS))
        for loss, reduction, joint, sharing in OPTIONS[k % 4 :: 5]
    ]


def over(names: list[str], *, all_kinds: bool = False):
    """Every net with one kind or all of them always, more combinations in the slow suite."""
    quick = some(names)
    if not all_kinds:
        quick = [setting for k, setting in enumerate(quick) if k % 3 == k // 3 % 3]
    rest = [setting for setting in (*some(names), *many(names)) if setting not in set(quick)]
    slow = [pytest.param(setting, marks=pytest.mark.slow) for setting in dict.fromkeys(rest)]
    return pytest.mark.parametrize("setting", [*quick, *slow], ids=str)


def assert_near(value: Tensor, expected: Tensor, tolerance: float = TIGHT) -> None:
    """Relative Frobenius distance."""
    distance, size = float((value - expected).norm()), float(expected.norm())
    assert distance <= tolerance * size + 1e-300, f"distance {distance:.3e}, norm {size:.3e}"


# --- T1, T2, T3: every net, every kind of block ------------------------------------------------


@over(list(NETS), all_kinds=True)
def test_trace_of_ekfac_is_exact(setting):
    """T1: of the whole matrix and of every block."""
    known, curv = exact(*setting[:4]), curvature(setting, cv.ekfac)
    assert_near(cv.trace(curv), known.matrix.trace())
    covered = torch.zeros(len(known.matrix), dtype=torch.int64)
    for block in curv.layout:
        here = positions(block, known.problem[1])
        covered[here] += 1
        exact_trace = known.matrix.diagonal()[here].sum()
        found = curv.blocks[block.name].eigenvalues.sum()
        assert abs(found - exact_trace) <= TIGHT * known.matrix.trace(), block.params
    assert (covered == 1).all()


@over(list(NETS))
def test_eigenvalues_are_the_diagonal_in_an_orthonormal_basis(setting):
    """T2: diag(Qᵀ F Q) = λ, block by block, and `to_dense` is Q diag(λ) Qᵀ."""
    known, curv = exact(*setting[:4]), curvature(setting, cv.ekfac)
    params, matrix = known.problem[1], torch.zeros_like(known.matrix)
    for block in curv.layout:
        basis, values = basis_of(block, curv.blocks[block.name], params)
        here = positions(block, params)
        part = known.matrix[here[:, None], here]
        assert_near(basis @ basis.mT, torch.eye(len(basis), dtype=torch.float64), 1e-11)
        diagonal = ((basis @ part) * basis).sum(1)
        assert (diagonal - values).abs().max() <= TIGHT * known.matrix.trace(), block.params
        matrix[here[:, None], here] = basis.mT * values @ basis
    assert_near(dense(curv, params), matrix)


@over(list(NETS))
def test_ekfac_is_nearer_than_kfac(setting):
    """T3, on the zoo."""
    _compare(exact(*setting[:4]), *(curvature(setting, method) for method in METHODS.values()))


def _compare(known, kfac, ekfac) -> None:
    kept = blocks_only(known.matrix, ekfac, known.problem[1])
    near, far = (float((dense(curv, known.problem[1]) - kept).norm()) for curv in (ekfac, kfac))
    assert near <= far + TIGHT * float(kept.norm()), f"EKFAC {near:.3e}, KFAC {far:.3e}"


@pytest.mark.parametrize("seed", range(20))
def test_ekfac_is_nearer_than_kfac_on_random_nets(seed):
    """T3, on random widths, activations, losses and kinds."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 6, (4,), generator=generator).tolist()
    torch.manual_seed(seed)
    act = [nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Softplus][seed % 4]
    module = seq(
        *(nn.Linear(sizes[0], sizes[1]), act(), nn.Linear(sizes[1], sizes[2]), act()),
        nn.Linear(sizes[2], sizes[3] + 1),
    ).double()
    params = {k: v.detach() for k, v in module.named_parameters()}
    x = randn(2 + seed % 7, *([3] if seed % 2 else []), sizes[0])

    def apply(params, buffers, inputs):
        out = torch.func.functional_call(module, params, (inputs,))
        return out.sum(1) if out.ndim == 3 else out

    problem = apply, params, {}, x
    name = list(LIKELIHOODS)[seed % 3]
    loss, kind = oracle.LOSSES[name], KINDS[seed // 3 % 3]
    y = oracle.targets_for(loss, apply(params, {}, x))
    known = exact_for(problem, loss, y, kind, "mean")
    setting = Setting("", name, kind, "mean", seed % 5 > 1, "reduce" if seed % 4 == 3 else "expand")
    layout = layout_of(problem)
    pair = [
        built(estimator(setting, method, layout), problem, [batch_of(known, kind)])
        for method in METHODS.values()
    ]
    _compare(known, *pair)


# --- the factors and the basis themselves ------------------------------------------------------


@over(HOOKED)
def test_kfac_is_that_of_hooks_and_loops(setting):
    """A and B, and how they are put together."""
    known = exact(*setting[:4])
    matrix = oracle.kfac_matrix(
        _layers(setting, known),
        len(known.matrix),
        known.weight,
        reduce=setting.sharing == "reduce",
        joint=setting.joint,
    )
    assert_near(dense(curvature(setting, cv.kfac), known.problem[1]), matrix)


@over(HOOKED)
def test_the_basis_of_ekfac_diagonalises_the_factors(setting):
    """Q_Aᵀ A Q_A and Q_Bᵀ B Q_B are diagonal: any other Q would pass T1 and T2."""
    known, curv = exact(*setting[:4]), curvature(setting, cv.ekfac)
    index = oracle.indices(known.problem[1])
    starts = {int(index[block.name].flatten()[0]): block for block in curv.layout}
    for layer in _layers(setting, known):
        factors = oracle.factors(
            layer, known.weight, reduce=setting.sharing == "reduce", joint=setting.joint
        )
        block = starts.get(int(layer.weight[0, 0]))
        if block is None:  # a later group of a convolution
            continue
        held = curv.blocks[block.name]
        for factor, basis in zip(factors, (held.right, held.left), strict=True):
            rotated = basis[0].mT @ factor @ basis[0]
            assert_near(rotated, rotated.diagonal().diag(), 1e-11)
            assert_near(rotated.trace(), factor.trace(), 1e-11)  # nothing lies outside the span


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "grouped", "shared_positions", "tokens"])
def test_ekfac_expand_is_that_of_hooks_and_loops(name, kind):
    setting = Setting(name, "cross_entropy", kind, "mean")
    known = exact(*setting[:4])
    matrix = oracle.ekfac_matrix(
        _layers(setting, known), len(known.matrix), known.weight, reduce=False, joint=True
    )
    # Two bases of eigh: their difference is amplified where eigenvalues are close.
    assert_near(dense(curvature(setting, cv.ekfac), known.problem[1]), matrix, 1e-8)


def _layers(setting: Setting, known) -> list[oracle.Layer]:
    module = NETS[setting.net].module
    assert module is not None
    return oracle.layers_of(module(), known.problem[1], known.problem[3], known.vectors)


# --- T5: streaming ----------------------------------------------------------------------------

STREAMED = [
    *(("mlp", "cross_entropy"), ("cnn", "mse"), ("grouped", "bce"), ("embedding", "cross_entropy")),
    *(("layer_norm", "mse"), ("tied_modules", "bce"), ("tied_embedding", "cross_entropy")),
    *(("lstm", "mse"), ("class_token", "cross_entropy"), ("sequence_first", "mse")),
]


def _streams() -> list:
    """Every net once always, every combination in the slow suite."""
    found = []
    for k, (net, *options) in enumerate(
        itertools.product(STREAMED, ["type2", "empirical"], REDUCTIONS, SHARINGS)
    ):
        marks = [] if k % 8 == k // 8 % 8 else [pytest.mark.slow]
        found.append(pytest.param(*net, *options, marks=marks))
    return found


@pytest.mark.parametrize(("name", "loss", "kind", "reduction", "sharing"), _streams())
def test_streamed_merged_permuted_and_whole_data_give_one_result(
    name, loss, kind, reduction, sharing
):
    """T5: ragged batches."""
    net, size = NETS[name], 7
    problem = net.build(size=size)
    y = oracle.targets_for(oracle.LOSSES[loss], problem[0](*problem[1:]))
    setting = Setting(name, loss, kind, reduction, True, sharing)

    def part(index: Tensor):
        take = functools.partial(torch.index_select, dim=net.batch_axis, index=index)
        return pytrees.map(take, problem[3]), y[index]

    layout = layout_of(problem, net.batch_axis)
    for method in METHODS.values():
        est = estimator(setting, method, layout)
        params = problem[1]
        whole = dense(built(est, problem, [part(torch.arange(size))]), params)
        order = torch.randperm(size)
        ragged = [part(index) for index in torch.arange(size).split([4, 1, 2])]
        streams = [ragged, [part(order)], [part(i) for i in order.split([3, 3, 1])], ragged[::-1]]
        for data in streams:
            assert_near(dense(built(est, problem, data), params), whole, 1e-10)
        states = [
            _updated(est, est.init(problem[1]), problem, batches)
            for batches in (ragged[:1], ragged[1:2], ragged[2:])
        ]
        one, two, three = states
        for merged in (
            cv.merge(cv.merge(one, two), three),
            cv.merge(one, cv.merge(two, three)),
            cv.merge(three, cv.merge(one, two)),
            cv.merge(est.init(problem[1]), cv.merge(cv.merge(one, two), three)),
        ):
            if method is cv.ekfac:
                merged = est.refresh(merged)
                for batch in ragged:
                    merged = est.update_eigenvalues(merged, problem[1], problem[2], batch, KEY)
            assert_near(dense(est.finalize(merged), params), whole, 1e-10)


def _updated(est, state, problem, batches):
    for batch in batches:
        state = est.update(state, problem[1], problem[2], batch, KEY)
    return state


@pytest.mark.parametrize("kind", [*KINDS[:2], "drawn"])
@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "grouped", "tokens", "tied_embedding", "everything"]
)
def test_two_passes_give_what_one_with_a_cache_gives(name, kind):
    """Labels that are drawn from the key included."""
    known = exact(name, "cross_entropy", "type2", "mean")
    problem, y = known.problem, known.targets
    setting = Setting(name, "cross_entropy", "type2", "mean")
    fisher = cv.monte_carlo(samples=2) if kind == "drawn" else FISHERS[kind]()
    est = estimator(setting, cv.ekfac, layout_of(problem), fisher=fisher)
    data = [(problem[3][:2], y[:2]), (problem[3][2:], y[2:])]
    one, two = (
        dense(cv.build(est, *problem[1:3], data, KEY, **options), problem[1])
        for options in ({}, {"cache_limit": 0})
    )
    assert_near(one, two, 1e-9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_num_data_scales_sums_alone(reduction):
    setting = Setting("mlp", "mse", "type2", reduction)
    known = exact(*setting[:4])
    problem, data = known.problem, (known.problem[3], known.targets)
    est = estimator(setting, cv.ekfac, layout_of(problem))
    state = est.refresh(_updated(est, est.init(problem[1]), problem, [data]))
    state = est.update_eigenvalues(state, problem[1], problem[2], data, KEY)
    factor = 5.0 if reduction == "sum" else 1.0
    once, more = est.finalize(state), est.finalize(state, num_data=5 * len(known.targets))
    assert_near(dense(more, problem[1]), factor * dense(once, problem[1]))


# --- T7: Monte Carlo --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("mlp", "cross_entropy"),
        pytest.param("mlp", "mse", marks=pytest.mark.slow),
        pytest.param("mlp", "bce", marks=pytest.mark.slow),
        pytest.param("tokens", "cross_entropy", marks=pytest.mark.slow),
        pytest.param("cnn", "cross_entropy", marks=pytest.mark.slow),
        pytest.param("tied_embedding", "bce", marks=pytest.mark.slow),
    ],
)
def test_trace_of_drawn_labels_is_unbiased(name, loss):
    """T7: a z-test over 200 keys against the exact trace."""
    known = exact(name, loss, "type2", "mean")
    est = cv.ekfac(
        layout_of(known.problem),
        likelihood=LIKELIHOODS[loss](reduction=cv.mean),
        fisher=cv.monte_carlo(samples=1),
    )
    data = [(known.problem[3], known.targets)]
    traces = torch.stack([cv.trace(built(est, known.problem, data, key)) for key in range(200)])
    z = (traces.mean() - known.matrix.trace()) / (traces.std() / len(traces) ** 0.5)
    assert abs(z) < 4
    assert traces.unique().numel() > 20  # labels of four examples in three classes are 81


@pytest.mark.parametrize("name", ["mlp", "cnn", "tokens", "everything"])
def test_a_key_decides_everything_and_chunks_nothing(name):
    """T7: equal keys, equal numbers; other chunks, the same result to rounding."""
    known = exact(name, "cross_entropy", "mc", "mean")
    layout, data = layout_of(known.problem), [(known.problem[3], known.targets)]

    def matrix(key: int, chunk_size: int | None = None) -> Tensor:
        est = cv.ekfac(
            layout,
            likelihood=LIKELIHOODS["cross_entropy"](reduction=cv.mean),
            fisher=cv.monte_carlo(samples=3),
            chunk_size=chunk_size,
        )
        return dense(built(est, known.problem, data, key), known.problem[1])

    before = torch.get_rng_state()
    one = matrix(1)
    assert torch.equal(one, matrix(1))
    assert not torch.equal(one, matrix(2))
    for chunk_size in (1, 2, 5):
        assert_near(matrix(1, chunk_size), one, 1e-10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["type2", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "tokens", "everything", "lstm"])
def test_chunks_change_nothing(name, kind):
    setting = Setting(name, "cross_entropy", kind, "mean")
    known = exact(*setting[:4])
    layout, data = layout_of(known.problem), [(known.problem[3], known.targets)]
    for method in METHODS.values():
        matrices = []
        for sizes in ({}, {"chunk_size": 1}, {"chunk_size": 2, "vector_chunk": 1}):
            est = estimator(setting, method, layout, **sizes)
            matrices.append(dense(built(est, known.problem, data), known.problem[1]))
        assert_near(matrices[1], matrices[0], 1e-10)
        assert_near(matrices[2], matrices[0], 1e-10)


def test_both_passes_draw_the_same_labels():
    """One example and one label: F has rank one in every block, and so does EKFAC."""
    problem = NETS["mlp"].build(size=1)
    y = torch.zeros(1, dtype=torch.int64)
    est = cv.ekfac(
        layout_of(problem),
        likelihood=cv.cross_entropy(reduction=cv.mean),
        fisher=cv.monte_carlo(samples=1),
    )
    for key in range(5):
        curv = built(est, problem, [(problem[3], y)], key)
        for held in curv.blocks.values():
            values = held.eigenvalues.flatten().sort(descending=True)[0]
            assert values[1:].sum() <= TIGHT * values[0]
            assert values[0] > 0


# --- T8: invariance ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("kind", ["type2", "empirical"])
def test_undamped_kfac_steps_do_not_see_affine_changes_of_inputs_and_activations(kind, loss):
    """T8: x -> M₀ x + c₀ and s, φ(s) -> Φ⁻¹(s − τ), M φ(Φ s + τ) + c, joint biases."""
    torch.manual_seed(0)
    n, d0, d1, d2 = 40, 2, 3, 2
    x, (w1, b1, w2, b2) = randn(n, d0), (randn(d1, d0), randn(d1), randn(d2, d1), randn(d2))
    m0, m1, phi = (torch.eye(d, dtype=x.dtype) + 0.4 * randn(d, d) for d in (d0, d1, d1))
    c0, c1, tau = randn(d0), randn(d1), randn(d1)

    def plain(p, buffers, x):
        return F_linear((F_linear(x, p["w1"], p["b1"])).tanh(), p["w2"], p["b2"])

    def changed(p, buffers, x):
        s = F_linear(x @ m0.mT + c0, p["w1"], p["b1"])
        hidden = (s @ phi.mT + tau).tanh() @ m1.mT + c1
        return F_linear(hidden, p["w2"], p["b2"])

    new_w1 = torch.linalg.solve(phi, w1) @ torch.linalg.inv(m0)
    new_w2 = w2 @ torch.linalg.inv(m1)
    params = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    other = {
        "w1": new_w1,
        "b1": torch.linalg.solve(phi, b1 - tau) - new_w1 @ c0,
        "w2": new_w2,
        "b2": b2 - new_w2 @ c1,
    }
    y = oracle.targets_for(oracle.LOSSES[loss], plain(params, {}, x))
    outputs = [
        _stepped(apply, start, x, y, loss, kind)
        for apply, start in ((plain, params), (changed, other))
    ]
    assert_near(outputs[1], outputs[0], 1e-9)
    assert (outputs[0] - plain(params, {}, x)).norm() > 1e-2


F_linear = torch.nn.functional.linear


def _stepped(apply, params, x, y, loss, kind) -> Tensor:
    problem = apply, params, {}, x
    setting = Setting("", loss, kind, "mean")
    est = estimator(setting, cv.kfac, layout_of(problem))
    curv = built(est, problem, [(x, y)])
    grads = torch.func.grad(
        lambda params: oracle.LOSSES[loss].total(apply(params, {}, x), y, "mean")
    )(params)
    step = cv.solve(curv, grads, damping=cv.exact(0.0))
    return apply({k: v - 0.3 * step[k] for k, v in params.items()}, {}, x)


# --- T9, T10, T11: where the approximation is exact, and where it is not ------------------------


def _exact_rows() -> dict[str, tuple]:
    """name -> (module, inputs, what is done with its outputs, loss, kinds, sharing)."""

    def keep(out: Tensor) -> Tensor:
        return out

    mse, ce = ("mse",), ("cross_entropy", "mse", "bce")
    both = ("type2", "empirical")
    mlp = functools.partial(
        seq, nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)
    )
    one = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    deep = seq(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    return {
        "one linear": (nn.Linear(3, 2), (7, 3), keep, mse, ("type2",), "expand"),
        "one linear, no bias": (nn.Linear(3, 2, bias=False), (7, 3), keep, mse, ("type2",),
                                "reduce"),
        "deep linear": (deep, (7, 3), keep, mse, ("type2",), "expand"),
        "one example": (mlp(), (1, 3), keep, ce, both, "expand"),
        "one example, mc": (mlp(), (1, 3), keep, ce, ("mc",), "expand"),
        "one example, reduce": (mlp(), (1, 3), keep, ce, both, "reduce"),
        "identical inputs": (mlp(), one.expand(5, 3).contiguous(), keep, ("cross_entropy",),
                             ("type2",), "expand"),
        "conv and flatten": (seq(nn.Conv2d(2, 3, 2), nn.Flatten()), (5, 2, 3, 4), keep, mse,
                             ("type2",), "expand"),
        "grouped conv and flatten": (seq(nn.Conv2d(4, 4, 2, groups=2), nn.Flatten()), (5, 4, 3, 3),
                                     keep, mse, ("type2",), "expand"),
        "depthwise conv1d": (seq(nn.Conv1d(3, 6, 2, groups=3), nn.Flatten()), (5, 3, 4), keep, mse,
                             ("type2",), "expand"),
        "conv3d": (seq(nn.Conv3d(1, 2, (1, 2, 2)), nn.Flatten()), (5, 1, 2, 3, 2), keep, mse,
                   ("type2",), "expand"),
        "grouped, one position, one example": (
            seq(nn.Conv2d(4, 4, 2, groups=4), nn.Flatten()), (1, 4, 2, 2), keep, mse, both,
            "expand",
        ),
        "linear of every position": (nn.Linear(3, 2), (5, 4, 3), keep, mse, ("type2",), "expand"),
        "mean of positions": (nn.Linear(3, 2), (5, 4, 3), lambda out: out.mean(1), mse, ("type2",),
                              "reduce"),
        "sum of positions": (nn.Linear(3, 2, bias=False), (5, 4, 3), lambda out: out.sum(1), mse,
                             ("type2",), "reduce"),
    }  # fmt: skip


EXACT_ROWS = _exact_rows()


def _row_problem(name: str):
    module, inputs, finish = EXACT_ROWS[name][:3]
    module = module.double()
    torch.manual_seed(0)
    x = inputs if isinstance(inputs, Tensor) else randn(*inputs)

    def apply(params, buffers, inputs):
        return finish(torch.func.functional_call(module, params, (inputs,)))

    return apply, {k: v.detach() for k, v in module.named_parameters()}, {}, x


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
@pytest.mark.parametrize("name", EXACT_ROWS)
def test_kfac_and_ekfac_are_exact(name, joint, reduction):
    """T9."""
    problem = _row_problem(name)
    losses, kinds, sharing = EXACT_ROWS[name][3:]
    layout = layout_of(problem)
    for loss, kind in itertools.product(losses, kinds):
        y = oracle.targets_for(oracle.LOSSES[loss], problem[0](*problem[1:]))
        known = exact_for(problem, oracle.LOSSES[loss], y, kind, reduction)
        if kind == "mc":  # with one label the matrix has rank one
            known = _with_labels(known, oracle.LOSSES[loss], known.labels[:1], reduction)
        setting = Setting("", loss, kind, reduction, joint, sharing)
        for method in METHODS.values():
            est = estimator(setting, method, layout, fisher=_fisher(kind, 1))
            curv = built(est, problem, [batch_of(known, kind)])
            kept = blocks_only(known.matrix, curv, problem[1])
            # The basis of EKFAC has its own rounding.
            assert_near(dense(curv, problem[1]), kept, TIGHT if method is cv.kfac else 1e-11)


def _fisher(kind: str, samples: int):
    return cv.monte_carlo(samples=samples) if kind == "mc" else FISHERS[kind]()


def _with_labels(known, loss: oracle.Loss, labels: Tensor, reduction: str):
    out, _ = oracle.jacobian(known.problem)
    vectors = oracle.monte_carlo_vectors(loss, out, known.targets, labels)
    matrix = oracle.fisher(known.problem, loss, known.targets, reduction, vectors)
    return known._replace(labels=labels, vectors=vectors, matrix=matrix)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("name", "sharing"),
    [*((name, "expand") for name in ONE_POSITION), *((name, "reduce") for name in POOLED)],
)
def test_a_bias_of_its_own_is_exact(name, sharing, method):
    """T10: with one position, and with reduce at any number of them."""
    turn = POOLED.index(name)
    for k, (loss, kind) in enumerate(zip(LIKELIHOODS, (*KINDS[turn % 3 :], *KINDS), strict=False)):
        setting = Setting(name, loss, kind, list(REDUCTIONS)[k % 2], False, sharing)
        known = exact(*setting[:4])
        matrix = dense(curvature(setting, method), known.problem[1])
        for parameter, index in oracle.indices(known.problem[1]).items():
            if not parameter.endswith("bias"):
                continue
            # A grouped convolution has a block for each group of its biases.
            kept = blocks_only(known.matrix, curvature(setting, method), known.problem[1])
            expected = kept[index[:, None], index]
            found = matrix[index[:, None], index]
            assert (found - expected).norm() <= 1e-11 * known.matrix.norm(), parameter


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_kfac_and_ekfac_are_not_exact_elsewhere(method):
    """T11: a comparison that cannot tell is no comparison."""
    torch.manual_seed(0)
    linear = nn.Linear(4, 3).double()
    convs = seq(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2), nn.Flatten()).double()
    for module, x, loss in (
        (linear, randn(11, 4), "cross_entropy"),
        (convs, randn(5, 1, 4, 4), "mse"),
    ):
        params = {k: v.detach() for k, v in module.named_parameters()}

        def apply(params, buffers, inputs, module=module):
            return torch.func.functional_call(module, params, (inputs,))

        problem = apply, params, {}, x
        y = oracle.targets_for(oracle.LOSSES[loss], apply(params, {}, x))
        known = exact_for(problem, oracle.LOSSES[loss], y, "type2", "mean")
        est = estimator(Setting("", loss, "type2", "mean"), method, layout_of(problem))
        curv = built(est, problem, [(x, y)])
        kept = blocks_only(known.matrix, curv, params)
        assert 1e-3 < oracle.error(dense(curv, params), kept) < 5


# --- T12: the metric --------------------------------------------------------------------------

METRIC = ["mlp", "cnn", "grouped", "in_out_storage", "layer_norm", "tied_modules", "everything"]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", METRIC)
def test_natural_upgrad_raises_no_objective(name, method):
    """T12: G = J (F + d)⁻¹ Jᵀ, the step (F + d)⁻¹ Jᵀ w, and J (F + d)⁻¹ Jᵀ w ≥ 0."""
    setting, damping = Setting(name, "cross_entropy", "type2", "mean"), 1e-2
    known, curv = exact(*setting[:4]), curvature(setting, method)
    apply, params, buffers, inputs = known.problem
    torch.manual_seed(1)
    out = apply(params, buffers, inputs)
    directions = torch.randn(3, *out.shape, dtype=out.dtype)

    def objectives(params, buffers, batch):
        out = apply(params, buffers, batch)
        return torch.stack([(out * v).mean() + 0.1 * out.square().mean() for v in directions])

    info, direction = jd.value_and_jd_step(
        objectives,
        params,
        inputs,
        buffers=buffers,
        metric=cv.inverse(curv, cv.exact(damping)),
    )
    jac = torch.func.jacrev(objectives)(params, buffers, inputs)
    rows = torch.cat([leaf.flatten(1) for leaf in pytrees.leaves(jac)], 1)
    damped = dense(curv, params) + damping * torch.eye(rows.shape[1], dtype=rows.dtype)
    gramian = rows @ torch.linalg.solve(damped, rows.mT)
    assert_near(info.gramian, gramian, 1e-11)
    assert_near(cv.metric_gramian(curv, jac, damping=cv.exact(damping)), gramian, 1e-11)
    expected = torch.linalg.solve(damped, rows.mT @ jd.upgrad(gramian))
    assert_near(flat(direction), expected, 1e-7)  # weights of a quadratic programme
    assert (rows @ flat(direction) >= -1e-9 * gramian.abs().max()).all()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", METRIC)
def test_metric_gramian_of_two_sets_of_rows(name, method):
    setting = Setting(name, "mse", "empirical", "mean")
    known, curv = exact(*setting[:4]), curvature(setting, method)
    torch.manual_seed(2)
    one, two = (
        {k: torch.randn(rows, *p.shape, dtype=p.dtype) for k, p in known.problem[1].items()}
        for rows in (2, 3)
    )
    a, b = (torch.cat([leaf.flatten(1) for leaf in pytrees.leaves(tree)], 1) for tree in (one, two))
    damped = dense(curv, known.problem[1]) + 0.1 * torch.eye(a.shape[1], dtype=a.dtype)
    expected = a @ torch.linalg.solve(damped, b.mT)
    assert_near(cv.metric_gramian(curv, one, two, damping=cv.exact(0.1)), expected, 1e-11)


def test_thin_bases_change_nothing():
    """Fewer rows than widths: the complement of the basis has eigenvalue zero, also in a solve."""
    torch.manual_seed(0)
    wide = Fn(lambda self, x: self.b(self.a(x).tanh()), a=nn.Linear(9, 8), b=nn.Linear(8, 2))
    module, x = wide.double(), randn(3, 9)
    params = {k: v.detach() for k, v in module.named_parameters()}

    def apply(params, buffers, inputs):
        return torch.func.functional_call(module, params, (inputs,))

    problem = apply, params, {}, x
    y = torch.tensor([0, 1, 1])
    layout = layout_of(problem)
    for kind in KINDS:
        known = exact_for(problem, oracle.LOSSES["cross_entropy"], y, kind, "mean")
        setting = Setting("", "cross_entropy", kind, "mean")
        est, batch = estimator(setting, cv.ekfac, layout), batch_of(known, kind)
        thin = built(est, problem, [batch])
        state = est.refresh(_updated(est, est.init(params), problem, [batch]))
        full = est.finalize(est.update_eigenvalues(state, params, {}, batch, KEY))
        matrix = dense(thin, params)
        assert_near(matrix, dense(full, params), 1e-9)
        vector = {k: torch.randn_like(v) for k, v in params.items()}
        damped = matrix + 0.1 * torch.eye(len(matrix), dtype=matrix.dtype)
        solved = cv.solve(thin, vector, damping=cv.exact(0.1))
        assert_near(flat(solved), torch.linalg.solve(damped, flat(vector)), 1e-10)

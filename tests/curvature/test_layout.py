"""Layouts: which rule every parameter gets, what is printed, and what is refused."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from judged import LIKELIHOODS, blocks_only, dense
from models import Fn, randn, seq
from nets import NETS
from torch import Tensor, nn

from jdfunc import curvature as cv
from jdfunc.curvature.layouts.layout import Layout, unused

TIGHT = 1e-12


def assert_near(value: Tensor, expected: Tensor, tolerance: float = TIGHT) -> None:
    distance, size = float((value - expected).norm()), float(expected.norm())
    assert distance <= tolerance * size + 1e-300, f"distance {distance:.3e}, norm {size:.3e}"


def linear(params, buffers, inputs):
    return F.linear(inputs, params["w"], params["b"])


def given(apply=linear, x: Tensor | None = None, **params: Tensor):
    """A problem of a matrix [2, 3], a bias [2], and other parameters."""
    torch.manual_seed(0)
    x = randn(5, 3) if x is None else x
    return apply, {"w": randn(2, 3), "b": randn(2)} | params, {}, x


def layout_of(problem, **kwargs) -> Layout:
    return cv.curvature_layout(*problem, **kwargs)


def rules_of(layout: Layout) -> dict[str, tuple[str, str]]:
    """What is printed of every parameter: its rule and its block."""
    head, rule, *lines = str(layout).splitlines()
    assert set(rule) == {"-", " "}
    columns = [head.index(title) for title in ("parameter", "shape", "rule", "block", "used by")]
    cells = [
        [line[a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True)]
        for line in lines
    ]
    return {name: (rule, block) for name, _, rule, block, _ in cells}


def check_exact(problem, layout: Layout, likelihood=None, y=None) -> None:
    """The trace is that of the Gauss-Newton matrix; blocks that are no product are exact."""
    out, _ = oracle.jacobian(problem)
    y = oracle.targets_for(oracle.mse(), out) if y is None else y
    matrix = oracle.ggn(problem, oracle.mse(), y, "mean")
    for joint in (True, False):
        est = cv.ekfac(layout, likelihood=likelihood or cv.mse(), fisher=cv.type2(),
                       joint_bias=joint)  # fmt: skip
        for limit in (0, 2**28):
            curv = cv.build(est, *problem[1:3], [(problem[3], y)], cache_limit=limit)
            covered = [n for r in layout.rests if not r.rule.covered for n in r.params]
            index = oracle.indices(problem[1])
            zero = [i for name in covered for i in index[name].flatten().tolist()]
            trace = matrix.trace() - matrix.diagonal()[zero].sum()
            assert_near(cv.trace(curv), trace)
            kept, found = blocks_only(matrix, curv, problem[1]), dense(curv, problem[1])
            for rest in layout.rests:
                if rest.rule.covered and rest.rule.full:
                    here = torch.cat([index[name].flatten() for name in rest.params])
                    assert_near(found[here[:, None], here], kept[here[:, None], here], 1e-11)


# --- what is printed --------------------------------------------------------------------------


def test_a_layout_prints_as_a_table():
    module = Fn(
        lambda self, x: self.head(self.norm(self.conv(self.table(x).mT)).flatten(2).mean(2)),
        table=nn.Embedding(7, 4),
        conv=nn.Conv1d(4, 6, 2, groups=2),
        norm=nn.GroupNorm(2, 6),
        head=nn.Linear(6, 2),
        spare=nn.Linear(3, 1),
        scale=nn.Parameter(torch.ones(())),
    ).double()
    params = {k: v.detach() for k, v in module.named_parameters()}

    def apply(params, buffers, x):
        return torch.func.functional_call(module, params, (x,)) * params["scale"]

    x = torch.randint(0, 7, (3, 5))
    layout = cv.curvature_layout(apply, params, None, x, rules={"head.bias": cv.excluded})
    assert str(layout).splitlines() == [
        "parameter     shape   rule      block                  used by",
        "------------  ------  --------  ---------------------  -----------------",
        "conv.bias     6       bias      conv.weight            conv1d",
        "conv.weight   6×2×2   kron      2 × 3 ⊗ 4              conv1d",
        "head.bias     2       excluded",
        "head.weight   2×6     kron      2 ⊗ 6                  linear",
        "norm.bias     6       dense     norm.bias+norm.weight  its own gradients",
        "norm.weight   6       dense     norm.bias+norm.weight  its own gradients",
        "scale         scalar  dense     scale                  its own gradients",
        "spare.bias    1       unused                           nothing",
        "spare.weight  1×3     unused                           nothing",
        "table.weight  7×4     kron      diag(7) ⊗ 4            embedding",
    ]
    assert (
        layout.fingerprint()
        == cv.curvature_layout(
            apply, params, None, x, rules={"head.bias": cv.excluded}
        ).fingerprint()
    )
    assert layout.fingerprint() != cv.curvature_layout(apply, params, None, x).fingerprint()


def test_names_of_nested_params():
    apply = lambda p, b, x: F.linear(x, p["a"][0]["w"], p["a"][1])  # noqa: E731
    problem = apply, {"a": [{"w": randn(2, 3)}, randn(2)]}, {}, randn(4, 3)
    layout = layout_of(problem)
    assert rules_of(layout) == {"a.0.w": ("kron", "2 ⊗ 3"), "a.1": ("bias", "a.0.w")}
    check_exact(problem, layout)
    bare = cv.curvature_layout(lambda p, b, x: F.linear(x, p), randn(2, 3), None, randn(4, 3))
    assert len(bare.layers) == 1


# --- rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, {"w": ("kron", "2 ⊗ 3"), "b": ("bias", "w")}),
        ({"w": cv.kron}, {"w": ("kron", "2 ⊗ 3"), "b": ("bias", "w")}),
        ({"w": cv.full_block}, {"w": ("dense", "b+w"), "b": ("dense", "b+w")}),
        ({"w": cv.diagonal}, {"w": ("diag", ""), "b": ("dense", "b")}),
        ({"w": cv.excluded}, {"w": ("excluded", ""), "b": ("dense", "b")}),
        ({"b": cv.full_block}, {"w": ("kron", "2 ⊗ 3"), "b": ("dense", "b")}),
        ({"b": cv.diagonal}, {"w": ("kron", "2 ⊗ 3"), "b": ("diag", "")}),
        ({"b": cv.excluded}, {"w": ("kron", "2 ⊗ 3"), "b": ("excluded", "")}),
        ({"b": unused}, {"w": ("kron", "2 ⊗ 3"), "b": ("unused", "")}),
        ({"b": cv.diagonal, "w": cv.diagonal}, {"w": ("diag", ""), "b": ("diag", "")}),
    ],
)
def test_rules_may_be_forced(rules, expected):
    problem = given()
    layout = layout_of(problem, rules=rules)
    assert rules_of(layout) == expected
    check_exact(problem, layout)


def test_rules_are_checked():
    with pytest.raises(ValueError, match=r"\['v'\].*\['b', 'w'\]"):
        layout_of(given(), rules={"v": cv.kron})
    with pytest.raises(TypeError, match="w='kron'"):
        layout_of(given(), rules={"w": "kron"})
    with pytest.raises(ValueError, match="none, or all excluded"):
        layout_of(given(), rules={"w": cv.excluded, "b": cv.excluded})
    with pytest.raises(ValueError, match="none, or all excluded"):
        cv.curvature_layout(lambda p, b, x: x, {}, None, randn(2, 2))
    for name in ("dense_max", "max_side"):
        with pytest.raises(ValueError, match=name):
            layout_of(given(), **{name: 0})


@pytest.mark.parametrize("name", ["everything", "group_norm", "lstm", "class_token"])
def test_dense_blocks_are_those_that_fit(name):
    """Parameters of one module together, each on its own, its diagonal."""
    problem = NETS[name].build()
    sizes = {k: v.numel() for k, v in problem[1].items()}
    for dense_max in (1, 3, 6, 8, 1000):
        layout = layout_of(problem, dense_max=dense_max)
        modules: dict[str, int] = {}
        for rest in layout.rests:
            for param in rest.params:
                if sizes[param] <= dense_max:
                    module = param.rpartition(".")[0]
                    modules[module] = modules.get(module, 0) + sizes[param]
        for rest in layout.rests:
            if not rest.rule.covered:
                continue
            fits = sizes[rest.params[0]] <= dense_max
            assert rest.rule is (cv.full_block if fits else cv.diagonal)
            together = modules.get(rest.params[0].rpartition(".")[0], 0) <= dense_max and fits
            alone = len({p.rpartition(".")[0] for p in rest.params}) == 1
            assert alone
            assert together or len(rest.params) == 1
            if together:
                module = rest.params[0].rpartition(".")[0]
                assert sum(sizes[param] for param in rest.params) == modules[module]
        check_exact(problem, layout)


@pytest.mark.parametrize("max_side", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["mlp", "embedding", "tied_embedding", "conv1d", "einsum_heads"])
def test_wide_sides_are_diagonal(name, max_side):
    """The trace stays exact with the identity for a basis; KFAC has the diagonals."""
    problem = NETS[name].build()
    layout = layout_of(problem, max_side=max_side)
    full = layout_of(problem)
    for layer, other in zip(layout.layers, full.layers, strict=True):
        _, i, j = layer.matrix
        expected = (i > max_side or other.diagonal[0], j > max_side or other.diagonal[1])
        assert layer.diagonal == expected
    out, _ = oracle.jacobian(problem)
    y = oracle.targets_for(oracle.LOSSES["cross_entropy"], out)
    matrix = oracle.ggn(problem, oracle.LOSSES["cross_entropy"], y, "mean")
    likelihood = LIKELIHOODS["cross_entropy"]()
    for sharing in (cv.expand, cv.reduce):
        for limit in (0, 2**28):
            est = cv.ekfac(layout, likelihood=likelihood, fisher=cv.type2(), sharing=sharing)
            curv = cv.build(est, *problem[1:3], [(problem[3], y)], cache_limit=limit)
            assert_near(cv.trace(curv), matrix.trace())
        one, two = (
            cv.build(
                cv.kfac(x, likelihood=likelihood, fisher=cv.type2(), sharing=sharing),
                *problem[1:3],
                [(problem[3], y)],
            )
            for x in (layout, full)
        )
        for layer in layout.layers:
            if len(layer.roles) > 1:  # there the two products are joined
                continue
            for side in (0, 1):
                a, b = one.blocks[layer.name][side], two.blocks[layer.name][side]
                b = b.diagonal(dim1=-2, dim2=-1) if b.ndim > a.ndim else b
                a = a[..., : b.shape[-1]]
                assert_near(a, b)


# --- biases -----------------------------------------------------------------------------------


BIASES = {
    "of two layers": (
        lambda p, b, x: F.linear(linear(p, b, x), p["v"], p["b"]),
        {"v": (2, 2)},
        {"w": "kron", "v": "kron", "b": "dense"},
    ),
    "of two weights": (
        lambda p, b, x: linear(p, b, x) + F.linear(x.sin(), p["v"], p["b"]),
        {"v": (2, 3)},
        {"w": "kron", "v": "kron", "b": "dense"},
    ),
    "used elsewhere": (lambda p, b, x: linear(p, b, x) * p["b"], {}, {"w": "kron", "b": "dense"}),
    "used elsewhere, to no effect": (
        lambda p, b, x: linear(p, b, x) + 0 * p["b"].exp(),
        {},
        {"w": "kron", "b": "bias"},
    ),
    "of one use of two": (
        lambda p, b, x: linear(p, b, x) + F.linear(x.sin(), p["w"]),
        {},
        {"w": "kron", "b": "bias"},
    ),
    "of both uses": (
        lambda p, b, x: linear(p, b, x) + linear(p, b, x.sin()),
        {},
        {"w": "kron", "b": "bias"},
    ),
    "one for each use": (
        lambda p, b, x: linear(p, b, x) + F.linear(x.sin(), p["w"], p["c"]),
        {"c": (2,)},
        {"w": "kron", "b": "bias", "c": "dense"},
    ),
    "added by hand": (
        lambda p, b, x: F.linear(x, p["w"]) + p["b"],
        {},
        {"w": "kron", "b": "dense"},
    ),
    "of other shape": (
        lambda p, b, x: F.linear(x, p["w"], p["b"].sum(0)),
        {"b": (4, 2)},
        {"w": "kron", "b": "dense"},
    ),
    "of one number": (
        lambda p, b, x: F.linear(x, p["w"], p["b"]),
        {"b": (1,)},
        {"w": "kron", "b": "dense"},
    ),
    "scaled": (
        lambda p, b, x: F.linear(x, p["w"], 2 * p["b"]),
        {},
        {"w": "kron", "b": "dense"},
    ),
    "of a weight that is used otherwise": (
        lambda p, b, x: linear(p, b, x) + p["w"].square().sum(),
        {},
        {"w": "dense", "b": "dense"},
    ),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_goes_with_its_weight_where_its_gradient_does(name):
    apply, shapes, expected = BIASES[name]
    torch.manual_seed(1)
    problem = given(apply, **{k: randn(*shape) for k, shape in shapes.items()})
    layout = layout_of(problem)
    assert {k: rule for k, (rule, _) in rules_of(layout).items()} == expected
    check_exact(problem, layout)


def test_a_weight_in_two_shapes_is_dense():
    problem = given(
        lambda p, b, x: (
            torch.cat([F.linear(x, p["w"]), F.conv1d(x[:, None], p["w"][:, None]).flatten(1)], 1)
            + p["b"].sum()
        )
    )
    layout = layout_of(problem)
    assert rules_of(layout)["w"][0] == "dense"
    check_exact(problem, layout)


# --- models that are refused ------------------------------------------------------------------


REFUSED = {
    "dropout": (lambda p, b, x: F.dropout(linear(p, b, x), 0.5, True), r"module\.eval\(\)"),
    "mean of the batch": (
        lambda p, b, x: linear(p, b, x) - linear(p, b, x).mean(0), "couples the examples"),
    "softmax over examples": (
        lambda p, b, x: linear(p, b, x).softmax(0), "couples the examples"),
    "ignores params": (lambda p, b, x: 2 * x, "depend on params"),
    "detached": (lambda p, b, x: linear(p, b, x).detach(), "depend on params"),
    "a scalar": (lambda p, b, x: linear(p, b, x).sum(), r"first axis, got shape \(\)"),
    "no axis of examples": (lambda p, b, x: linear(p, b, x)[0], "first axis"),
    "nan": (lambda p, b, x: linear(p, b, x) * float("nan"), "finite gradients.*'b'"),
    "whole numbers": (lambda p, b, x: linear(p, b, x).argmax(1), "floating-point outputs"),
    "None": (lambda p, b, x: None, "floating-point outputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name):
    apply, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        layout_of(given(apply))


def test_batch_norm_in_training_mode_is_refused():
    module = seq(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    params = {k: v.detach() for k, v in module.named_parameters()}
    buffers = {k: v.detach() for k, v in module.named_buffers()}

    def apply(params, buffers, inputs):
        return torch.func.functional_call(module, (params, buffers), (inputs,))

    with pytest.raises(ValueError, match=r"batch_norm of '1'.*training mode"):
        cv.curvature_layout(apply, params, buffers, randn(4, 3))
    module.eval()
    assert len(cv.curvature_layout(apply, params, buffers, randn(4, 3)).layers) == 1


@pytest.mark.parametrize("odd", [3.0, object()])
def test_outputs_that_are_no_tensors_are_named(odd):
    with pytest.raises(TypeError, match=f"got {type(odd).__name__}"):
        layout_of(given(lambda p, b, x: (linear(p, b, x), odd)))


def test_arguments_of_the_wrong_kind_are_named():
    apply, params, _, x = given()
    with pytest.raises(TypeError, match=r"function \(params, buffers, inputs\)"):
        cv.curvature_layout("model", params, None, x)
    with pytest.raises(TypeError, match=r"function \(params, buffers, inputs\)"):
        cv.curvature_layout(nn.Linear(3, 2), params, None, x)
    with pytest.raises(TypeError, match="got float at 'n'"):
        cv.curvature_layout(apply, params | {"n": 3.0}, None, x)
    with pytest.raises(ValueError, match=r"int64 at 'n'"):
        cv.curvature_layout(apply, params | {"n": torch.tensor(3)}, None, x)
    with pytest.raises(TypeError, match="None"):
        cv.curvature_layout(apply, params | {"n": None}, None, x)
    with pytest.raises(TypeError, match="buffers"):
        cv.curvature_layout(apply, params, {"n": 3}, x)
    with pytest.raises(ValueError, match="at least one example"):
        cv.curvature_layout(apply, params, None, x[:0])
    with pytest.raises(ValueError, match=r"one number of examples.*\[3, 5\]"):
        cv.curvature_layout(apply, params, None, {"x": x, "z": x[:3]})


# --- inputs and outputs -----------------------------------------------------------------------


def test_a_model_that_branches_on_values_runs_example_by_example():
    def branching(params, buffers, x):
        return linear(params, buffers, x) if x.shape[0] > 1 or x.sum() > 0 else linear(
            params, buffers, x)  # fmt: skip

    def plain_twice(params, buffers, x):
        return torch.where(x.sum(1, keepdim=True) > 0, 1.0, 3.0) * linear(params, buffers, x)

    def loops(params, buffers, x):
        rows = [(1.0 if row.sum() > 0 else 3.0) * linear(params, buffers, row) for row in x]
        return torch.stack(rows)

    problem = given(loops)
    with pytest.warns(UserWarning, match="branches on the values"):
        layout = layout_of(problem)
    other = layout_of(given(plain_twice))
    assert str(layout) == str(other)
    y = torch.tensor([0, 1, 1, 0, 1])
    curvs = []
    for lay in (layout, other):
        est = cv.ekfac(lay, likelihood=cv.cross_entropy(), chunk_size=2)
        if lay is layout:
            with pytest.warns(UserWarning, match="branches on the values"):
                curvs.append(cv.build(est, *problem[1:3], [(problem[3], y)]))
        else:
            curvs.append(cv.build(est, *problem[1:3], [(problem[3], y)]))
    one, two = (dense(curv, problem[1]) for curv in curvs)
    assert_near(one, two, 1e-10)
    with pytest.warns(UserWarning, match="branches on the values"):
        layout_of(given(branching))


@pytest.mark.parametrize(
    ("shape", "batch_dim"), [("tuple", (0, None)), ("dict", {"x": 0, "scale": None}), ("last", 1)]
)
def test_example_axes_of_the_inputs(shape, batch_dim):
    """A pytree prefix of axes, with None for what examples share."""
    _, params, _, x = given()
    scale, y = randn(3), torch.tensor([0, 1, 1, 0, 1])
    expected_problem = (lambda p, b, x: linear(p, b, x * scale)), params, {}, x
    inputs, take = {
        "tuple": ((x, scale), lambda z: z[0] * z[1]),
        "dict": ({"x": x, "scale": scale}, lambda z: z["x"] * z["scale"]),
        "last": (x.mT, lambda z: z.mT * scale),
    }[shape]

    def apply(params, buffers, inputs):
        return linear(params, buffers, take(inputs))

    layout = cv.curvature_layout(apply, params, None, inputs, batch_dim=batch_dim)
    expected = layout_of(expected_problem)
    assert str(layout) == str(expected)
    for chunk in (None, 2):
        one, two = (
            dense(
                cv.build(
                    cv.ekfac(lay, likelihood=cv.cross_entropy(), chunk_size=chunk),
                    params,
                    None,
                    [(z, y)],
                ),
                params,
            )
            for lay, z in ((layout, inputs), (expected, x))
        )
        assert_near(one, two, 1e-10)


def test_outputs_of_several_tensors_take_a_likelihood_that_chooses():
    """Layouts look at all of them; flat ones [b] too."""
    problem = given(lambda p, b, x: {"y": linear(p, b, x), "z": p["v"] @ x.mT}, v=randn(3))
    layout = layout_of(problem)
    assert rules_of(layout)["v"][0] == "kron"
    likelihood = cv.mse()
    first = likelihood._replace(canonical=lambda out: likelihood.canonical(out["y"]))
    second = likelihood._replace(canonical=lambda out: likelihood.canonical(out["z"]))
    y = randn(5, 2)
    for choice, key, zero in ((first, "y", "v"), (second, "z", "w")):
        est = cv.ekfac(layout, likelihood=choice, fisher=cv.type2())
        with pytest.raises(ValueError, match=f"1 uses of '{zero}' that reach the loss"):
            cv.build(est, *problem[1:3], [(problem[3], y if key == "y" else y[:, 0])])
        layout_of_it = layout_of(problem, rules={zero: cv.excluded})
        if zero == "w":
            est = cv.ekfac(layout_of_it, likelihood=choice, fisher=cv.type2())
            with pytest.raises(ValueError, match="1 uses of 'b' that reach the loss"):
                cv.build(est, *problem[1:3], [(problem[3], y[:, 0])])
            layout_of_it = layout_of(problem, rules={"w": cv.excluded, "b": cv.excluded})
        one = lambda p, b, x, key=key: problem[0](p, b, x)[key]  # noqa: E731
        est = cv.ekfac(layout_of_it, likelihood=choice, fisher=cv.type2())
        targets = y if key == "y" else y[:, 0]
        curv = cv.build(est, *problem[1:3], [(problem[3], targets)], cache_limit=0)
        alone = (one, *problem[1:])
        out, _ = oracle.jacobian(alone)
        matrix = oracle.ggn(alone, oracle.mse(), oracle.targets_for(oracle.mse(), out), "mean")
        assert_near(cv.trace(curv), matrix.trace())
        index = oracle.indices(problem[1])[zero].flatten()
        assert (dense(curv, problem[1])[index] == 0).all()


@pytest.mark.parametrize("method", [cv.kfac, cv.ekfac])
def test_outputs_without_a_class_axis(method):
    """[b] is [b, 1], and its default kind is exact."""
    problem = given(lambda p, b, x: linear(p, b, x).sum(1))
    est = method(layout_of(problem), likelihood=cv.mse())
    curv = cv.build(est, *problem[1:3], [(problem[3], randn(5))])
    matrix = oracle.ggn(problem, oracle.mse(), torch.zeros(5).double(), "mean")
    kept = blocks_only(matrix, curv, problem[1])
    assert_near(cv.trace(curv), kept.trace())


def test_sequences_of_other_lengths_than_that_of_the_layout():
    """Batches of 2, 4 and 7 tokens: type 2 has as many vectors as each needs."""
    net = NETS["tokens"]
    apply, params, buffers, _ = net.build()
    layout = cv.curvature_layout(apply, params, buffers, randn(2, 4, 3))
    likelihood = LIKELIHOODS["cross_entropy"](reduction=cv.sum)
    data, expected = [], 0.0
    for length in (2, 4, 7):
        x = randn(3, length, 3)
        y = torch.randint(0, 3, (3, length))
        data.append((x, y))
        matrix = oracle.ggn((apply, params, buffers, x), oracle.LOSSES["cross_entropy"], y, "sum")
        expected = expected + matrix.trace()
    for sizes in ({}, {"chunk_size": 2, "vector_chunk": 3}):
        for limit in (0, 2**28):
            est = cv.ekfac(layout, likelihood=likelihood, fisher=cv.type2(), **sizes)
            curv = cv.build(est, params, buffers, data, cache_limit=limit)
            assert_near(cv.trace(curv), expected)


def test_parameters_without_numbers():
    problem = given(lambda p, b, x: linear(p, b, x) + p["none"].sum(), none=randn(3, 0))
    layout = layout_of(problem)
    assert rules_of(layout)["none"] == ("dense", "none")
    for method in (cv.kfac, cv.ekfac):
        curv = cv.build(
            method(layout, likelihood=cv.mse()), *problem[1:3], [(problem[3], randn(5, 2))]
        )
        assert curv.blocks["none"][-1 if method is cv.kfac else 2].numel() == 0


def test_layouts_hold_no_tensors():
    layout = layout_of(NETS["everything"].build())
    assert all(x.device.type == "meta" for x in [layout.outputs])
    assert "tensor(" not in layout.fingerprint()
    assert layout.bytes_fixed > 0 < layout.bytes_each


def test_a_bias_without_a_gradient_goes_with_one_weight():
    """Everything is zero here, so that the bias would fit both layers."""
    problem = given(
        lambda p, b, x: 0 * (linear(p, b, x) + F.linear(x.sin(), p["v"], p["b"])), v=randn(2, 3)
    )
    names = [name for block in layout_of(problem).blocks() for name in block.params]
    assert sorted(names) == ["b", "v", "w"]

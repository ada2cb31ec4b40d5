"""Every linearization equals plain autograd, in float64, on every model of the zoo."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import oracles
import pytest
import torch
from models import AUTOGRAD_ONLY, BY_NAME, ZOO, Case
from torch import Tensor
from torch.utils import _pytree as pytree

import jdfunc as jd

pytestmark = [
    # Hugging Face's BERT looks at its attention mask: exact, pulled back one loss at a time.
    pytest.mark.filterwarnings("ignore:the model branches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # torch.func.jvp
]


class Truth(NamedTuple):
    """A problem with its oracle."""

    model_fn: Any
    params: Any
    buffers: Any
    batch: Any
    losses: Tensor
    rows: Any
    gramian: Tensor
    weights: Tensor  # random, shaped like the losses
    combined: Any


@functools.lru_cache(maxsize=4)
def truth(name: str, data_seed: int = 1, size: int | None = None) -> Truth:
    model_fn, params, buffers, batch = BY_NAME[name].build(data_seed=data_seed, size=size)
    losses = oracles.losses_of(model_fn, params, buffers, batch)
    rows = oracles.jacobian_rows(model_fn, params, buffers, batch)
    gramian = oracles.cross_gramian(rows, rows, losses.shape, losses.shape)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(losses.shape, generator=generator, dtype=losses.dtype)
    combined = oracles.combine_rows(rows, weights)
    return Truth(model_fn, params, buffers, batch, losses, rows, gramian, weights, combined)


def _dim_name(batch_dim: Any) -> str:
    return {"None": "together", "0": "dim0"}.get(str(batch_dim), "mixed")


def over(cases: list[Case], *, together: bool = True) -> Any:
    """Parametrise over case × batch_dim, slow cases marked."""
    return pytest.mark.parametrize(
        ("name", "batch_dim"),
        [
            pytest.param(
                case.name,
                dim,
                id=f"{case.name}-{_dim_name(dim)}",
                marks=[pytest.mark.slow] if case.slow else [],
            )
            for case in cases
            for dim in case.batch_dims
            if together or dim is not None
        ],
    )


def named(*names: str) -> list[Case]:
    return [BY_NAME[name] for name in names]


def check(linearization: Any, t: Truth, what: str, tolerance: float = 1e-10) -> None:
    """Losses, G, Jᵀw (twice) and the rows of one linearization."""
    assert torch.allclose(linearization.losses, t.losses, rtol=1e-11, atol=1e-12)
    gramian = linearization.gram()
    oracles.assert_close(gramian, t.gramian, tolerance=tolerance, what=f"{what} G")
    for _ in range(2):  # nothing may be used up
        combined = linearization.combine(t.weights)
        oracles.assert_close(combined, t.combined, tolerance=tolerance, what=f"{what} Jᵀw ")


# --- the zoo itself ---------------------------------------------------------------------------


def test_zoo_covers_both_regimes() -> None:
    assert sum(0 in case.batch_dims for case in ZOO) >= 60
    assert sum(None in case.batch_dims for case in ZOO) == len(ZOO)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(c.name, marks=[pytest.mark.slow] if c.slow else [])
        for c in [*ZOO, *AUTOGRAD_ONLY]
    ],
)
def test_zoo_cases_are_what_they_say(name: str) -> None:
    case, t = BY_NAME[name], truth(name)
    again = case.build()
    assert torch.equal(oracles.losses_of(*again), t.losses)
    for path, rows in pytree.tree_flatten_with_path(t.rows)[0]:
        key = ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
        assert rows.isfinite().all(), key
        assert (rows.abs().max() < 1e-8) == (key in case.zero_params), key
    for batch_dim in case.batch_dims:
        if batch_dim is None:
            continue
        dims = pytree.tree_map(lambda _: 0, t.batch) if batch_dim == 0 else batch_dim
        for i in range(t.losses.shape[0]):
            one = pytree.tree_map(
                lambda d, v, i=i: v if d is None else v[i : i + 1],
                dims,
                t.batch,
                is_leaf=lambda d: d is None,
            )
            alone = oracles.losses_of(t.model_fn, t.params, t.buffers, one)
            assert alone.shape == (1, *t.losses.shape[1:])
            assert torch.allclose(alone[0], t.losses[i], rtol=1e-12, atol=1e-12)


# --- linearizations against the oracle --------------------------------------------------------


@over(ZOO)
def test_structured(name: str, batch_dim: Any) -> None:
    t = truth(name)
    linearization = jd.structured(
        t.model_fn, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim
    )
    check(linearization, t, "structured")
    oracles.assert_close(jd.to_dense(linearization.rows), t.rows, what="to_dense ")


@over(ZOO)
def test_public_gramian(name: str, batch_dim: Any) -> None:
    t = truth(name)
    got = jd.gramian(t.model_fn, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim)
    oracles.assert_close(got, t.gramian, what="G")


@over(AUTOGRAD_ONLY)
@pytest.mark.parametrize("linearize", [jd.structured, jd.dense], ids=["structured", "dense"])
def test_what_torch_func_refuses_is_an_error(linearize: Any, name: str, batch_dim: Any) -> None:
    """Loud, not wrong: a checkpoint would recompute with the module's own parameters."""
    t = truth(name)
    with pytest.raises(RuntimeError, match=r"saved tensor hooks|requires_grad_\(\)"):
        linearize(t.model_fn, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim)


@over(ZOO)
def test_dense(name: str, batch_dim: Any) -> None:
    t = truth(name)
    linearization = jd.dense(t.model_fn, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim)
    check(linearization, t, "dense")
    oracles.assert_close(jd.to_dense(linearization.rows), t.rows, what="rows ")


@pytest.mark.parametrize(
    "name",
    ["mlp", "cnn", "losses_grid", "loss_scalar", "nested_params", "batch_norm_train", "lstm"],
)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_jacobian(name: str, chunk_size: int | None) -> None:
    t = truth(name)
    rows = jd.jacobian(t.model_fn, t.params, t.batch, buffers=t.buffers, chunk_size=chunk_size)
    oracles.assert_close(rows, t.rows, what="J ")
    oracles.assert_close(jd.gram(rows, row_ndim=t.losses.ndim), t.gramian, what="G")
    oracles.assert_close(jd.combine(rows, t.weights), t.combined, what="Jᵀw ")


@pytest.mark.parametrize("max_block_bytes", [1, 200, 1 << 40])
@over(
    named(
        "mlp",
        "matmul_3d_input",
        "cnn",
        "conv2d_groups",
        "conv2d_depthwise",
        "conv_transpose2d_groups",
        "embedding_padding",
        "layer_norm",
        "group_norm",
        "gpt_tied",
        "vit",
        "tied_mixed_roles",
        "mha",
        "linear_in_loop",
        "losses_per_example_and_task_cnn",
        "losses_per_token",
        "bilinear",
    )  # fmt: skip
)
def test_blocks_of_any_size(name: str, batch_dim: Any, max_block_bytes: int) -> None:
    t = truth(name)
    linearization = jd.structured(
        t.model_fn,
        t.params,
        t.batch,
        buffers=t.buffers,
        batch_dim=batch_dim,
        max_block_bytes=max_block_bytes,
    )
    check(linearization, t, f"blocks of {max_block_bytes} B")


@pytest.mark.parametrize("chunk_size", [1, 2])
@over(named("mlp", "cnn", "gpt_tied", "losses_grid", "losses_per_example_and_task", "freeform"))
def test_chunks(name: str, batch_dim: Any, chunk_size: int) -> None:
    t = truth(name)
    linearization = jd.structured(
        t.model_fn,
        t.params,
        t.batch,
        buffers=t.buffers,
        batch_dim=batch_dim,
        chunk_size=chunk_size,
    )
    check(linearization, t, f"chunks of {chunk_size}")


WIDE = ("linear", "conv", "conv_stride", "tokens", "embedding")


def _wide(kind: str) -> Any:
    """Shapes on both sides of the pairwise / materialised choice: wide layers, many positions."""
    generator = torch.Generator().manual_seed(3)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    F = torch.nn.functional
    if kind == "linear":
        params, x = {"w": randn(67, 53) / 8, "b": randn(67)}, randn(5, 53)
        fn = lambda p, b, x: F.linear(x, p["w"], p["b"]).sin().square().sum(1)  # noqa: E731
    elif kind == "tokens":
        params, x = {"w": randn(3, 2), "b": randn(3)}, randn(5, 41, 2)
        fn = lambda p, b, x: F.linear(x, p["w"], p["b"]).sin().square().sum((1, 2))  # noqa: E731
    elif kind == "conv":
        params, x = {"w": randn(31, 17, 3) / 8, "b": randn(31)}, randn(3, 17, 3)
        fn = lambda p, b, x: F.conv1d(x, p["w"], p["b"], padding=1).sin().sum((1, 2))  # noqa: E731
    elif kind == "conv_stride":
        params, x = {"w": randn(2, 1, 3, 3), "b": randn(2)}, randn(3, 1, 23, 19)
        fn = lambda p, b, x: F.conv2d(x, p["w"], p["b"], stride=2).sin().sum((1, 2, 3))  # noqa: E731
    else:
        params = {"w": randn(211, 13)}
        x = torch.randint(0, 211, (5, 7), generator=generator)
        fn = lambda p, b, x: F.embedding(x, p["w"]).cumsum(1).sin().sum((1, 2))  # noqa: E731
    return fn, params, x


@pytest.mark.parametrize("max_block_bytes", [None, 1, 5000])
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("kind", WIDE)
def test_both_forms(kind: str, batch_dim: Any, max_block_bytes: int | None) -> None:
    fn, params, x = _wide(kind)
    options = {} if max_block_bytes is None else {"max_block_bytes": max_block_bytes}
    linearization = jd.structured(fn, params, x, batch_dim=batch_dim, **options)
    rows = oracles.jacobian_rows(fn, params, {}, x)
    shape = linearization.losses.shape
    oracles.assert_close(linearization.gram(), oracles.cross_gramian(rows, rows, shape, shape))
    weights = torch.linspace(-1, 2, shape[0], dtype=torch.float64)
    oracles.assert_close(linearization.combine(weights), oracles.combine_rows(rows, weights))


# --- the algebra on rows ----------------------------------------------------------------------

ALGEBRA = named(
    "mlp", "matmul_left", "einsum_heads", "cnn", "conv2d_groups", "conv2d_depthwise",
    "conv_transpose2d", "embedding_padding", "embedding_bag_mean", "layer_norm", "group_norm",
    "batch_norm_eval", "mha", "encoder_layer_eval", "vit", "gpt_tied", "tied_linear",
    "tied_mixed_roles", "tied_linear_and_embedding", "linear_in_loop", "unused_parameter",
    "freeform", "recognised_and_free", "nested_params", "losses_per_example_and_task",
    "losses_per_task", "losses_grid", "shared_context", "prelu_per_channel", "bilinear",
    "outer_scale_and_shift", "lstm",
)  # fmt: skip


@over(ALGEBRA)
@pytest.mark.parametrize("other_size", [None, 2])
def test_cross_gramian(name: str, batch_dim: Any, other_size: int | None) -> None:
    one = truth(name)
    two = truth(name, data_seed=2, size=other_size)
    ndim = one.losses.ndim
    rows1, rows2 = (
        jd.structured(t.model_fn, one.params, t.batch, buffers=t.buffers, batch_dim=batch_dim).rows
        for t in (one, two)
    )
    wanted = oracles.cross_gramian(one.rows, two.rows, one.losses.shape, two.losses.shape)
    oracles.assert_close(jd.gram(rows1, rows2, row_ndim=ndim), wanted, what="J₁J₂ᵀ")
    oracles.assert_close(
        jd.gram(rows2, rows1, row_ndim=ndim), wanted.permute(*reversed(range(wanted.ndim)))
    )


@over(ALGEBRA)
def test_algebra_on_factored_rows(name: str, batch_dim: Any) -> None:
    t = truth(name)
    rows = jd.structured(t.model_fn, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim).rows
    oracles.assert_close(jd.gram(rows, row_ndim=t.losses.ndim), t.gramian, what="gram(rows)")
    oracles.assert_close(jd.combine(rows, t.weights), t.combined, what="combine(rows) ")


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt_tied", "losses_grid"])
def test_factored_against_dense_rows(name: str) -> None:
    t = truth(name)
    factored = jd.structured(t.model_fn, t.params, t.batch, buffers=t.buffers).rows
    for one, two in ((factored, t.rows), (t.rows, factored)):
        oracles.assert_close(jd.gram(one, two, row_ndim=t.losses.ndim), t.gramian)


# --- has_aux, ensembles, compiled -------------------------------------------------------------


@pytest.mark.parametrize("linearize", ["structured", "dense"])
@over(named("mlp", "cnn", "gpt_tied", "losses_per_example_and_task", "batch_norm_train"))
def test_aux(name: str, batch_dim: Any, linearize: str) -> None:
    t = truth(name)

    def with_aux(params: Any, buffers: Any, batch: Any) -> Any:
        losses = t.model_fn(params, buffers, batch)
        return losses, {"twice": 2 * losses}

    linearization = getattr(jd, linearize)(
        with_aux, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim, has_aux=True
    )
    check(linearization, t, linearize)
    assert torch.allclose(linearization.aux["twice"], 2 * t.losses, rtol=1e-12, atol=1e-12)


ENSEMBLES = named(
    "mlp", "matmul_left", "cnn", "conv2d_groups", "conv_transpose2d_groups", "embedding_padding",
    "layer_norm", "group_norm", "mha", "encoder_layer_eval", "gpt_tied", "tied_mixed_roles",
    "recognised_and_free", "losses_per_example_and_task", "losses_per_task", "batch_norm_eval",
)  # fmt: skip


@over(ENSEMBLES)
def test_ensemble(name: str, batch_dim: Any) -> None:
    """Under vmap over three sets of parameters, each member gets its own exact answer."""
    t = truth(name)
    generator = torch.Generator().manual_seed(11)

    def jitter(leaf: Tensor) -> Tensor:
        noise = torch.randn(3, *leaf.shape, generator=generator, dtype=leaf.dtype)
        return leaf + 0.1 * noise

    stacked = pytree.tree_map(jitter, t.params)

    def one(params: Any) -> Any:
        linearization = jd.structured(
            t.model_fn, params, t.batch, buffers=t.buffers, batch_dim=batch_dim
        )
        return linearization.gram(), linearization.combine(t.weights)

    gramians, combined = torch.func.vmap(one)(stacked)
    for i in range(3):
        member = pytree.tree_map(lambda leaf, i=i: leaf[i], stacked)
        args = (t.model_fn, member, t.buffers, t.batch)
        oracles.assert_close(gramians[i], oracles.gramian(*args), what=f"member {i} G")
        oracles.assert_close(
            pytree.tree_map(lambda leaf, i=i: leaf[i], combined),
            oracles.combine(*args, t.weights),
            what=f"member {i} Jᵀw ",
        )


@pytest.fixture
def without_fused_attention() -> Any:
    """The compiler calls the fused encoder kernel past every mode; it has no derivative."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


COMPILED = named(
    "mlp", "cnn", "embedding_padding", "layer_norm", "gpt_tied", "encoder_layer_eval",
    "losses_per_example_and_task", "losses_per_task", "no_grad_target", "inplace_relu",
    "tied_mixed_roles", "recognised_and_free",
)  # fmt: skip


@pytest.mark.compile
@over(COMPILED)
def test_compiled(name: str, batch_dim: Any, without_fused_attention: None) -> None:
    t = truth(name)
    torch.compiler.reset()

    def run(params: Any, batch: Any) -> Any:
        linearization = jd.structured(
            t.model_fn, params, batch, buffers=t.buffers, batch_dim=batch_dim
        )
        return linearization.losses, linearization.gram(), linearization.combine(t.weights)

    losses, gramian, combined = torch.compile(run, fullgraph=True, backend="aot_eager")(
        t.params, t.batch
    )
    oracles.assert_close(losses, t.losses, what="losses")
    oracles.assert_close(gramian, t.gramian, what="G")
    oracles.assert_close(combined, t.combined, what="Jᵀw ")


# --- plan -------------------------------------------------------------------------------------


@over(
    named("mlp", "cnn", "gpt_tied", "recognised_and_free", "unused_parameter", "encoder_layer_eval")
)
def test_plan_accounts_for_every_parameter(name: str, batch_dim: Any) -> None:
    t = truth(name)
    text = str(jd.plan(t.model_fn, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim))
    for key in t.params:
        assert key in text


@pytest.mark.parametrize("batch_dim", [0, None])
def test_one_parameter_as_matrices_of_two_shapes(batch_dim: Any) -> None:
    """[2, 3, 4] as [2, 12] and as [6, 4]: uses that have no common factored form."""
    params = {"w": torch.randn(2, 3, 4, dtype=torch.float64)}
    batch = (torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64))

    def model_fn(params: Any, buffers: Any, batch: Any) -> Tensor:
        x, y = batch
        first = torch.einsum("bi,ihe->bhe", x, params["w"]).flatten(1)
        return torch.cat([first, torch.einsum("bih,ihe->be", y, params["w"])], 1).square().sum(1)

    lin = jd.structured(model_fn, params, batch, batch_dim=batch_dim)
    oracles.assert_close(lin.gram(), oracles.gramian(model_fn, params, {}, batch), what="G")
    oracles.assert_close(
        jd.to_dense(lin.rows), oracles.jacobian_rows(model_fn, params, {}, batch), what="rows"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "groups": 2},
        {"kernel_size": (2, 3), "dilation": (2, 1), "padding": "same"},
        {"kernel_size": 1, "groups": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(3, 3), (7, 6)], ids=["factored", "dense"])
def test_convolutions_kept_factored_or_not(size: tuple[int, int], options: dict[str, Any]) -> None:
    """Few positions of many channels keep their patches; many of few have rows without patches."""
    channels = 24 if size == (3, 3) else 4
    conv = torch.nn.Conv2d(channels, 3 * channels, **options).double()
    params = {"w": conv.weight.detach()}
    batch = torch.randn(4, channels, *size, dtype=torch.float64)

    def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
        out = torch.func.functional_call(conv, {"weight": params["w"]}, (x,))
        return out.square().flatten(1).sum(1)

    for batch_dim in (0, None):
        lin = jd.structured(model_fn, params, batch, batch_dim=batch_dim)
        oracles.assert_close(lin.gram(), oracles.gramian(model_fn, params, {}, batch), what="G")
        oracles.assert_close(
            jd.to_dense(lin.rows), oracles.jacobian_rows(model_fn, params, {}, batch), what="rows"
        )
    lin = jd.structured(model_fn, params, batch, batch_dim=0)
    if options["kernel_size"] != 1:
        assert isinstance(lin.rows["w"], Tensor) == (size != (3, 3))


class _Product(torch.autograd.Function):
    """x Wᵀ, out of sight of every mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


@pytest.mark.compile
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_recognised_use_beside_one_out_of_sight(compiled: bool, batch_dim: Any) -> None:
    params = {"w": torch.randn(3, 5, dtype=torch.float64)}
    batch = torch.randn(4, 5, dtype=torch.float64)

    def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
        out = torch.nn.functional.linear(x, params["w"]) + _Product.apply(x, params["w"])
        return out.square().sum(1)

    def run(params: Any, batch: Tensor) -> Tensor:
        return jd.gramian(model_fn, params, batch, batch_dim=batch_dim)

    if compiled:
        torch.compiler.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    oracles.assert_close(run(params, batch), oracles.gramian(model_fn, params, {}, batch), what="G")

"""Random sketches of J: exactly J S, unbiased, as concentrated as they say, in little memory."""

from __future__ import annotations

import importlib
import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from models import BY_NAME
from test_structured_zoo import ZOO, named, over, truth
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import jdfunc as jd
from jdfunc import algebra, pytrees
from jdfunc.linearizations import sketched

implementation = importlib.import_module("jdfunc.linearizations.sketched")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the model branches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

REVERSED = {"weight_norm", "custom_function"}  # no forward-mode derivative
REFUSED = {"embedding_bag_offsets": "second derivative", "embedding_scaled_by_frequency": "freq"}


def columns(key: int, rank: int, params: Any) -> list[list[Tensor]]:
    """S, column by column."""
    keys = jd.random.bits(key, rank)
    return [implementation._signs(one, pytrees.leaves(params)) for one in keys]


def wanted_gramian(rows: Any, shape: torch.Size, key: int, rank: int, params: Any) -> Tensor:
    """(J S)(J S)ᵀ / rank with J and S as matrices."""
    jacobian = torch.cat([r.reshape(shape.numel(), -1) for r in pytrees.leaves(rows)], 1)
    signs = torch.stack(
        [torch.cat([s.flatten() for s in column]) for column in columns(key, rank, params)], 1
    )
    sketch = jacobian @ signs.to(jacobian.dtype)
    return algebra.reversed_half(sketch @ sketch.T / rank, shape, shape)


@over(ZOO)
def test_zoo(name: str, batch_dim: Any) -> None:
    """G̃ is that of J S to 1e-10, J being rows of plain autograd; losses and Jᵀw are exact."""
    t = truth(name)
    linearize = sketched(3, 5)
    if name in REFUSED:
        with (
            pytest.raises(ValueError, match=REFUSED[name]),
            pytest.warns(UserWarning, match="forward-mode") if "bag" in name else nullcontext(),
        ):
            linearize(t.model_fn, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim).gram()
        return
    lin = linearize(t.model_fn, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim)
    assert lin.rows is None
    if name in REVERSED:
        with pytest.warns(UserWarning, match="forward-mode derivative"):
            gramian = lin.gram()
    else:
        gramian = lin.gram()
    tolerance = 1e-7 if name == "hf_vit_eager" else 1e-10  # its softmax is in float32
    wanted = wanted_gramian(t.rows, t.losses.shape, 5, 3, t.params)
    oracles.assert_close(gramian, wanted, tolerance=tolerance, what="G̃")
    assert torch.allclose(lin.losses, t.losses, rtol=1e-11, atol=1e-12)
    for _ in range(2):
        oracles.assert_close(lin.combine(t.weights), t.combined, tolerance=tolerance)


@pytest.mark.parametrize("chunk_size", [2, 7])
@over(named("mlp", "cnn", "inplace", "gpt_tied", "losses_grid", "loss_scalar", "no_grad_target"))
def test_chunks(name: str, batch_dim: Any, chunk_size: int) -> None:
    t = truth(name)
    lin = sketched(5, 1, chunk_size=chunk_size)(
        t.model_fn, t.params, t.batch, buffers=t.buffers, batch_dim=batch_dim
    )
    oracles.assert_close(lin.gram(), wanted_gramian(t.rows, t.losses.shape, 1, 5, t.params))


# --- statistics -------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


#: Rows that share signs between leaves, so that leaves drawn alike would show as a bias.
SHARED = randn(3, 11, seed=1)
LINEAR = {"a": SHARED, "b": SHARED + 0.3 * randn(3, 11, seed=2), "c": randn(3, 130, seed=3)}


def linear_fn(params: Any, buffers: Any, batch: Any) -> Tensor:
    return sum(batch[k] @ params[k] for k in params)


ZEROS = {k: torch.zeros(v.shape[1], dtype=v.dtype) for k, v in LINEAR.items()}
JACOBIAN = torch.cat(list(LINEAR.values()), 1)
GRAMIAN = JACOBIAN @ JACOBIAN.T


def draws(rank: int, count: int) -> Tensor:
    """G̃ of many keys, each by its own call under vmap."""
    keys = jd.random.bits(2024, count)
    one = lambda key: sketched(rank, key)(linear_fn, ZEROS, LINEAR).gram()  # noqa: E731
    return torch.vmap(one)(keys)


def test_unbiased_and_of_the_stated_variance() -> None:
    """z-tests over 20000 keys: of the mean, 5 standard errors; of the variance, 5 in a hundred."""
    rank, count = 2, 20000
    found = draws(rank, count)
    squares = JACOBIAN.square()
    norms = GRAMIAN.diagonal()
    variance = (norms[:, None] * norms + GRAMIAN.square() - 2 * squares @ squares.T) / rank
    z = (found.mean(0) - GRAMIAN) / (variance / count).sqrt()
    assert z.abs().max() < 5
    assert (found.var(0) / variance - 1).abs().max() < 0.05


def test_entries_are_as_concentrated_as_stated() -> None:
    """Failures of the bound on all entries, beside its probability; and the example of the page."""
    rank, epsilon, count, m = 150, 0.5, 1500, 3
    lengths = GRAMIAN.diagonal().sqrt()
    errors = (draws(rank, count) - GRAMIAN).abs() / (lengths[:, None] * lengths)
    failures = float((errors.amax((1, 2)) > epsilon).double().mean())
    exponent = epsilon**2 / 4 - epsilon**3 / 6
    stated = 2 * m**2 * math.exp(-rank * exponent)
    assert stated < 0.1
    assert failures <= stated
    assert float((errors.amax((1, 2)) > epsilon / 5).double().mean()) > 0.1  # the draws do vary
    assert math.ceil(math.log(2 * 10**2 / 0.01) / exponent) == 238


def test_spectrum_is_as_concentrated_as_stated() -> None:
    rank, epsilon, count, m = 300, 0.75, 500, 3
    root = torch.linalg.inv(torch.linalg.cholesky(GRAMIAN))
    spectra = torch.linalg.eigvalsh(root @ draws(rank, count) @ root.mT)
    failures = float(((spectra - 1).abs().amax(1) > epsilon).double().mean())
    stated = 2 * 9**m * math.exp(-rank * (epsilon**2 / 16 - epsilon**3 / 48))
    assert stated < 1
    assert failures <= stated


def test_signs() -> None:
    """Entries ±1, in every dtype and shape; other for other leaves, columns and keys."""
    like = [torch.zeros(shape) for shape in ((), (0, 3), (64,), (65,), (3, 70))]
    first, second = columns(7, 2, like)
    for sign, tensor in zip(first, like, strict=True):
        assert sign.shape == tensor.shape
        assert torch.equal(sign.abs(), torch.ones_like(tensor))
    wide = torch.zeros(20000, dtype=torch.bfloat16)
    (one, other), (third, _) = columns(7, 2, [wide, wide])
    assert one.dtype == torch.bfloat16
    (changed, _), _ = columns(8, 2, [wide, wide])
    for a, b in (
        (one, other),
        (one, third),
        (one, changed),
        (one, one.roll(1)),
        (one, one.roll(64)),
    ):
        assert abs(float((a.float() * b.float()).mean())) < 5 / math.sqrt(20000)
    assert abs(float(one.float().mean())) < 5 / math.sqrt(20000)
    assert abs(float(torch.cat([first[4].flatten(), second[4].flatten()]).mean())) < 5 / 20


def test_same_draws_everywhere(device: torch.device) -> None:
    """Pinned bits: another machine, device or version must give these signs."""
    like = [torch.zeros(70, device=device), torch.zeros(5, device=device)]
    key = torch.tensor(3, device=device)
    signs = implementation._signs(jd.random.bits(key, 1)[0], like)
    text = "".join("+" if s > 0 else "-" for s in torch.cat(signs).tolist())
    assert text == PINNED


PINNED = "++++-++-+----+++----++-+--+---++-++--++--++--+---+-+---+-+--+---+---+-+++-+"


# --- behaviour --------------------------------------------------------------------------------

PARAMS = {"v": randn(2, 7, seed=1), "w": randn(7, 5, seed=2)}
BATCH = randn(4, 5, seed=3)


def model_fn(params: Any, buffers: Any, batch: Tensor) -> Tensor:
    return F.linear(F.linear(batch, params["w"]).tanh(), params["v"]).square().sum(1)


def test_memory_of_inference() -> None:
    """A deep narrow model: dense and matrix-free keep every layer, the sketch keeps two."""
    depth, batch = 40, torch.zeros(4096, 8) + 0.1
    params = [randn(8, 8, seed=i).float() / 3 for i in range(depth)]
    layer = 4 * batch.numel()

    def fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
        for w in params:
            x = torch.tanh(x @ w)
        return x.mean(0)[:3]

    modules = [nn.Parameter(p) for p in params]
    frozen = lambda p, b, x: fn([p[0], *modules[1:]], b, x)  # noqa: E731
    for deep, given in ((fn, params), (fn, modules), (frozen, params[:1])):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), LiveBytes() as live:
                sketched(4, 0)(deep, given, batch).gram()
            assert live.peak < 8 * layer, live.peak / layer
    with LiveBytes() as live:
        jd.dense(fn, params, batch)
    assert live.peak > depth * layer


def test_memory_of_one_tangent() -> None:
    params, n_bytes = {"w": torch.zeros(2**20)}, 4 * 2**20
    fn = lambda p, b, x: p["w"].reshape(4, -1).sum(1)  # noqa: E731
    for chunk_size, bound in ((1, 2.6), (4, 10)):
        with LiveBytes() as live:
            sketched(8, 0, chunk_size=chunk_size)(fn, params, None).gram()
        assert live.peak < bound * n_bytes, live.peak / n_bytes


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_random_layers_see_one_draw(batch_dim: Any, chunk_size: int) -> None:
    """Losses, sketch and direction are of one dropout mask, drawn as by one forward pass."""
    fn = lambda p, b, x: F.dropout(x @ p, 0.5).square().sum(1)  # noqa: E731
    w = randn(5, 9)
    torch.manual_seed(3)
    dense = jd.dense(fn, w, BATCH, batch_dim=batch_dim)
    torch.manual_seed(3)
    lin = sketched(6, 0, chunk_size=chunk_size)(fn, w, BATCH, batch_dim=batch_dim)
    state = torch.get_rng_state()
    assert torch.equal(lin.losses, dense.losses)
    oracles.assert_close(lin.gram(), wanted_gramian(dense.rows, BATCH.shape[:1], 0, 6, w))
    oracles.assert_close(lin.combine(BATCH[:, 0]), dense.combine(BATCH[:, 0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_reverse_mode_takes_for_constant() -> None:
    """Forward mode ignores no_grad, and writes tangents in place: neither shows."""

    def fn(params: Any, buffers: Any, batch: Tensor) -> Tensor:
        hidden = batch @ params["w"].T
        with torch.no_grad():
            target = hidden.tanh() + torch.cat([hidden, hidden])[:4]
            shifted = torch.zeros_like(hidden)
            shifted.add_(hidden)
        kept = hidden.clone()
        with torch.no_grad():
            kept.mul_(2.0)
        return ((hidden - target) * shifted).sum(1) + kept.sum(1)

    params = {"w": PARAMS["w"]}
    rows = oracles.jacobian_rows(fn, params, {}, BATCH)
    wanted = wanted_gramian(rows, BATCH.shape[:1], 0, 4, params)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            oracles.assert_close(sketched(4, 0)(fn, params, BATCH).gram(), wanted)


SUBJECTS = named("mlp", "cnn", "batch_norm_train", "inplace", "gpt_tied", "losses_grid", "gru")


@over(SUBJECTS)
def test_aux_purity_and_ensembles(name: str, batch_dim: Any) -> None:
    t = truth(name)

    def with_aux(params: Any, buffers: Any, batch: Any) -> Any:
        losses = t.model_fn(params, buffers, batch)
        return losses, {"twice": 2 * losses, "name": "aux"}

    before, state = oracles.snapshot((t.params, t.buffers, t.batch)), torch.get_rng_state()
    options = {"buffers": t.buffers, "batch_dim": batch_dim, "has_aux": True}
    lin = sketched(4, 0)(with_aux, t.params, t.batch, **options)
    assert torch.equal(lin.gram(), lin.gram())
    assert torch.allclose(lin.aux["twice"], 2 * t.losses, rtol=1e-12)
    oracles.assert_close(lin.combine(t.weights), t.combined)
    oracles.assert_untouched((t.params, t.buffers, t.batch), before)
    assert torch.equal(torch.get_rng_state(), state)

    def one(params: Any, buffers: Any, key: Tensor) -> Any:
        member = sketched(4, key)(with_aux, params, t.batch, **{**options, "buffers": buffers})
        return member.gram(), member.combine(t.weights)

    stacked = pytree.tree_map(lambda p: torch.stack([p, p + 0.1 * p.sin()]), t.params)
    buffers = pytree.tree_map(lambda b: torch.stack([b, b]), t.buffers)
    gramians, combined = torch.vmap(one)(stacked, buffers, torch.tensor([3, 4]))
    for i in range(2):
        member, direction = (
            pytree.tree_map(lambda v, i=i: v[i], tree) for tree in (stacked, combined)
        )
        rows = oracles.jacobian_rows(t.model_fn, member, t.buffers, t.batch)
        wanted = wanted_gramian(rows, t.losses.shape, 3 + i, 4, member)
        oracles.assert_close(gramians[i], wanted, tolerance=1e-9)
        oracles.assert_close(direction, oracles.combine_rows(rows, t.weights), tolerance=1e-9)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_inside_grad(batch_dim: Any) -> None:
    """∇ of |G̃|² and of |Jᵀw|²: those of dense rows and the same signs."""

    def objective(params: Any, linearize: Any) -> Tensor:
        lin = linearize(model_fn, params, BATCH, batch_dim=batch_dim)
        if lin.rows is None:
            gramian = lin.gram()
        else:
            gramian = wanted_gramian(lin.rows, BATCH.shape[:1], 0, 3, PARAMS)
        combined = lin.combine(BATCH[:, 0])
        return gramian.square().sum() + sum(g.square().sum() for g in combined.values())

    wanted = torch.func.grad(objective)(PARAMS, jd.dense)
    oracles.assert_close(torch.func.grad(objective)(PARAMS, sketched(3, 0)), wanted)
    leaves = {k: v.clone().requires_grad_() for k, v in PARAMS.items()}
    outside = torch.autograd.grad(objective(leaves, sketched(3, 0)), list(leaves.values()))
    oracles.assert_close(dict(zip(leaves, outside, strict=True)), wanted)


def test_a_step() -> None:
    """UPGrad on a wide sketch is near UPGrad on G; module parameters leave no graph."""
    info, _ = jd.value_and_jd_step(
        model_fn, PARAMS, BATCH, linearize=sketched(2000, 1, chunk_size=500)
    )
    exact, _ = jd.value_and_jd_step(model_fn, PARAMS, BATCH)
    oracles.assert_close(info.gramian, exact.gramian, tolerance=0.1)
    params = {k: nn.Parameter(v) for k, v in PARAMS.items()}
    info, grads = jd.value_and_jd_step(model_fn, params, BATCH, linearize=sketched(8, 1))
    assert not any(x.requires_grad for x in (info.losses, info.gramian, *grads.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precisions(dtype: torch.dtype) -> None:
    params = {k: v.to(dtype) for k, v in PARAMS.items()}
    lin = sketched(8, 0)(model_fn, params, BATCH.to(dtype))
    assert lin.gram().dtype == torch.float32
    rows = oracles.jacobian_rows(model_fn, PARAMS, {}, BATCH)
    wanted = wanted_gramian(rows, BATCH.shape[:1], 0, 8, PARAMS)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-5}[dtype]
    oracles.assert_close(lin.gram().double(), wanted, tolerance=tolerance)
    assert {g.dtype for g in lin.combine(torch.ones(4)).values()} == {dtype}


def test_errors() -> None:
    for rank in (0, -1):
        with pytest.raises(ValueError, match="rank"):
            sketched(rank, 0)
    for rank in (1.5, True, None):
        with pytest.raises(TypeError, match="rank"):
            sketched(rank, 0)
    with pytest.raises(ValueError, match="chunk_size"):
        sketched(4, 0, chunk_size=0)
    for key in (0.5, torch.tensor(1.0), None):
        with pytest.raises(TypeError, match="key"):
            sketched(4, key)
    with pytest.raises(ValueError, match=r"key.*\(2,\)"):
        sketched(4, torch.tensor([1, 2]))
    linearize = sketched(4, 0)
    with pytest.raises(ValueError, match="metric"):
        jd.jd_step(model_fn, PARAMS, BATCH, linearize=linearize, metric=lambda tree: tree)
    with pytest.raises(ValueError, match=r"\(4,\)"):
        linearize(model_fn, PARAMS, BATCH).combine(torch.ones(3))
    constant = linearize(lambda p, b, x: x.sum(1), PARAMS, BATCH)
    for call in (constant.gram, partial(constant.combine, torch.ones(4))):
        with pytest.raises(ValueError, match=r"(?s)losses.*params"):
            call()
    coupled = lambda p, b, x: model_fn(p, b, x - x.mean(0))  # noqa: E731
    with pytest.raises(ValueError, match="one example"):
        linearize(coupled, PARAMS, BATCH, batch_dim=0)
    case = BY_NAME["batch_norm_train"].build()
    with pytest.raises(ValueError, match="batch_norm"):
        linearize(case[0], case[1], case[3], buffers=case[2], batch_dim=0)
    lin = linearize(lambda p, b, x: x.sum(1), {}, BATCH)
    assert torch.equal(lin.gram().double(), torch.zeros(4, 4, dtype=torch.float64))
    assert lin.combine(torch.ones(4)) == {}
    for batch_dim in (0, None):
        empty = linearize(model_fn, PARAMS, BATCH[:0], batch_dim=batch_dim)
        assert empty.gram().shape == (0, 0)
        oracles.assert_close(
            empty.combine(empty.losses), {k: torch.zeros_like(v) for k, v in PARAMS.items()}
        )


@pytest.mark.compile
@pytest.mark.parametrize("batch_dim", [0, None])
def test_compiled(batch_dim: Any) -> None:
    """The eager sketch, from a key that is a tensor: a new one does not compile anew."""

    def run(params: Any, batch: Tensor, key: Tensor) -> Any:
        lin = sketched(2, key)(model_fn, params, batch, batch_dim=batch_dim)
        return lin.losses, lin.gram(), lin.combine(batch[:, 0])

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    first, second = torch.tensor(1), torch.tensor(2)
    oracles.assert_close(compiled(PARAMS, BATCH, first), run(PARAMS, BATCH, first))
    with torch._dynamo.config.patch(error_on_recompile=True):
        oracles.assert_close(compiled(PARAMS, -BATCH, second), run(PARAMS, -BATCH, second))

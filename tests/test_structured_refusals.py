"""batch_dim=0 is a claim: where it is false the caller gets a ValueError, never a wrong number."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from models import BY_NAME, ZOO, Fn, module_case, randn, readout
from torch import Tensor, nn

import jdfunc as jd


def _marked(n: int) -> Tensor:
    """Five features, of which the first is the number of the example."""
    return torch.cat([torch.arange(n)[:, None].double(), randn(n, 4)], 1)


def _coupled(losses: Any, make: Any = None, data: Any = None, **kwargs: Any) -> Any:
    make = make or (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))
    return module_case("coupled", make, data or _marked, losses, size=5, **kwargs).build()


def per_example(apply: Any, x: Tensor) -> Tensor:
    return readout(apply(x))


def minus_mean(apply: Any, x: Tensor) -> Tensor:
    losses = per_example(apply, x)
    return losses - losses.mean()


def over_batch_size(apply: Any, x: Tensor) -> Tensor:
    return per_example(apply, x) / x.shape[0]


def cross_attention(apply: Any, x: Tensor) -> Tensor:
    z = apply(x)[None]  # the batch is read as one sequence
    return readout(F.scaled_dot_product_attention(z, z, z)[0])


def batch_softmax(apply: Any, x: Tensor) -> Tensor:
    return readout(apply(x).softmax(0))


def rolled(apply: Any, x: Tensor) -> Tensor:
    return readout(apply(x) * x.roll(1, 0)[:, :3])


def cumulative(apply: Any, x: Tensor) -> Tensor:
    return readout(apply(x).cumsum(0))


def folded_wrongly(apply: Any, x: Tensor) -> Tensor:
    return readout(apply(x).T.reshape(x.shape[0], -1))  # mixes examples


def one_pair(apply: Any, x: Tensor) -> Tensor:
    """Only example 1 sees another, example 4; both carry a mark, wherever they stand."""
    one, four = x[:, 0] == 1, x[:, 0] == 4
    return per_example(apply, x) + one * (apply(x).sum(1) * four).sum()


def class_balanced(apply: Any, x: Tensor) -> Tensor:
    """Divided by the number of examples of one class; first and last are of different ones."""
    kinds = (x[:, 0] / 2).round()
    return per_example(apply, x) / (kinds[:, None] == kinds).sum(1)


def hard_examples(apply: Any, x: Tensor) -> Tensor:
    """Only losses from the median up count: all, of one example and of two."""
    losses = per_example(apply, x)
    return losses * (losses >= losses.median())


def whole_batch_norm(apply: Any, x: Tensor) -> Tensor:
    z = apply(x)
    return readout((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt())


VALUES = [
    minus_mean,
    over_batch_size,
    cross_attention,
    batch_softmax,
    rolled,
    cumulative,
    folded_wrongly,
    one_pair,
    class_balanced,
    hard_examples,
    whole_batch_norm,
]


def through_gradient_only(apply: Any, x: Tensor) -> Tensor:
    """Values are those of independent losses; gradients are not."""
    losses = per_example(apply, x)
    return losses + losses.mean() - losses.mean().detach()


CALLS = [
    pytest.param(lambda *a, **k: jd.structured(*a, **k), id="structured"),
    pytest.param(lambda *a, **k: jd.gramian(*a, **k), id="gramian"),
    pytest.param(lambda *a, **k: jd.jd_step(*a, weighting=jd.mean, **k), id="jd_step"),
    pytest.param(lambda *a, **k: jd.check_batch_independence(*a, **k), id="check"),
]


def test_a_coupling_of_gradients_alone_is_found_by_the_check() -> None:
    """No forward pass shows it, so no step does: `check_batch_independence` and `plan` do."""
    model_fn, params, buffers, batch = _coupled(through_gradient_only)
    for check in (jd.check_batch_independence, partial(jd.plan, batch_dim=0)):
        with pytest.raises(ValueError, match="gradients of the 5 examples"):
            check(model_fn, params, batch, buffers=buffers)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("losses", VALUES, ids=lambda f: f.__name__)
def test_coupled_losses_are_refused(losses: Any, call: Any) -> None:
    model_fn, params, buffers, batch = _coupled(losses)
    with pytest.raises(ValueError, match=r"(?s)(?i)(example|losses\[).*\d") as caught:
        call(model_fn, params, batch, buffers=buffers, batch_dim=0)
    assert "batch_dim" in str(caught.value)


@pytest.mark.parametrize("losses", [*VALUES, through_gradient_only], ids=lambda f: f.__name__)
def test_coupled_losses_are_right_without_batch_dim(losses: Any) -> None:
    model_fn, params, buffers, batch = _coupled(losses)
    wanted = oracles.gramian(model_fn, params, buffers, batch)
    oracles.assert_close(jd.gramian(model_fn, params, batch, buffers=buffers), wanted)


@pytest.mark.parametrize("losses", VALUES, ids=lambda f: f.__name__)
def test_dense_is_right_or_refuses(losses: Any) -> None:
    model_fn, params, buffers, batch = _coupled(losses)
    try:
        got = jd.dense(model_fn, params, batch, buffers=buffers, batch_dim=0).gram()
    except ValueError:
        return
    oracles.assert_close(got, oracles.gramian(model_fn, params, buffers, batch))


def test_the_pair_is_named() -> None:
    model_fn, params, buffers, batch = _coupled(one_pair)
    with pytest.raises(ValueError, match=r"(?s)\b1\b.*\b4\b|\b4\b.*\b1\b"):
        jd.check_batch_independence(model_fn, params, batch, buffers=buffers)


BATCH_STATISTICS = {
    "BatchNorm1d": lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)),
    "BatchNorm1d_untracked_eval": lambda: nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7, track_running_stats=False)
    ).eval(),
    "BatchNorm1d_no_affine": lambda: nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7, affine=False)
    ),
    "BatchNorm1d_on_sequences": lambda: nn.Sequential(
        nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.BatchNorm1d(2)
    ),
    "BatchNorm2d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 2, (1, 3)), nn.BatchNorm2d(2)
    ),
    "functional": lambda: Fn(
        lambda self, x: F.batch_norm(self.linear(x), None, None, training=True),
        linear=nn.Linear(5, 7),
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", BATCH_STATISTICS)
def test_batch_statistics_are_refused_by_name(kind: str, call: Any) -> None:
    model_fn, params, buffers, batch = _coupled(
        per_example, BATCH_STATISTICS[kind], train="eval" not in kind
    )
    with pytest.raises(ValueError, match=r"(?i)batch_?norm") as caught:
        call(model_fn, params, batch, buffers=buffers, batch_dim=0)
    assert "batch_dim" in str(caught.value)


def test_batch_norm_written_into_the_given_buffers_is_refused_too() -> None:
    """The README form, without a copy of the buffers."""
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).double()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    before = oracles.snapshot(buffers)

    def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return readout(torch.func.functional_call(model, (params, buffers), (x,)))

    with pytest.raises(ValueError, match=r"(?i)batch_?norm"):
        jd.jd_step(model_fn, params, randn(5, 5), buffers=buffers, batch_dim=0)
    oracles.assert_untouched(buffers, before)


@pytest.mark.parametrize("call", CALLS)
def test_losses_without_an_example_axis_are_refused(call: Any) -> None:
    for losses in (
        lambda apply, x: per_example(apply, x).mean(),
        lambda apply, x: per_example(apply, x).mean()[None],
        lambda apply, x: apply(x).mean(0),  # [3] losses of 5 examples
        lambda apply, x: apply(x).T,  # examples along the second dimension
    ):
        model_fn, params, buffers, batch = _coupled(losses)
        with pytest.raises(ValueError, match=r"(?i)losses"):
            call(model_fn, params, batch, buffers=buffers, batch_dim=0)


@pytest.mark.parametrize("call", CALLS)
def test_as_many_tasks_as_examples_is_refused(call: Any) -> None:
    """[B] losses that are really [K] task losses with K = B: shapes alone cannot tell."""
    model_fn, params, buffers, batch = _coupled(
        lambda apply, x: apply(x).square().mean(0), lambda: nn.Linear(5, 5)
    )
    with pytest.raises(ValueError, match="batch_dim"):
        call(model_fn, params, batch, buffers=buffers, batch_dim=0)


@pytest.mark.parametrize("batch_dim", [1, -1])
def test_examples_along_another_axis(batch_dim: int) -> None:
    model_fn, params, buffers, batch = _coupled(lambda apply, x: readout(apply(x.T)), data=_columns)
    got = jd.gramian(model_fn, params, batch, buffers=buffers, batch_dim=batch_dim)
    oracles.assert_close(got, oracles.gramian(model_fn, params, buffers, batch))
    jd.check_batch_independence(model_fn, params, batch, buffers=buffers, batch_dim=batch_dim)


def _columns(n: int) -> Tensor:
    return randn(5, n + 2)  # [features, examples]


@pytest.mark.parametrize("batch_dim", [2, -3])
def test_the_wrong_axis_is_refused(batch_dim: int) -> None:
    model_fn, params, buffers, batch = _coupled(lambda apply, x: readout(apply(x.T)), data=_columns)
    with pytest.raises(ValueError, match="batch_dim|example"):
        jd.gramian(model_fn, params, batch, buffers=buffers, batch_dim=batch_dim)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("overwrite", ["input", "view", "base"])
def test_an_activation_overwritten_after_its_use_is_refused(
    overwrite: str, batch_dim: int | None
) -> None:
    """Plain autograd refuses it too; recorded activations would silently be the new values."""

    def losses(apply: Any, x: Tensor) -> Tensor:
        x = x.clone()
        inner = x[:, :5] if overwrite == "base" else x
        out = apply(inner)
        if overwrite == "view":
            x[:, 1:3].mul_(2)
        else:
            x.mul_(2)
        return readout(out)

    model_fn, params, buffers, batch = _coupled(losses, lambda: nn.Linear(5, 3))
    with pytest.raises(RuntimeError, match="inplace operation"):
        oracles.jacobian_rows(model_fn, params, buffers, batch)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)in.?place"):
        jd.gramian(model_fn, params, batch, buffers=buffers, batch_dim=batch_dim)


@pytest.mark.compile
@pytest.mark.parametrize("batch_dim", [0, None])
def test_an_overwritten_activation_is_refused_or_right_when_compiled(
    batch_dim: int | None,
) -> None:
    def losses(apply: Any, x: Tensor) -> Tensor:
        x = x.clone()
        out = apply(x)
        x.mul_(2)
        return readout(out)

    model_fn, params, buffers, batch = _coupled(losses, lambda: nn.Linear(5, 3))

    def wanted_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return readout(F.linear(x, params["weight"], params["bias"]))

    torch.compiler.reset()
    compiled = torch.compile(
        lambda p, x: jd.gramian(model_fn, p, x, buffers=buffers, batch_dim=batch_dim),
        fullgraph=True,
        backend="aot_eager",
    )
    try:
        got = compiled(params, batch)
    except (ValueError, RuntimeError) as error:
        assert re.search("(?i)in.?place", str(error))  # noqa: PT017
    else:
        oracles.assert_close(got, oracles.gramian(wanted_fn, params, {}, batch))


@pytest.mark.parametrize("batch_dim", ["0", 0.0, True, [0]])
def test_batch_dim_of_the_wrong_kind(batch_dim: Any) -> None:
    model_fn, params, buffers, batch = _coupled(per_example)
    with pytest.raises((ValueError, TypeError), match="batch_dim"):
        jd.gramian(model_fn, params, batch, buffers=buffers, batch_dim=batch_dim)


@pytest.mark.parametrize("name", [c.name for c in ZOO if 0 in c.batch_dims and not c.slow])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func.jvp
def test_independent_losses_pass_the_check(name: str) -> None:
    model_fn, params, buffers, batch = BY_NAME[name].build()
    jd.check_batch_independence(model_fn, params, batch, buffers=buffers)


def test_shared_leaves_pass_the_check() -> None:
    model_fn, params, buffers, batch = BY_NAME["shared_context"].build()
    jd.check_batch_independence(model_fn, params, batch, buffers=buffers, batch_dim=(0, None))


def test_one_example_passes_the_check() -> None:
    model_fn, params, buffers, batch = BY_NAME["mlp"].build(size=1)
    jd.check_batch_independence(model_fn, params, batch, buffers=buffers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_coupling(dtype: torch.dtype) -> None:
    """A wide model in low precision: batched and single runs round differently."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(257, 131), nn.ReLU(), nn.Linear(131, 3)).to(dtype)
        x, y = torch.randn(31, 257).to(dtype), torch.randint(0, 3, (31,))
    params = {k: v.detach() for k, v in model.named_parameters()}

    def model_fn(params: Any, buffers: Any, batch: Any) -> Tensor:
        logits = torch.func.functional_call(model, params, (batch[0],))
        return F.cross_entropy(logits, batch[1], reduction="none")

    jd.check_batch_independence(model_fn, params, (x, y))
    assert jd.gramian(model_fn, params, (x, y), batch_dim=0).isfinite().all()


@pytest.mark.parametrize("linearize", [jd.structured, jd.dense], ids=["structured", "dense"])
def test_coupled_losses_are_nan_under_vmap(linearize: Any) -> None:
    """An outer vmap hides what an error would need: no number rather than a wrong one."""
    for losses, coupled in ((per_example, False), (class_balanced, True)):
        model_fn, params, buffers, batch = _coupled(losses)

        def step(params: Any, model_fn: Any = model_fn, batch: Any = batch) -> Any:
            return jd.value_and_jd_step(model_fn, params, batch, batch_dim=0, linearize=linearize)

        info, grads = torch.func.vmap(step)({k: torch.stack([v, v]) for k, v in params.items()})
        for value in (info.losses, info.gramian, *grads.values()):
            assert bool(value.isnan().all()) == coupled
            assert bool(value.isfinite().all()) == (not coupled)


@pytest.mark.compile
@pytest.mark.parametrize("linearize", [jd.structured, jd.dense], ids=["structured", "dense"])
def test_coupled_losses_are_nan_when_compiled(linearize: Any) -> None:
    torch.compiler.reset()
    model_fn, params, buffers, batch = _coupled(class_balanced)
    step = partial(jd.jd_step, model_fn, batch_dim=0, linearize=linearize, weighting=jd.mean)
    grads = torch.compile(step, fullgraph=True, backend="aot_eager")(params, batch)
    assert all(bool(grad.isnan().all()) for grad in grads.values())


@pytest.mark.parametrize("batch_dim", [0, None])
def test_an_overwritten_input_of_the_first_layer_is_refused(batch_dim: Any) -> None:
    """Autograd does not look at it: nothing before this layer is differentiated."""

    def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
        copy = x.clone()
        out = F.linear(copy, params["w"])
        copy.add_(1.0)
        return out.square().sum(1)

    with pytest.raises(ValueError, match="input of linear with parameter 'w' .* in place"):
        jd.gramian(model_fn, {"w": randn(3, 5)}, randn(4, 5), batch_dim=batch_dim)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("linearize", [jd.structured, jd.dense])
def test_packed_sequences_are_refused(kind: Any, linearize: Any) -> None:
    """No transform of torch.func can run them: batch_sizes are read by the kernel."""
    net = kind(3, 2).double()
    params = {name: param.detach() for name, param in net.named_parameters()}
    sizes = torch.tensor([2, 2, 1])

    def model_fn(params: Any, buffers: Any, batch: Tensor) -> Tensor:
        found = []
        for x in batch:
            packed = nn.utils.rnn.PackedSequence(x, sizes)
            found.append(torch.func.functional_call(net, params, (packed,))[0].data.sum())
        return torch.stack(found)

    batch = randn(4, 5, 3)
    with pytest.raises(RuntimeError, match="data pointer"):  # else they need not be refused
        torch.func.grad(lambda p: model_fn(p, {}, batch).sum())(params)
    with pytest.raises(ValueError, match="padded"):
        jd.gramian(model_fn, params, batch, batch_dim=0, linearize=linearize)

"""Between modules and pure functions: model_to_function, assign_grads."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jdfunc as jd

F64 = torch.float64


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


class Tied(nn.Module):
    """One weight under two names, one buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("same", self.scale)

    def forward(self, index: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.head(self.embed(index) * self.scale).sum(-2) + shift


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()


# --- model_to_function ------------------------------------------------------------------------


def test_values_and_names() -> None:
    module, x = normalised().eval(), randn(6, 4)
    apply_fn, params, buffers = jd.model_to_function(module)
    assert list(params) == [name for name, _ in module.named_parameters()]
    assert list(buffers) == [name for name, _ in module.named_buffers()]
    outputs, new_buffers = apply_fn(params, buffers, x)
    assert torch.equal(outputs, module(x))
    assert all(torch.equal(new_buffers[name], buffers[name]) for name in buffers)
    other = {name: 2 * p for name, p in params.items()}
    wanted = torch.func.functional_call(module, other, (x,))
    assert torch.equal(apply_fn(other, buffers, x)[0], wanted)
    assert not torch.equal(apply_fn(other, buffers, x)[0], outputs)


def test_params_share_memory_and_carry_no_graph() -> None:
    module = normalised()
    _, params, buffers = jd.model_to_function(module)
    for name, own in [*module.named_parameters(), *module.named_buffers()]:
        held = {**params, **buffers}[name]
        assert held.data_ptr() == own.data_ptr()
        assert not held.requires_grad
        assert type(held) is Tensor


def test_arguments_by_name_and_aux_outputs() -> None:
    module = Tied().double()
    apply_fn, params, buffers = jd.model_to_function(module)
    index = torch.randint(0, 6, (3, 2))
    assert torch.equal(apply_fn(params, buffers, index, shift=1.0)[0], module(index, shift=1.0))
    lstm = nn.LSTM(3, 2).double()
    apply_fn, params, buffers = jd.model_to_function(lstm)
    (out, (hidden, cell)), new_buffers = apply_fn(params, buffers, x := randn(4, 3))
    wanted, (wanted_hidden, wanted_cell) = lstm(x)
    assert new_buffers == {}
    for got, want in ((out, wanted), (hidden, wanted_hidden), (cell, wanted_cell)):
        assert torch.equal(got, want)


def test_tied_parameters_appear_once_and_are_tied() -> None:
    module, index = Tied().double(), torch.randint(0, 6, (3, 2))
    apply_fn, params, buffers = jd.model_to_function(module)
    assert list(params) == ["embed.weight"]
    new = {"embed.weight": randn(6, 4)}
    outputs, _ = apply_fn(new, buffers, index)
    weight = new["embed.weight"]
    wanted = F.linear(F.embedding(index, weight) * 2, weight).sum(-2)
    torch.testing.assert_close(outputs, wanted, rtol=1e-12, atol=1e-12)
    # Under its second name it is the same parameter.
    assert torch.equal(apply_fn({"head.weight": weight}, buffers, index)[0], outputs)
    # Both uses count in the gradient.
    rows = jd.structured(
        lambda p, b, x: apply_fn(p, b, x)[0].square().sum(1), params, index, buffers=buffers
    ).rows

    def by_hand(p: Any, b: Any, x: Tensor) -> Tensor:
        w = p["embed.weight"]
        return F.linear(F.embedding(x, w) * 2, w).sum(-2).square().sum(1)

    oracles.assert_close(jd.to_dense(rows), oracles.jacobian_rows(by_hand, params, {}, index))


def test_parameters_left_out_keep_their_own_values() -> None:
    module, x = normalised().eval(), randn(6, 4)
    apply_fn, params, buffers = jd.model_to_function(module)
    part = {"2.weight": params["2.weight"] + 1}
    wanted = torch.func.functional_call(module, part, (x,))
    assert torch.equal(apply_fn(part, buffers, x)[0], wanted)
    grads = torch.func.grad(lambda p: apply_fn(p, buffers, x)[0].square().sum())(part)
    assert list(grads) == ["2.weight"]


def test_batch_norm_hands_back_its_statistics() -> None:
    module, x = normalised(), randn(6, 4)
    apply_fn, params, buffers = jd.model_to_function(module)
    before = oracles.snapshot((params, buffers, dict(module.named_buffers())))
    outputs, once = apply_fn(params, buffers, x)
    outputs_again, once_again = apply_fn(params, buffers, x)
    _, twice = apply_fn(params, once, x)
    oracles.assert_untouched((params, buffers, dict(module.named_buffers())), before)
    oracles.assert_close(outputs, outputs_again)
    oracles.assert_close(once["1.running_mean"], once_again["1.running_mean"])
    assert int(once["1.num_batches_tracked"]) == 1
    assert int(twice["1.num_batches_tracked"]) == 2
    own = module(x)  # now the module itself writes to its buffers
    oracles.assert_close(outputs, own.detach())
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, once[name]), name


def test_the_mode_is_read_at_each_call() -> None:
    module, x = normalised(), randn(6, 4)
    apply_fn, params, buffers = jd.model_to_function(module)
    trained, new_buffers = apply_fn(params, buffers, x)
    module.eval()
    evaluated, same_buffers = apply_fn(params, buffers, x)
    assert not torch.equal(trained, evaluated)
    assert int(new_buffers["1.num_batches_tracked"]) == 1
    assert int(same_buffers["1.num_batches_tracked"]) == 0


def test_a_training_loop_with_batch_norm() -> None:
    """Losses of two tasks, statistics carried by hand."""
    module = normalised()
    apply_fn, params, buffers = jd.model_to_function(module)
    x, y = randn(12, 4), randn(12, 3)

    def model_fn(params: Any, buffers: Any, batch: Any) -> Any:
        outputs, new_buffers = apply_fn(params, buffers, batch[0])
        return (outputs - batch[1]).square().mean(0)[:2], new_buffers

    first = None
    for _ in range(20):
        info, grads = jd.value_and_jd_step(model_fn, params, (x, y), buffers=buffers, has_aux=True)
        params = {name: p - 0.1 * grads[name] for name, p in params.items()}
        buffers = info.aux
        first = info.losses if first is None else first
    assert int(buffers["1.num_batches_tracked"]) == 20
    assert (info.losses < first).all()
    assert int(dict(module.named_buffers())["1.num_batches_tracked"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, b: ({**p, "3.weight": randn(2, 2)}, b), r"param.*unknown names \['3.weight'\]"),
        (
            lambda p, b: ({**p, "0.weight": randn(4, 5)}, b),
            r"'0.weight' of shape \(5, 4\).*\(4, 5\)",
        ),
        (lambda p, b: (p, {**b, "extra": randn(1)}), r"buffer.*unknown names \['extra'\]"),
        (
            lambda p, b: (p, {k: v for k, v in b.items() if "mean" not in k}),
            r"missing.*running_mean",
        ),
        (lambda p, b: (p, {**b, "1.running_mean": randn(4)}), r"buffer '1.running_mean' of shape"),
        (lambda p, b: (b, p), "unknown names"),
        (lambda p, b: (p, {}), "missing names"),
    ],
)
def test_wrong_names_and_shapes(change: Any, message: str) -> None:
    apply_fn, params, buffers = jd.model_to_function(normalised())
    with pytest.raises(ValueError, match=message):
        apply_fn(*change(params, buffers), randn(6, 4))


@pytest.mark.parametrize("thing", [nn.Linear, torch.sin, {}, None])
def test_not_a_module(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        jd.model_to_function(thing)


def test_under_vmap_over_params() -> None:
    module, x = normalised(), randn(6, 4)
    apply_fn, params, buffers = jd.model_to_function(module)
    stacked = {name: torch.stack([p, p + 1]) for name, p in params.items()}
    statistics = {name: torch.stack([b, b + 1]) for name, b in buffers.items()}
    outputs, new_buffers = torch.vmap(lambda p, b: apply_fn(p, b, x))(stacked, statistics)
    for k in range(2):
        one = ({n: t[k] for n, t in tree.items()} for tree in (stacked, statistics))
        wanted, wanted_buffers = apply_fn(*one, x)
        torch.testing.assert_close(outputs[k], wanted)
        torch.testing.assert_close(
            new_buffers["1.running_mean"][k], wanted_buffers["1.running_mean"]
        )


# --- assign_grads -----------------------------------------------------------------------------


def test_assign_to_a_module() -> None:
    module = normalised()
    grads = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    assert jd.assign_grads(module, grads) is None
    for name, param in module.named_parameters():
        assert torch.equal(param.grad, grads[name])


def test_parameters_that_are_not_named_are_left_alone() -> None:
    module = normalised()
    old = torch.ones(5, 4, dtype=F64)
    module[0].weight.grad = old
    jd.assign_grads(module, {"2.bias": torch.ones(3, dtype=F64)})
    assert module[0].weight.grad is old
    assert module[2].weight.grad is None
    assert torch.equal(module[2].bias.grad, torch.ones(3, dtype=F64))


def test_an_old_gradient_is_replaced_not_added_to() -> None:
    module = nn.Linear(2, 1, bias=False)
    for value in (1.0, 3.0):
        jd.assign_grads(module, {"weight": torch.full((1, 2), value)})
    assert torch.equal(module.weight.grad, torch.full((1, 2), 3.0))


def test_assign_to_a_tied_module() -> None:
    for name in ("embed.weight", "head.weight"):
        module = Tied()
        jd.assign_grads(module, {name: torch.ones(6, 4)})
        assert torch.equal(module.head.weight.grad, torch.ones(6, 4))


def test_assign_to_a_tree() -> None:
    params = {"b": [randn(3), (randn(2, 2),)], "a": randn()}
    grads = {"a": randn(), "b": [randn(3), (randn(2, 2),)]}
    jd.assign_grads(params, grads)
    assert params["a"].grad is grads["a"]
    assert params["b"][0].grad is grads["b"][0]
    assert params["b"][1][0].grad is grads["b"][1][0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_take_the_dtype_of_the_parameter(dtype: torch.dtype) -> None:
    module = nn.Linear(2, 1).to(dtype)
    jd.assign_grads(module, {"weight": randn(1, 2), "bias": randn(1)})
    assert module.weight.grad.dtype == module.bias.grad.dtype == dtype


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_any_optimiser_takes_the_step_in_one_line(optimiser: Any) -> None:
    """With equal weights it is the optimiser's own step on the mean loss."""
    modules = [normalised().eval() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    x, y = randn(6, 4), randn(6, 3)
    apply_fn, _, buffers = jd.model_to_function(modules[0])

    def model_fn(params: Any, buffers: Any, batch: Any) -> Tensor:
        return (apply_fn(params, buffers, batch[0])[0] - batch[1]).square().sum(1)

    optimisers = [optimiser(m.parameters(), lr=0.1) for m in modules]
    for _ in range(3):
        params = dict(modules[0].named_parameters())
        grads = jd.jd_step(
            model_fn, params, (x, y), buffers=buffers, weighting=jd.mean, batch_dim=0
        )
        jd.assign_grads(modules[0], grads)
        optimisers[0].step()
        optimisers[1].zero_grad()
        (modules[1](x) - y).square().sum(1).mean().backward()
        optimisers[1].step()
    for one, two in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"weight": torch.ones(1, 2), "nothing": torch.ones(1)}, r"nothing.*bias.*weight"),
        ({"bias": torch.ones(1), "weight": torch.ones(2, 1)}, r"\(1, 2\) for weight, got \(2, 1\)"),
        ({"bias": torch.ones(())}, r"shape \(1,\) for bias, got \(\)"),
        ([torch.ones(1, 2), torch.ones(1)], "dict by parameter name, got list"),
    ],
)
def test_errors_of_a_module_assign_nothing(grads: Any, message: str) -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=message):
        jd.assign_grads(module, grads)
    assert module.weight.grad is None
    assert module.bias.grad is None


@pytest.mark.parametrize(
    "grads",
    [
        {"a": torch.ones(2)},
        [torch.ones(2), torch.ones(3)],
        {"a": torch.ones(2), "c": torch.ones(3)},
    ],
)
def test_errors_of_a_tree(grads: Any) -> None:
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(ValueError, match="structure"):
        jd.assign_grads(params, grads)
    with pytest.raises(ValueError, match=r"\(3,\) for b, got \(2,\)"):
        jd.assign_grads(params, {"a": torch.ones(2), "b": torch.ones(2)})
    assert params["a"].grad is None

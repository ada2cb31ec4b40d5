"""The judge is judged: closed forms, and two independent ways to each of its matrices."""

import itertools

import oracle
import pytest
import torch
from nets import NETS
from torch import Tensor

from jdfunc import pytrees

HOOKED = [net for net in NETS.values() if net.module]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}  # float64 sums of a few hundred numbers of order one
OPTIONS = {
    "plain": {},
    "weight": {"weight": torch.tensor([0.3, 1.7, 0.8], dtype=torch.float64)},
    "ignore": {"ignore_index": 1},
    "smoothing": {"label_smoothing": 0.2},
}


def linear(size: int = 5):
    """A linear model [2 -> 3] without a bias, whose Hessian is its Gauss-Newton matrix."""
    torch.manual_seed(0)
    x, weight = torch.randn(size, 2).double(), torch.randn(3, 2).double()
    return lambda params, buffers, inputs: inputs @ params["w"].mT, {"w": weight}, {}, x


def test_linear_model_in_closed_form():
    problem = linear()
    x, out = problem[3], problem[3] @ problem[1]["w"].mT
    y = torch.tensor([0, 2, 1, 1, 0])
    p = out.softmax(1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    exact = sum(torch.kron(h, torch.outer(row, row)) for h, row in zip(hessians, x, strict=True))
    torch.testing.assert_close(
        oracle.ggn(problem, oracle.cross_entropy(), y, "mean"), exact / 5, **CLOSE
    )
    squared = 2 * torch.kron(torch.eye(3), x.mT @ x)
    found = oracle.ggn(problem, oracle.mse(), out + 1, "mean")
    torch.testing.assert_close(found, squared / 15, **CLOSE)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_model_has_the_hessian_of_torchs_loss(options, reduction):
    problem, loss = linear(), oracle.cross_entropy(**options)
    apply, params, buffers, inputs = problem
    y = torch.tensor([0, 2, 1, 1, 0])

    def total(flat: Tensor) -> Tensor:
        return loss.total(apply({"w": flat.reshape(3, 2)}, buffers, inputs), y, reduction)

    exact = torch.func.jacrev(torch.func.jacrev(total))(params["w"].flatten())
    torch.testing.assert_close(oracle.ggn(problem, loss, y, reduction), exact, **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "cnn", "embedding", "attention_tokens", "tied_modules"])
def test_jacobian_is_that_of_jacrev(name):
    problem = NETS[name].build()
    apply, params, buffers, inputs = problem
    values, restore = pytrees.flatten(params)
    jac = torch.func.jacrev(lambda leaves: apply(restore(leaves), buffers, inputs))(values)
    out, found = oracle.jacobian(problem)
    exact = torch.cat([j.flatten(out.ndim) for j in jac], -1).flatten(1, -2)
    torch.testing.assert_close(found, exact, **CLOSE)


@pytest.mark.parametrize("loss", oracle.LOSSES.values(), ids=oracle.LOSSES)
@pytest.mark.parametrize("name", ["mlp", "attention_tokens"])
def test_hessians_and_their_vectors_give_one_matrix(name, loss):
    problem = NETS[name].build()
    out, _ = oracle.jacobian(problem)
    y = oracle.targets_for(loss, out)
    vectors = oracle.type2_vectors(loss, out, y)
    one = oracle.ggn(problem, loss, y, "mean")
    torch.testing.assert_close(oracle.fisher(problem, loss, y, "mean", vectors), one, **CLOSE)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_label_with_its_probability_gives_the_exact_matrix(options):
    """E over labels of w Σ vvᵀ is the Gauss-Newton matrix, the weights of terms included."""
    loss, problem = oracle.cross_entropy(**options), linear(3)
    out, _ = oracle.jacobian(problem)
    y, p = torch.tensor([2, 1, 0]), out.softmax(1)
    exact = oracle.ggn(problem, loss, y, "mean")
    total = torch.zeros_like(exact)
    for labels in itertools.product(range(3), repeat=3):
        labels = torch.tensor(labels)
        chance = p.gather(1, labels[:, None]).prod()
        vectors = oracle.monte_carlo_vectors(loss, out, y, labels[None])
        total += chance * oracle.fisher(problem, loss, y, "mean", vectors)
    torch.testing.assert_close(total, exact, **CLOSE)


@pytest.mark.parametrize("loss", oracle.LOSSES.values(), ids=oracle.LOSSES)
def test_drawn_labels_give_the_exact_matrix_on_average(loss):
    problem = linear(2)
    out, _ = oracle.jacobian(problem)
    y = oracle.targets_for(loss, out)
    labels = torch.stack([loss.draw(out) for _ in range(4000)])
    vectors = oracle.monte_carlo_vectors(loss, out, y, labels)
    # 4000 draws: a standard error of a few percent of an entry.
    exact = oracle.ggn(problem, loss, y, "mean")
    assert oracle.error(oracle.fisher(problem, loss, y, "mean", vectors), exact) < 0.1


@pytest.mark.parametrize("net", HOOKED, ids=lambda net: net.name)
def test_activations_and_cotangents_of_hooks_give_the_gradients(net):
    problem = net.build()
    out, jac = oracle.jacobian(problem)
    vectors = torch.randn(2, *out.shape, dtype=out.dtype)
    exact = oracle.gradients(jac, vectors)
    found = torch.zeros_like(exact)
    for layer in oracle.layers_of(net.module(), problem[1], problem[3], vectors):
        weight = torch.einsum("vbso,bsi->vboi", layer.cotangents, layer.activations)
        found[..., layer.weight.flatten()] = weight.flatten(2)
        if layer.bias is not None:
            found[..., layer.bias] = layer.cotangents.sum(2)
    torch.testing.assert_close(found, exact, **CLOSE)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("name", ["mlp", "cnn", "grouped"])
def test_ekfac_keeps_the_trace_and_kfac_is_exact_for_one_example(name, reduce, joint):
    net, loss = NETS[name], oracle.mse()
    problem = net.build(size=1)
    out, _ = oracle.jacobian(problem)
    y = oracle.targets_for(loss, out)
    exact = oracle.ggn(problem, loss, y, "mean")
    w = oracle.weight_of(loss, out, y, "mean")
    vectors = oracle.type2_vectors(loss, out, y)
    layers = oracle.layers_of(net.module(), problem[1], problem[3], vectors)
    ekfac = oracle.ekfac_matrix(layers, len(exact), w, reduce=reduce, joint=joint)
    torch.testing.assert_close(ekfac.trace(), exact.trace(), **CLOSE)
    if name == "mlp":
        blocks = [
            [layer.weight, layer.bias] if joint else [part]
            for layer in layers
            for part in (layer.weight, layer.bias)
        ]
        kept = oracle.only_blocks(exact, problem[1], blocks)
        kfac = oracle.kfac_matrix(layers, len(exact), w, reduce=reduce, joint=joint)
        torch.testing.assert_close(kfac, kept, **CLOSE)
        torch.testing.assert_close(ekfac, kept, **CLOSE)


def test_patches_of_reduce_are_means():
    """One linear layer after a mean over positions: reduce is exact where expand is not."""
    net, loss = NETS["tokens_apart"], oracle.mse()
    module = net.module()[0]
    torch.manual_seed(0)
    x = torch.randn(5, 3, 3).double()
    params = {k: v.detach() for k, v in module.named_parameters()}

    def apply(params, buffers, inputs):
        return torch.func.functional_call(module, params, (inputs,)).mean(1)

    problem = apply, params, {}, x
    out, _ = oracle.jacobian(problem)
    y = torch.zeros_like(out)
    vectors = oracle.type2_vectors(loss, out, y)
    # Hooks see the layer through the whole function, so the mean is given to the vectors.
    whole = torch.nn.Sequential(module)
    spread = vectors[:, :, None].expand(-1, -1, 3, -1) / 3
    named = {f"0.{k}": v for k, v in params.items()}
    layers = oracle.layers_of(whole, named, x, spread)
    exact = oracle.ggn(problem, loss, y, "mean")
    w = oracle.weight_of(loss, out, y, "mean")
    for reduce, same in ((True, True), (False, False)):
        kfac = oracle.kfac_matrix(layers, len(exact), w, reduce=reduce, joint=True)
        assert (oracle.error(kfac, exact) < 1e-12) == same

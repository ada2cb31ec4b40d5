"""Curvature by brute force: what judges `jdfunc.curvature`, and shares no code with it.

Everything is float64, explicit loops, torch's own losses. A problem is
`(apply, params, buffers, inputs)`; its outputs are [b, *terms, C], the class axis last. The
parameters are flattened in the order of `pytrees.leaves`, n numbers in all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdfunc import pytrees

# --- losses -----------------------------------------------------------------------------------


class Loss(NamedTuple):
    """One of torch's losses, with its options, on outputs [b, *terms, C].

    Attributes:
        name: of the loss.
        total: ``(outputs, targets, reduction) -> scalar``, torch's own.
        plain: the same without weights, masks or smoothing: minus the log likelihood of a label.
        draw: ``outputs -> targets``, labels from the model's distribution (global generator).
    """

    name: str
    total: Callable[[Tensor, Tensor, str], Tensor]
    plain: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[Tensor], Tensor]


def cross_entropy(**options: Any) -> Loss:
    """torch's cross entropy, hard labels [b, *terms] or soft ones [b, *terms, C]."""

    def total(out: Tensor, y: Tensor, reduction: str) -> Tensor:
        y = y.movedim(-1, 1) if y.is_floating_point() else y
        return F.cross_entropy(out.movedim(-1, 1), y, reduction=reduction, **options)

    def draw(out: Tensor) -> Tensor:
        probabilities = out.detach().softmax(-1)
        return probabilities.flatten(0, -2).multinomial(1).reshape(out.shape[:-1])

    def plain(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.movedim(-1, 1), y, reduction="sum")

    return Loss("cross_entropy", total, plain, draw)


def mse() -> Loss:
    """torch's squared error."""
    return Loss(
        "mse",
        lambda out, y, reduction: F.mse_loss(out, y, reduction=reduction),
        lambda out, y: F.mse_loss(out, y, reduction="sum"),
        lambda out: out.detach() + 0.5**0.5 * torch.randn_like(out),
    )


def bce(**options: Any) -> Loss:
    """torch's binary cross entropy with logits."""

    def total(out: Tensor, y: Tensor, reduction: str) -> Tensor:
        return F.binary_cross_entropy_with_logits(out, y, reduction=reduction, **options)

    return Loss(
        "bce",
        total,
        lambda out, y: F.binary_cross_entropy_with_logits(out, y, reduction="sum"),
        lambda out: out.detach().sigmoid().bernoulli(),
    )


LOSSES = {"mse": mse(), "cross_entropy": cross_entropy(), "bce": bce()}


def targets_for(loss: Loss, out: Tensor, seed: int = 0) -> Tensor:
    """Targets that the model did not draw: uniform labels, normal regression targets."""
    generator = torch.Generator().manual_seed(seed)
    if loss.name == "mse":
        return torch.randn(out.shape, generator=generator, dtype=out.dtype)
    if loss.name == "bce":
        return torch.randint(0, 2, out.shape, generator=generator).to(out.dtype)
    return torch.randint(0, out.shape[-1], out.shape[:-1], generator=generator)


def weight_of(loss: Loss, out: Tensor, y: Tensor, reduction: str) -> float:
    """w, by which `reduction` multiplies the sum: torch's mean over torch's sum."""
    if reduction == "sum":
        return 1.0
    return float(loss.total(out, y, "mean") / loss.total(out, y, "sum"))


def output_hessians(loss: Loss, out: Tensor, y: Tensor) -> Tensor:
    """The Hessians of the summed loss in the outputs of each example, [b, o, o]."""
    hessians = []
    for n in range(out.shape[0]):

        def of_example(flat: Tensor, n: int = n) -> Tensor:
            return loss.total(flat.reshape(out[n : n + 1].shape), y[n : n + 1], "sum")

        hessians.append(torch.func.jacrev(torch.func.jacrev(of_example))(out[n].flatten()))
    return torch.stack(hessians)


# --- vectors ----------------------------------------------------------------------------------


def empirical_vectors(loss: Loss, out: Tensor, y: Tensor) -> Tensor:
    """The gradient of the summed loss, as one vector [1, b, *terms, C]."""
    out = out.detach().requires_grad_()
    return torch.autograd.grad(loss.total(out, y, "sum"), out)[0][None]


def monte_carlo_vectors(loss: Loss, out: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """Gradients at drawn labels [M, b, *terms(, C)], as vectors [M, b, *terms, C].

    The weight of a term is the ratio of its Hessian to that of the plain loss.
    """
    out = out.detach().requires_grad_()
    omega = _diagonals(loss, out, y) / _diagonals(loss._replace(total=_plain(loss)), out, labels[0])
    gradients = [torch.autograd.grad(loss.plain(out, label), out)[0] for label in labels]
    return torch.stack(gradients) * (omega.clamp(min=0) / len(labels)).sqrt()


def _plain(loss: Loss) -> Callable[[Tensor, Tensor, str], Tensor]:
    return lambda out, y, reduction: loss.plain(out, y)


def _diagonals(loss: Loss, out: Tensor, y: Tensor) -> Tensor:
    return output_hessians(loss, out.detach(), y).diagonal(dim1=1, dim2=2).reshape(out.shape)


# --- the exact matrix -------------------------------------------------------------------------


def jacobian(problem: Any) -> tuple[Tensor, Tensor]:
    """The outputs [b, *terms, C] and their Jacobian [b, o, n], one backward for every number."""
    apply, params, buffers, inputs = problem
    values, restore = pytrees.flatten(params)
    values = [value.detach().clone().requires_grad_() for value in values]
    out = apply(restore(values), buffers, inputs)
    rows = []
    for number in out.flatten():
        grads = torch.autograd.grad(
            number, values, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return out.detach(), torch.stack(rows).reshape(out.shape[0], -1, rows[0].numel())


def ggn(problem: Any, loss: Loss, y: Tensor, reduction: str) -> Tensor:
    """F = w Σₙ Jₙᵀ Hₙ Jₙ, [n, n]: every pair of positions of an example included."""
    out, jac = jacobian(problem)
    hessians = output_hessians(loss, out, y)
    total = sum(j.T @ h @ j for j, h in zip(jac, hessians, strict=True))
    return weight_of(loss, out, y, reduction) * total


def gradients(jac: Tensor, vectors: Tensor) -> Tensor:
    """Jₙᵀ v for each vector and example, [V, b, n]."""
    return torch.einsum("bon,vbo->vbn", jac, vectors.flatten(2))


def fisher(problem: Any, loss: Loss, y: Tensor, reduction: str, vectors: Tensor) -> Tensor:
    """F = w Σ_v Σₙ (Jₙᵀ v)(Jₙᵀ v)ᵀ, [n, n]."""
    out, jac = jacobian(problem)
    total = torch.zeros(jac.shape[-1], jac.shape[-1], dtype=jac.dtype)
    for grad in gradients(jac, vectors).flatten(0, 1):
        total += torch.outer(grad, grad)
    return weight_of(loss, out, y, reduction) * total


def type2_vectors(loss: Loss, out: Tensor, y: Tensor) -> Tensor:
    """Vectors [o, b, *terms, C] whose squares sum to the Hessians, from their eigenvectors."""
    eigenvalues, vectors = torch.linalg.eigh(output_hessians(loss, out, y))
    roots = vectors * eigenvalues.clamp(min=0).sqrt()[:, None]
    return roots.permute(2, 0, 1).reshape(-1, *out.shape)


# --- indices of parameters --------------------------------------------------------------------


def indices(params: Any) -> dict[str, Tensor]:
    """Where the numbers of each parameter stand among the n, in the shape of the parameter."""
    found, start = {}, 0
    for name, leaf in zip(pytrees.names(params), pytrees.leaves(params), strict=True):
        found[name] = torch.arange(start, start + leaf.numel()).reshape(leaf.shape)
        start += leaf.numel()
    return found


def only_blocks(matrix: Tensor, params: Any, blocks: Sequence[Sequence[Tensor]]) -> Tensor:
    """The matrix with zeros outside the blocks, each a list of index tensors."""
    kept = torch.zeros_like(matrix)
    for block in blocks:
        index = torch.cat([part.flatten() for part in block])
        kept[index[:, None], index] = matrix[index[:, None], index]
    return kept


# --- KFAC and EKFAC of linear layers ----------------------------------------------------------


class Layer(NamedTuple):
    """What a linear layer or one group of a convolution saw.

    Attributes:
        activations: a [b, s, d_in].
        cotangents: g [V, b, s, d_out].
        weight: where its weight [d_out, d_in] stands among the n numbers.
        bias: where its bias [d_out] stands, or None.
    """

    activations: Tensor
    cotangents: Tensor
    weight: Tensor
    bias: Tensor | None


def layers_of(module: nn.Module, params: Any, inputs: Any, vectors: Tensor) -> list[Layer]:
    """Run a module with hooks and read off a and g of its linear layers and convolutions."""
    seen: list[tuple[str, Any, Tensor, Tensor]] = []
    handles = []
    for name, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):

            def hook(child: Any, args: Any, output: Tensor, name: str = name) -> Tensor:
                output = output.clone()
                seen.append((name, child, args[0].detach(), output))
                return output

            handles.append(child.register_forward_hook(hook))
    out = torch.func.functional_call(
        module, {k: v.detach().clone().requires_grad_() for k, v in params.items()}, (inputs,)
    )
    for handle in handles:
        handle.remove()
    outputs = [output for _, _, _, output in seen]
    per_vector = [
        torch.autograd.grad((out * vector).sum(), outputs, retain_graph=True) for vector in vectors
    ]
    index = indices(params)
    layers = []
    for k, (name, child, given, _) in enumerate(seen):
        g = torch.stack([grads[k] for grads in per_vector])  # [V, b, ...]
        weight, bias = index[f"{name}.weight"], index.get(f"{name}.bias")
        if isinstance(child, nn.Linear):
            a = given.reshape(len(given), -1, given.shape[-1])
            g = g.reshape(*g.shape[:2], -1, g.shape[-1])
            layers.append(Layer(a, g, weight, bias))
            continue
        patches = patches_of(child, given)  # [b, s, channels, *kernel]
        g = g.flatten(3).mT  # [V, b, s, d_out]
        for group in range(child.groups):
            channels = slice_of(group, child.in_channels // child.groups)
            filters = slice_of(group, child.out_channels // child.groups)
            layers.append(
                Layer(
                    patches[:, :, channels].flatten(2),
                    g[..., filters],
                    weight[filters].flatten(1),
                    None if bias is None else bias[filters],
                )
            )
    return layers


def slice_of(group: int, size: int) -> slice:
    return slice(group * size, (group + 1) * size)


def patches_of(conv: Any, given: Tensor) -> Tensor:
    """The patch that a convolution reads at each output position, [b, s, channels, *kernel]."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(given, conv._reversed_padding_repeated_twice, mode=mode)
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(
            padded.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
        )
    ]
    patches = []
    for position in itertools.product(*[range(size) for size in sizes]):
        window = tuple(
            slice(p * s, p * s + d * (k - 1) + 1, d)
            for p, s, d, k in zip(
                position, conv.stride, conv.dilation, conv.kernel_size, strict=True
            )
        )
        patches.append(padded[(slice(None), slice(None), *window)])
    return torch.stack(patches, 1)


def with_ones(a: Tensor) -> Tensor:
    return torch.cat([a, torch.ones_like(a[..., :1])], -1)


def factors(layer: Layer, w: float, *, reduce: bool, joint: bool) -> tuple[Tensor, Tensor]:
    """A and B of KFAC, as sums of outer products.

    expand: A = 1/(N s) Σ a aᵀ, B = w Σ g gᵀ; reduce: of ā = meanₛ a and ḡ = Σₛ g, over N.
    """
    a, g = layer.activations, layer.cotangents
    if reduce:
        a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
    if joint and layer.bias is not None:
        a = with_ones(a)
    left = torch.zeros(g.shape[-1], g.shape[-1], dtype=g.dtype)
    right = torch.zeros(a.shape[-1], a.shape[-1], dtype=a.dtype)
    for row in a.flatten(0, 1):
        right += torch.outer(row, row) / (a.shape[0] * a.shape[1])
    for row in g.flatten(0, 2):
        left += w * torch.outer(row, row)
    return right, left


def eigenvalues(layer: Layer, w: float, left: Tensor, right: Tensor) -> Tensor:
    """λ = w Σ (Q_Bᵀ G Q_A)² of the true gradients G = Σₛ g aᵀ, in given bases."""
    a, g = layer.activations, layer.cotangents
    if right.shape[0] == a.shape[-1] + 1:
        a = with_ones(a)
    found = torch.zeros(left.shape[1], right.shape[1], dtype=a.dtype)
    for vector in g:
        for n in range(len(a)):
            gradient = sum(torch.outer(gs, as_) for gs, as_ in zip(vector[n], a[n], strict=True))
            found += w * (left.T @ gradient @ right).square()
    return found


def bias_eigenvalues(layer: Layer, w: float, left: Tensor) -> Tensor:
    """λ = w Σ (Q_Bᵀ Σₛ g)² of a separate bias."""
    return w * (layer.cotangents.sum(2) @ left).square().flatten(0, 1).sum(0)


def kfac_matrix(layers: Sequence[Layer], n: int, w: float, *, reduce: bool, joint: bool) -> Tensor:
    """The KFAC matrix [n, n] of linear layers: kron(B, A), and B for a separate bias."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for layer in layers:
        right, left = factors(layer, w, reduce=reduce, joint=joint)
        for index, block in _blocks(layer, joint):
            dense = torch.kron(left, right) if block else left
            matrix[index[:, None], index] = dense
    return matrix


def ekfac_matrix(layers: Sequence[Layer], n: int, w: float, *, reduce: bool, joint: bool) -> Tensor:
    """The EKFAC matrix [n, n] of linear layers, in bases of `torch.linalg.eigh`."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for layer in layers:
        right, left = (
            torch.linalg.eigh(side)[1] for side in factors(layer, w, reduce=reduce, joint=joint)
        )
        for index, block in _blocks(layer, joint):
            basis = torch.kron(left, right) if block else left
            values = (
                eigenvalues(layer, w, left, right) if block else bias_eigenvalues(layer, w, left)
            )
            matrix[index[:, None], index] = (basis * values.flatten()) @ basis.T
    return matrix


def _blocks(layer: Layer, joint: bool) -> list[tuple[Tensor, bool]]:
    """The indices of each block, and whether it is a product."""
    if layer.bias is None:
        return [(layer.weight.flatten(), True)]
    if joint:
        return [(torch.cat([layer.weight, layer.bias[:, None]], 1).flatten(), True)]
    return [(layer.weight.flatten(), True), (layer.bias, False)]


def error(value: Tensor, exact: Tensor) -> float:
    """The relative Frobenius distance of a matrix to the exact one."""
    return float((value - exact).norm() / exact.norm())

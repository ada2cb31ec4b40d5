"""Rules for products of a parameter with a tensor: linear, matmul, addmm, einsum.

Each is one contraction. With the axes of the tensor, of the parameter and of the output named, an
axis of the parameter is one of three: h, in all three; i, contracted with the tensor; j, that goes
on into the output. The axes of the tensor that are not the parameter's are the positions s.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.taps.tap import Parameter, Rule, Tap

Axes = Sequence[str]


def contraction(
    tap: Tap,
    func: Any,
    call: Callable[[Tensor], Tensor],
    given: tuple[Tensor, Axes],
    weight: tuple[Tensor, Axes],
    output: Axes,
    pad_free: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
) -> Tensor:
    """Compute an einsum of a tensor with a parameter, as a use if its axes can be laid out.

    Args:
        tap: the tap.
        func: the function that the model called.
        call: computes it for a given parameter.
        given: the tensor and its axes.
        weight: the parameter and its axes.
        output: the axes of the output.
        pad_free: how many entries of the parameter's free axis, before and after, the output lacks.
        bias: what ``call`` adds along the free axis.

    Returns:
        The output.
    """
    (x, x_axes), (w, w_axes), found = given, weight, tap.find(weight[0])
    layout = None if found is None else _layout(x, x_axes, found, w, w_axes, output)
    if found is None or layout is None:
        tap.note(func, (w,), {})
        return call(w)
    groups, contracted, free, shared, activations_first = layout

    def activations(x: Tensor) -> Tensor:
        return _side(x, x_axes, groups, shared, contracted)

    def cotangents(cotangent: Tensor) -> Tensor:
        side = _side(cotangent, output, groups, shared, free)
        return side if pad_free == (0, 0) else F.pad(side, pad_free)

    return tap.use(
        found,
        func,
        call,
        w,
        x,
        activations,
        cotangents,
        activations_first=activations_first,
        bias=bias,
        padded=pad_free,
    )


def _layout(
    x: Tensor, x_axes: Axes, found: Parameter, w: Tensor, w_axes: Axes, output: Axes
) -> tuple[Axes, Axes, Axes, Axes, bool] | None:
    """Sort the axes into groups, contracted, free and positions; None if no layout fits."""
    for axes in (x_axes, w_axes, output):
        if len(set(axes)) != len(axes):  # a diagonal
            return None
    sizes = dict(zip(x_axes, x.shape, strict=True))
    if any(sizes.get(a, n) != n for a, n in zip(w_axes, w.shape, strict=True)):  # broadcast
        return None
    param_axes = [*reversed(w_axes)] if found.transposed else [*w_axes]
    groups = [a for a in param_axes if a in x_axes and a in output]
    contracted = [a for a in param_axes if a in x_axes and a not in output]
    free = [a for a in param_axes if a not in x_axes and a in output]
    shared = [a for a in output if a not in param_axes]
    if len(groups) + len(contracted) + len(free) != len(param_axes):  # a plain sum over the param
        return None
    if [a for a in x_axes if a not in w_axes and a not in output]:  # a plain sum over x
        return None
    if param_axes == [*groups, *contracted, *free]:
        return groups, contracted, free, shared, True
    if param_axes == [*groups, *free, *contracted]:
        return groups, contracted, free, shared, False
    return None


def _side(tensor: Tensor, axes: Axes, *parts: Axes) -> Tensor:
    """Lay a tensor out as [h, s, i], each the product of the axes of one part."""
    ordered = tensor.permute(tuple(list(axes).index(a) for part in parts for a in part))
    sizes = dict(zip(axes, tensor.shape, strict=True))
    shape = []
    for part in parts:
        size = 1
        for axis in part:
            size = size * sizes[axis]
        shape.append(size)
    return ordered.reshape(shape)


def _positions(ndim: int) -> list[str]:
    return [f"s{k}" for k in range(ndim)]


def linear(
    tap: Tap, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Rule of `F.linear`: y = x Wᵀ + b."""
    if bias is not None:
        tap.note(func, (bias,), {})
    if weight.ndim != 2:
        return tap.call(func, input, weight, bias)
    s = _positions(input.ndim - 1)
    return contraction(
        tap,
        func,
        lambda w: F.linear(input, w, bias),
        (input, [*s, "i"]),
        (weight, ["j", "i"]),
        [*s, "j"],
        bias=bias,
    )


def matmul(tap: Tap, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Rule of the matrix products: x W and W x, for any number of axes of either."""
    named = [kwargs[k] for k in ("input", "self", "other", "mat2", "vec", "tensor2") if k in kwargs]
    operands = [*args, *named]
    if len(args) + len(kwargs) != 2 or len(operands) != 2:
        return tap.call(func, *args, **kwargs)
    input, other = operands
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return tap.call(func, *args, **kwargs)
    left, right = tap.find(input), tap.find(other)
    if (left is None) == (right is None) or input.ndim == 0 or other.ndim == 0:
        return tap.call(func, input, other)
    a, b = ["k"] if input.ndim == 1 else ["r", "k"], ["k"] if other.ndim == 1 else ["k", "c"]
    lead = _positions(max(input.ndim, other.ndim) - 2)
    a = [*lead[len(lead) - (input.ndim - len(a)) :], *a]
    b = [*lead[len(lead) - (other.ndim - len(b)) :], *b]
    out = [*lead, *("r" for _ in a if _ == "r"), *("c" for _ in b if _ == "c")]
    if left is not None:
        return contraction(tap, func, lambda w: func(w, other), (other, b), (input, a), out)
    return contraction(tap, func, lambda w: func(input, w), (input, a), (other, b), out)


def addmm(
    tap: Tap, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Any:
    """Rule of `torch.addmm`: y = β b + α a W."""
    tap.note(func, (input,), {})
    if (tap.find(mat1) is None) == (tap.find(mat2) is None):
        return tap.call(func, input, mat1, mat2, beta=beta, alpha=alpha)

    def call(a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(input, a, b, beta=beta, alpha=alpha)

    a, b, out = ["r", "k"], ["k", "c"], ["r", "c"]
    row = input if input.ndim == 1 and isinstance(beta, int) and beta == 1 else None
    if tap.find(mat1) is not None:
        other = mat2 if isinstance(alpha, int) and alpha == 1 else alpha * mat2
        return contraction(tap, func, lambda w: call(w, mat2), (other, b), (mat1, a), out)
    other = mat1 if isinstance(alpha, int) and alpha == 1 else alpha * mat1
    return contraction(tap, func, lambda w: call(mat1, w), (other, a), (mat2, b), out, bias=row)


def einsum(tap: Tap, func: Any, *args: Any) -> Any:
    """Rule of `torch.einsum` of two operands, one of them a parameter."""
    listed = len(args) == 2 and isinstance(args[1], (list, tuple))
    operands: list[Any] = list(args[1] if listed else args[1:])
    plain = isinstance(args[0], str) and len(operands) == 2
    if not plain or (tap.find(operands[0]) is None) == (tap.find(operands[1]) is None):
        return tap.call(func, *args)
    equation = args[0].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    axes = [_expanded(e, x) for e, x in zip(inputs.split(","), operands, strict=True)]
    if not arrow:  # the letters that stand once, in alphabetical order
        letters = inputs.replace(",", "").replace("...", "")
        output = "..." * ("..." in inputs) + "".join(
            sorted(a for a in set(letters) if letters.count(a) == 1)
        )
    lead = max((sum(len(a) > 1 for a in part) for part in axes), default=0)
    out = _letters(output, [f"...{k}" for k in range(lead - 1, -1, -1)])
    w = 0 if tap.find(operands[0]) is not None else 1

    def call(weight: Tensor) -> Tensor:
        pair = (weight, operands[1]) if w == 0 else (operands[0], weight)
        return torch.einsum(equation, *pair)

    x = 1 - w
    return contraction(tap, func, call, (operands[x], axes[x]), (operands[w], axes[w]), out)


def _expanded(term: str, operand: Tensor) -> list[str]:
    """Name every axis of an operand; those under an ellipsis are counted from the right."""
    lead = operand.ndim - len(term.replace("...", ""))
    return _letters(term, [f"...{k}" for k in range(lead - 1, -1, -1)])


def _letters(term: str, lead: list[str]) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *(lead if dots else []), *after]


def bilinear(
    tap: Tap, func: Any, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Rule of `F.bilinear`: y_o = x₁ᵀ W_o x₂, a contraction with the products of x₁ and x₂."""
    if bias is not None:
        tap.note(func, (bias,), {})
    pairs = input1[..., :, None] * input2[..., None, :]
    s = _positions(input1.ndim - 1)

    def call(w: Tensor) -> Tensor:
        y = torch.einsum("...ij,oij->...o", pairs, w)
        return y if bias is None else y + bias

    return contraction(
        tap,
        func,
        call,
        (pairs, [*s, "i1", "i2"]),
        (weight, ["j", "i1", "i2"]),
        [*s, "j"],
        bias=bias,
    )


def transpose(tap: Tap, func: Any, input: Tensor, *dims: Any, **kwargs: Any) -> Any:
    """Rule of the transposes: a transposed matrix is still its parameter."""
    found = tap.find(input)
    swapped = not kwargs and sorted(d % 2 for d in dims if isinstance(d, int)) in ([], [0, 1])
    if found is None or input.ndim != 2 or not swapped:
        return tap.call(func, input, *dims, **kwargs)
    return tap.view(found, func(input, *dims))


RULES: dict[Any, Rule] = {
    F.linear: linear,
    F.bilinear: bilinear,
    torch.einsum: einsum,
    torch.addmm: addmm,
    Tensor.addmm: addmm,
    **dict.fromkeys(
        [
            torch.matmul,
            Tensor.matmul,
            Tensor.__matmul__,
            torch.mm,
            Tensor.mm,
            torch.mv,
            Tensor.mv,
            torch.bmm,
            Tensor.bmm,
        ],
        matmul,
    ),
    **dict.fromkeys([torch.t, Tensor.t, torch.transpose, Tensor.transpose], transpose),
    Tensor.T.__get__: transpose,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.mT.__get__: transpose,  # pyright: ignore[reportAttributeAccessIssue]
}

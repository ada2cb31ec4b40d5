"""Rules that refuse what couples examples, and mend what torch cannot run for one at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.taps.embedding import embedding
from jdfunc.taps.tap import Rule, Tap


def batch_norm(
    tap: Tap,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Rule of `F.batch_norm`: batch statistics couple the examples, so there is no row of each."""
    if training or running_mean is None:
        found = tap.find(weight)
        owner = "" if found is None else f" of {found.name.rpartition('.')[0] or found.name!r}"
        raise ValueError(
            f"expected losses that depend on one example each because batch_dim is given, but "
            f"batch_norm{owner} is in training mode and couples the examples of the batch; use "
            "batch_dim=None, module.eval(), or a norm without batch statistics"
        )
    return tap.call(func, input, running_mean, running_var, weight, bias, training, momentum, eps)


def scaled_embedding(
    tap: Tap, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Rule of `F.embedding`: gradients scaled by frequencies in the batch couple the examples."""
    if kwargs.get("scale_grad_by_freq") or (len(args) > 3 and args[3]):
        raise ValueError(
            "expected losses that depend on one example each because batch_dim is given, but an "
            "embedding with scale_grad_by_freq=True couples the examples of the batch; use "
            "batch_dim=None or leave it out"
        )
    return embedding(tap, func, input, weight, *args, **kwargs)


def recurrent(tap: Tap, func: Any, input: Tensor, hx: Any, *args: Any) -> Any:
    """Rule of lstm, gru, rnn and their cells: the state must belong to the example."""
    if func not in CELLS and not isinstance(args[1], bool):  # (data, batch_sizes, hx, params, ...)
        raise ValueError(
            "expected padded sequences, got a packed one, which torch.func cannot differentiate; "
            "use torch.nn.utils.rnn.pad_packed_sequence, and leave out what is padding in the loss"
        )
    # The kernels write into products of the state in place; vmap refuses if only input is batched.
    zero = torch.zeros_like(input).sum()
    hx = hx + zero if isinstance(hx, Tensor) else [h + zero for h in hx]
    # Below a transform of nothing the kernels are taken apart, as vmap needs them.
    nothing = torch.zeros((), device=input.device)
    below: Any = torch.func.vjp(
        lambda x: (x, tap.call(func, input, hx, *args)), nothing, has_aux=True
    )
    return below[2]


def norm(tap: Tap, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Rule of the norms under autocast: one dtype, since their batched backward knows no other."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    wide = next((t.dtype for t in tensors if t.dtype != input.dtype), None)
    if wide is None:
        return tap.call(func, input, *args, **kwargs)
    return tap.call(func, input.to(wide), *args, **kwargs).to(input.dtype)


def prelu(tap: Tap, func: Any, input: Tensor, weight: Tensor) -> Tensor:
    """Rule of `F.prelu`: where and a product, as its backward knows one level of vmap only."""
    tap.note(func, (weight,), {})
    if input.ndim > 1 and weight.ndim == 1:
        weight = weight.reshape(-1, *(1,) * (input.ndim - 2))
    return torch.where(input > 0, input, weight * input)


CELLS = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
#: For many losses at once.
VMAP_RULES: dict[Any, Rule] = {
    **dict.fromkeys([F.layer_norm, F.group_norm], norm),
    **dict.fromkeys([torch.prelu, Tensor.prelu], prelu),
}

RECURRENT_RULES: dict[Any, Rule] = dict.fromkeys(
    [torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, *CELLS], recurrent
)

#: For one example at a time.
RULES: dict[Any, Rule] = {
    F.batch_norm: batch_norm,
    F.embedding: scaled_embedding,
    **RECURRENT_RULES,
}

"""Rules that refuse what couples examples, and mend what torch cannot run for one at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    return tap.call(
        func, input, running_mean, running_var, weight, bias, training, momentum, eps
    )


def recurrent(tap: Tap, func: Any, input: Tensor, hx: Any, *args: Any) -> Any:
    """Rule of lstm, gru and rnn: `vmap` needs a state that belongs to the example, as input does.

    The kernels write into products of the state in place.
    """
    if isinstance(args[0], (list, tuple)):  # the padded form: (input, hx, params, ...)
        zero = torch.zeros_like(input).sum()
        hx = hx + zero if isinstance(hx, Tensor) else [h + zero for h in hx]
    return tap.call(func, input, hx, *args)


RULES: dict[Any, Rule] = {
    F.batch_norm: batch_norm,
    **dict.fromkeys([torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu], recurrent),
}

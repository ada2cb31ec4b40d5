"""The rules of a tap, by the function that a model calls."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from jdfunc.taps import attention, batching, contraction, convolution, embedding
from jdfunc.taps.tap import Rule, Tap

#: What a model needs to be differentiated for many losses at once.
VMAP_RULES: dict[Any, Rule] = {
    **attention.RULES,
    **embedding.RULES,
    F.bilinear: contraction.bilinear,
}

#: What keeps a parameter's rows factored.
RULES: dict[Any, Rule] = {
    **contraction.RULES,
    **convolution.RULES,
    **VMAP_RULES,
}

#: What a model also needs to be run for one example at a time.
ONE_EXAMPLE_RULES: dict[Any, Rule] = batching.RULES


def vmappable(named: dict[str, Tensor], *, one_example: bool) -> Tap:
    """Return a tap that only makes a model run under `torch.vmap`, and keeps no uses.

    Args:
        named: parameters by name, for the text of errors.
        one_example: whether the model is run for one example at a time.

    Returns:
        The tap, to be entered around the model.
    """
    rules = {**VMAP_RULES, **ONE_EXAMPLE_RULES} if one_example else VMAP_RULES
    return Tap(named, rules)

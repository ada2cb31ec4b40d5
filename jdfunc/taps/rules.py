"""The rules of a tap, by the function that a model calls."""

from typing import Any

import torch.nn.functional as F

from jdfunc.taps import attention, batching, contraction, convolution, embedding, open_sizes
from jdfunc.taps.tap import Rule

#: What a model needs to be differentiated for many losses at once.
VMAP_RULES: dict[Any, Rule] = {
    **attention.RULES,
    **embedding.RULES,
    **batching.VMAP_RULES,
    F.bilinear: contraction.bilinear,
}

#: What keeps a parameter's rows factored.
RULES: dict[Any, Rule] = {
    **contraction.RULES,
    **convolution.RULES,
    **VMAP_RULES,
}

#: What recurrent kernels need under an outer `torch.vmap`.
RECURRENT_RULES: dict[Any, Rule] = batching.RECURRENT_RULES

#: What a model also needs to be run for one example at a time.
ONE_EXAMPLE_RULES: dict[Any, Rule] = {**batching.RULES, **open_sizes.RULES}

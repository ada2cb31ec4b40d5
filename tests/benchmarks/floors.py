"""The least that a step costs: arithmetic and memory traffic at the rates of this machine."""

import copy
from typing import Any

import torch
from clocks import interleaved
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from training import Case

from jdfunc import algebra, pytrees
from jdfunc.factored.leaves import elements, param_of
from jdfunc.factored.products import gram_cost


def machine_rates() -> tuple[float, float]:
    """Multiply-adds per second of a matrix product, and bytes per second of a copy."""
    x, long = torch.randn(1024, 1024), torch.randn(1 << 24)
    into = torch.empty_like(long)
    product, copied = (
        min(t) for t in interleaved([lambda: x @ x, lambda: into.copy_(long)], 1, fewest=8)
    )
    return 1024**3 / product, 2 * 4 * len(long) / copied


def print_floor(
    name: str,
    case: Case,
    rows: Any,
    times: tuple[float, float, float],
    rates: tuple[float, float],
) -> None:
    """Least multiply-adds and bytes of a step, counted from static shapes, beside its time."""
    (ours, plain, weighting), params = times, [*case.model.parameters()]
    leaves = pytrees.leaves(rows, algebra.is_rows)
    dense = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    factored = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    m, numel = len(case.batch[0]), sum(p.numel() for p in params)
    forms = [min(gram_cost(leaf), key=lambda cost: cost.total) for leaf in factored]
    held = sum(x.numel() for x in dense) + sum(elements(x) for x in factored)
    gram = sum(form.multiply_adds for form in forms) + sum(x.numel() * m for x in dense) // 2
    combine = sum(
        gram_cost(leaf)[1].multiply_adds - m * m * param_of(leaf).numel() for leaf in factored
    )
    through, to_weights = passes(case)
    macs = {
        "passes": through,
        "dense rows": max(0, to_weights - combine),  # a row takes what its weight gradient takes
        "gram": gram,
        "combine": combine,
    }
    # Parameters are read by both passes and the directions written; each side is written, read for
    # the Gramian and read for the direction.
    moved = 4 * (3 * numel + 3 * held + 2 * sum(form.elements for form in forms))
    ms = {key: count / rates[0] * 1e3 for key, count in macs.items()}
    ms["memory"] = moved / rates[1] * 1e3
    ms["weighting"] = weighting * 1e3
    floor = sum(ms.values())
    print(
        f"{name}: floor {floor:.2f} ms = {floor / plain / 1e3:.2f} SGD steps, the step takes "
        f"{ours * 1e3 / floor:.2f} times that; "
        + ", ".join(f"{key} {value:.2f}" for key, value in ms.items())
        + f"; {sum(macs.values()) / 1e6:.0f} M multiply-adds at {rates[0] / 1e9:.0f} G/s, "
        f"{moved / 1e6:.0f} MB at {rates[1] / 1e9:.1f} GB/s",
        flush=True,
    )


def passes(case: Case) -> tuple[int, int]:
    """Multiply-adds forward and back to the first layer's output, and of all weight gradients."""
    model, outputs = copy.deepcopy(case.model), []
    first = next(m for m in model.modules() if [*m.parameters(recurse=False)])
    first.register_forward_hook(lambda module, args, output: outputs.append(output))
    counts = []
    for to_weights in (False, True):
        outputs.clear()
        with FlopCounterMode(display=False) as counter:
            losses = case.forward(model, case.batch)
            wanted = [*model.parameters()] if to_weights else outputs[:1]
            torch.autograd.grad(losses.sum(), wanted)
        counts.append(counter.get_total_flops() // 2)
    return counts[0], counts[1] - counts[0]

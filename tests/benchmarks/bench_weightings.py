"""Cost of the weightings against TorchJD: CPU process time, one thread, interleaved runs.

    python tests/benchmarks/bench_weightings.py [--quick] [--only upgrad] [--sizes 2,64]

Prints, per method, mode and m, the time in milliseconds and the ratio TorchJD / jdfunc over the
families: geometric mean and worst.
"""

import argparse
import functools
import math
import pathlib
import sys
from collections.abc import Callable

import torch
from torchjd.aggregation import DualProjWeighting, MGDAWeighting, UPGradWeighting

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import samplers
from clocks import interleaved

from jdfunc.weightings import dualproj, mgda, upgrad

PARITY = {"norm_eps": 1e-4, "reg_eps": 1e-4}
PAIRS = {
    "upgrad": (upgrad, UPGradWeighting()),
    "upgrad parity": (functools.partial(upgrad, **PARITY), UPGradWeighting()),
    "dualproj": (dualproj, DualProjWeighting()),
    "dualproj parity": (functools.partial(dualproj, **PARITY), DualProjWeighting()),
    "mgda": (mgda, MGDAWeighting()),
}
FAMILIES = (
    "full", "tall", "rankdef", "ranklow", "near_dup", "camps", "simplex", "near_stationary",
    "spread", "spectrum", "mlp_0", "mlp_300", "mlp_3000",
)  # fmt: skip


def gramian(family: str, m: int) -> torch.Tensor:
    """A float32 Gramian of one family; `mlp_n` are per-example gradients after n steps."""
    if family.startswith("mlp_"):
        rows = samplers.mlp_rows(m, int(family.removeprefix("mlp_")))
    else:
        rows = samplers.draw(family, m)
    return samplers.gramian(rows).float()


def main() -> None:
    """Run every pair over the sizes and families."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="m up to 64, a few families")
    parser.add_argument("--only", default="", help="methods whose name starts so")
    parser.add_argument("--sizes", default="", help="comma-separated m in place of 2 to 256")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (2, 3, 4, 8, 16, 32, 64) if options.quick else (2, 3, 4, 8, 16, 24, 32, 64, 128, 256)
    if options.sizes:
        sizes = tuple(int(m) for m in options.sizes.split(","))
    families = FAMILIES[::3] if options.quick else FAMILIES
    budget = 0.05 if options.quick else 0.3
    print(f"{'method':<16}{'m':>5}{'ms (median)':>13}{'ratio':>9}{'worst':>8}  worst family")
    for name, (ours, peer) in PAIRS.items():
        if not name.startswith(options.only):
            continue
        for m in sizes:
            if m > 128 and name.startswith("upgrad"):  # the peer takes seconds
                families_at, budget_at = families[::4], 0.0
            else:
                families_at, budget_at = families, budget
            report(name, m, ours, peer, families_at, budget_at)


def report(
    name: str, m: int, ours: Callable, peer: Callable, families: tuple[str, ...], budget: float
) -> None:
    """One line of the table."""
    ratios, mine = {}, []
    for family in families:
        g = gramian(family, m)
        times = interleaved([lambda g=g: ours(g), lambda g=g: peer(g)], budget)
        fast, slow = (t[len(t) // 4] for t in times)  # lower quartiles
        ratios[family] = slow / fast
        mine.append(fast)
    mean = math.exp(sum(math.log(r) for r in ratios.values()) / len(ratios))
    worst = min(ratios, key=lambda family: ratios[family])
    median = sorted(mine)[len(mine) // 2] * 1e3
    print(f"{name:<16}{m:>5}{median:>13.3f}{mean:>9.2f}{ratios[worst]:>8.2f}  {worst}", flush=True)


if __name__ == "__main__":
    main()

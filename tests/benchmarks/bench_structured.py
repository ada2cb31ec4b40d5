"""Cost of an instance-wise UPGrad step against torchjd and against a plain SGD step.

    python tests/benchmarks/bench_structured.py [--quick] [--only mlp] [--memory] [--growth]
        [--compiled]

CPU process time, one process, one thread, in turns, medians. Beside each ratio stands its bar,
and below a row that misses one stands its floor: what the arithmetic and the memory traffic of the
step would take at the rates of this machine. Without an option the tables of the steps and of the
tied model are printed; each option prints its own table in their place.
"""

import argparse
import copy
import math
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from clocks import interleaved, median
from floors import machine_rates, print_floor
from torch import Tensor
from torchjd.autogram import Engine
from training import STEPS, Case, cnn, gpt, jdfunc_step, mlp, model_fn_of, sgd_step, transformer

import jdfunc as jd


class Row(NamedTuple):
    """A case of the table: at least so many times as fast as torchjd, at most so many SGD steps."""

    make: Callable[[], Case]
    faster: float
    slower: float = math.inf


ROWS = {
    "mlp B=64": Row(partial(mlp, 64), 50, 2.5),
    "mlp B=256": Row(partial(mlp, 256), 60, 5),
    "cnn B=32": Row(partial(cnn, 32), 1.5, 2),
    "cnn B=64": Row(partial(cnn, 64), 1.5, 2),
    "transformer B=32": Row(partial(transformer, 32), 2.2, 2.4),
    "transformer B=64": Row(partial(transformer, 64), 2.2, 3.2),
    "gpt B=16": Row(partial(gpt, 16), 2),
}
MEMORY_BARS = 0.6, 2.0
FIRST = "first step"
CLEAR = pathlib.Path("/proc/self/clear_refs")
PARTS = ("linearize", "gram", "weighting", "combine")


def linearized(case: Case) -> Any:
    """Our linearization at the parameters of a case."""
    params = dict(case.model.named_parameters())
    return jd.structured(model_fn_of(case), params, case.batch, batch_dim=0)


def parts_of(case: Case) -> list[Callable[[], object]]:
    """The parts of our step, each on its own."""
    lin = linearized(case)
    gramian = lin.gram()
    weights = jd.upgrad(gramian)
    return [
        partial(linearized, case),
        lin.gram,
        partial(jd.upgrad, gramian),
        partial(lin.combine, weights),
    ]


def print_steps(rows: dict[str, Row], budget: float) -> None:
    """The table of the steps, with the parts of ours; floors of the rows that miss a bar."""
    print(
        f"{'ms':<18}{'jdfunc':>9}{'torchjd':>10}{'sgd':>8}{'torchjd/ours':>14}{'bar':>6}"
        f"{'ours/sgd':>10}{'bar':>6}   " + "".join(f"{part:>10}" for part in PARTS)
    )
    missed = []
    for name, row in rows.items():
        torch.manual_seed(0)
        case = row.make()
        steps = [make(case) for make in STEPS.values()]
        steps[0]()
        steps[2]()
        times = [median(t) for t in interleaved([*steps, *parts_of(case)], budget)]
        (ours, theirs, plain), parts = times[:3], times[3:]
        marks = "".join(
            "*" if miss else " " for miss in (theirs / ours < row.faster, ours / plain > row.slower)
        )
        print(
            f"{name:<18}{ours * 1e3:>9.2f}{theirs * 1e3:>10.1f}{plain * 1e3:>8.2f}"
            f"{theirs / ours:>13.2f}{marks[0]}{row.faster:>6}"
            f"{ours / plain:>9.2f}{marks[1]}{row.slower:>6}   "
            + "".join(f"{part * 1e3:>10.2f}" for part in parts),
            flush=True,
        )
        if marks.strip():
            missed.append((name, case, times))
    rates = machine_rates() if missed else (0.0, 0.0)
    for name, case, times in missed:
        weighting = times[3 + PARTS.index("weighting")]
        rows_held = linearized(case).rows
        print_floor(name, case, rows_held, (times[0], times[2], weighting), rates)


def print_tied() -> None:
    """The Gramian of the tied model in float64 against rows of autograd, one by one."""
    print("\ntied embedding and head, float64, largest error / largest entry")
    for title, head in (("head a layer", True), ("head a use by the parent", False)):
        torch.manual_seed(0)
        case = gpt(4, head=head)
        case = case._replace(model=case.model.double())
        params = [*case.model.parameters()]
        losses = case.forward(case.model, case.batch)
        rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        exact = matrix @ matrix.T
        lin = linearized(case)
        hooked = copy.deepcopy(case.model)
        theirs = Engine(hooked, batch_dim=0).compute_gramian(case.forward(hooked, case.batch))
        weights = jd.upgrad(exact)
        direction = torch.cat([g.flatten() for g in lin.combine(weights).values()])
        print(
            f"  {title}: Gramian jdfunc {_error(lin.gram(), exact):.1e}, torchjd "
            f"{_error(theirs, exact):.1e}; direction jdfunc "
            f"{_error(direction, matrix.T @ weights):.1e}",
            flush=True,
        )


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).abs().max() / exact.abs().max())


def print_memory(rows: dict[str, Row]) -> None:
    """Peak memory of three steps in a fresh process, above that of imports, model and batch.

    The first line is what a first step of any model adds, mostly by modules that it imports late;
    the others are measured after such a step.
    """
    print(
        f"{'peak MB':<18}{'jdfunc':>9}{'torchjd':>10}{'sgd':>8}"
        f"{'ours/torchjd':>14}{'bar':>6}{'ours/sgd':>10}{'bar':>6}"
    )
    for name in [FIRST, *rows]:
        found = []
        for step in STEPS:
            command = [sys.executable, __file__, "--measure", step, "--only", name]
            run = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(float(run.stdout))
        ours, theirs, plain = found
        if name == FIRST:
            print(f"{name:<18}{ours:>9.1f}{theirs:>10.1f}{plain:>8.1f}", flush=True)
            continue
        marks = [
            "*" if ours / other > bar else " "
            for other, bar in zip((theirs, plain), MEMORY_BARS, strict=True)
        ]
        print(
            f"{name:<18}{ours:>9.1f}{theirs:>10.1f}{plain:>8.1f}{ours / theirs:>13.2f}{marks[0]}"
            f"{MEMORY_BARS[0]:>6}{ours / plain:>9.2f}{marks[1]}{MEMORY_BARS[1]:>6}",
            flush=True,
        )


def measured(case: Case, step: str) -> float:
    """Peak memory of three steps in MB above what is there before."""
    run = STEPS[step](case)
    if CLEAR.exists():
        CLEAR.write_text("5")  # the peak so far is forgotten
    before = _peak()
    for _ in range(3):
        run()
    return _peak() - before


def _peak() -> float:
    # Of this program alone: ru_maxrss starts from the peak of the process that started it.
    if CLEAR.exists():
        status = CLEAR.with_name("status").read_text().splitlines()
        lines = [line for line in status if line.startswith("VmHWM")]
        return int(lines[0].split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_growth(quick: bool, budget: float) -> None:
    """Exponents of the cost, by least squares of the logarithms."""
    sweeps: dict[str, tuple[Callable[[int], Case], tuple[int, ...]]] = {
        "mlp, B": (mlp, (16, 32, 64, 128, 256, 512)),
        "mlp B=64, width": (partial(mlp, 64), (128, 256, 512, 1024)),
        "transformer B=32, T": (partial(transformer, 32), (8, 16, 32, 64)),
        "transformer B=8, width": (lambda d: transformer(8, 16, d), (128, 256, 512, 1024)),
    }
    for title, (make, sizes) in sweeps.items():
        sizes = sizes[:3] if quick else sizes
        table = []
        for size in sizes:
            torch.manual_seed(0)
            case = make(size)
            fns = [jdfunc_step(case), sgd_step(case), *parts_of(case)]
            table.append([median(t) for t in interleaved(fns, budget)])
        print(f"{title:<24}" + "".join(f"{size:>9}" for size in sizes) + "   exponent, last step")
        for k, part in enumerate(("jdfunc", "sgd", *PARTS)):
            column = [line[k] for line in table]
            last = math.log(column[-1] / column[-2]) / math.log(sizes[-1] / sizes[-2])
            print(
                f"  {part + ' ms':<22}"
                + "".join(f"{t * 1e3:>9.2f}" for t in column)
                + f"{exponent(sizes, column):>11.2f}{last:>11.2f}",
                flush=True,
            )


def exponent(sizes: tuple[int, ...], times: list[float]) -> float:
    """The slope of log time over log size."""
    x, y = torch.tensor(sizes).log(), torch.tensor(times).log()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def print_compiled(rows: dict[str, Row], budget: float) -> None:
    """Compiled steps against eager ones."""
    print(
        f"{'ms':<18}{'weighting':>10}{'eager':>9}{'compiled':>10}{'speed-up':>10}"
        f"{'compile s':>11}{'error':>10}"
    )
    for name, row in rows.items():
        for weighting in (jd.weightings.mean, jd.upgrad):
            torch.manual_seed(0)
            case = row.make()
            step = partial(jd.jd_step, model_fn_of(case), batch_dim=0, weighting=weighting)
            params = dict(case.model.named_parameters())

            def eager(step=step, params=params, batch=case.batch):
                return step(params, batch)

            torch.compiler.reset()
            compiled = torch.compile(eager, fullgraph=True)
            begin = time.perf_counter()
            fast = compiled()
            took, slow = time.perf_counter() - begin, eager()
            error = max(_error(fast[key], slow[key]) for key in slow)
            one, two = (median(t) for t in interleaved([eager, compiled], budget))
            print(
                f"{name:<18}{weighting.__name__:>10}{one * 1e3:>9.2f}{two * 1e3:>10.2f}"
                f"{one / two:>10.2f}{took:>11.1f}{error:>10.1e}",
                flush=True,
            )


def main() -> None:
    """Print the tables that the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller sweeps")
    parser.add_argument("--only", default="", help="rows whose name starts so")
    parser.add_argument("--memory", action="store_true", help="peak memory, in fresh processes")
    parser.add_argument("--growth", action="store_true", help="exponents in B, T and width")
    parser.add_argument("--compiled", action="store_true", help="compiled against eager")
    parser.add_argument("--measure", choices=[*STEPS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: row for name, row in ROWS.items() if name.startswith(options.only)}
    budget = 0.5 if options.quick else 3.0
    if options.measure:
        torch.manual_seed(0)
        first = measured(mlp(2, 8), options.measure)
        print(
            first if options.only == FIRST else measured(rows[options.only].make(), options.measure)
        )
        return
    if options.memory:
        print_memory(rows)
    if options.growth:
        print_growth(options.quick, budget / 3)
    if options.compiled:
        names = ("mlp B=64", "transformer B=32")
        print_compiled({name: row for name, row in rows.items() if name in names}, budget)
    if not (options.memory or options.growth or options.compiled):
        print_steps(rows, budget)
        if "gpt B=16" in rows:
            print_tied()


if __name__ == "__main__":
    main()

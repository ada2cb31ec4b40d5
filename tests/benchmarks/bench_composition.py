"""Steps compiled whole, rematerialised blocks, and linearizations without rows: ratios.

    python tests/benchmarks/bench_composition.py [--quick]
        [--only examples|tasks|remat|memory]

CPU process time, one thread, in turns, medians; steps are compiled by inductor. Memory is the peak
of the process where blocks are rematerialised, and that of the live bytes of tensors, counted
operation by operation, in the last table. Beside a ratio stands its bar; * marks what misses it.
"""

import argparse
import math
import os
import pathlib
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_structured import CLEAR, _peak
from clocks import interleaved, median
from torch import Tensor
from torchjd.aggregation import UPGrad
from torchjd.autojac import backward, jac_to_grad
from training import mlp, model_fn_of, transformer

import jdfunc as jd
from jdfunc.linearizations import matrix_free, sketched

sys.path.append(str(pathlib.Path(__file__).parents[1]))
from live_bytes import LiveBytes  # noqa: E402

EXAMPLES_FASTER, TASKS_FASTER, TASKS_SLOWER = 1.3, 1.8, 2.8
TASKS = 3, 5, 10
#: What is freed goes back to the system at once, so that a peak of the process is one of tensors.
RETURNED = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def compiled(fn: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], float]:
    """The function compiled and run once, and how long that took in seconds."""
    torch.compiler.reset()
    whole = torch.compile(fn, fullgraph=True)
    begin = time.perf_counter()
    whole(*args)
    return partial(whole, *args), time.perf_counter() - begin


def marked(ratio: float, bar: float, *, least: bool) -> str:
    """A ratio beside its bar."""
    missed = ratio < bar if least else ratio > bar
    return f"{ratio:>10.2f}{'*' if missed else ' '}{bar if 0 < bar < math.inf else '-':>5}"


# --- one loss per example -----------------------------------------------------------------------


def print_examples(budget: float) -> None:
    """Instance-wise steps, compiled against eager."""
    print(
        f"{'one loss per example':<22}{'eager ms':>10}{'eager/compiled':>16}  bar{'compile s':>11}"
    )
    rows = [
        ("mlp B=64", mlp(64), jd.mean),
        ("mlp B=64", mlp(64), jd.upgrad),
        ("transformer B=32", transformer(32), jd.upgrad),  # the longest to compile: once
    ]
    for name, case, weighting in rows:
        params = {k: v.detach() for k, v in case.model.named_parameters()}
        step = partial(jd.jd_step, model_fn_of(case), batch_dim=0, weighting=weighting)
        fast, seconds = compiled(lambda p, b, step=step: step(p, b), params, case.batch)
        slow = partial(step, params, case.batch)
        eager, whole = (median(t) for t in interleaved([slow, fast], budget))
        print(
            f"{name + ' ' + weighting.__name__:<24}{eager * 1e3:>8.2f}"
            f"{marked(eager / whole, EXAMPLES_FASTER, least=True):>21}{seconds:>11.1f}",
            flush=True,
        )


# --- one loss per task --------------------------------------------------------------------------


def of_tasks(
    m: int, width: int, size: int
) -> tuple[Callable[..., Tensor], dict[str, Tensor], Any, float]:
    """An MLP d-4d-4d-m whose outputs have a mean squared loss each.

    With it what m pullbacks of one forward pass take at least over one, by products of matrices.
    """
    torch.manual_seed(0)
    widths = (width, 4 * width, 4 * width, m)
    params = {}
    for k, (i, j) in enumerate(zip(widths, widths[1:], strict=False)):
        params[f"w{k}"], params[f"b{k}"] = torch.randn(j, i) / i**0.5, torch.zeros(j)

    def model_fn(params: Any, buffers: Any, batch: Any) -> Tensor:
        x, y = batch
        for k in range(2):
            x = F.relu(F.linear(x, params[f"w{k}"], params[f"b{k}"]))
        return (F.linear(x, params["w2"], params["b2"]) - y).square().mean(0)

    forward = sum(i * j for i, j in zip(widths, widths[1:], strict=False))
    pullback = 2 * forward - widths[0] * widths[1]  # no cotangent of the inputs
    floor = (forward + m * pullback) / (forward + pullback)
    return model_fn, params, (torch.randn(size, width), torch.randn(size, m)), floor


def torchjd_step(
    model_fn: Callable[..., Tensor], params: dict[str, Tensor], batch: Any
) -> Callable[[], object]:
    """The peer's Jacobian and its UPGrad."""
    tracked = {k: p.clone().requires_grad_() for k, p in params.items()}
    aggregator, values = UPGrad(), list(tracked.values())

    def step() -> None:
        for value in values:
            value.grad = None
        backward(list(model_fn(tracked, {}, batch)))
        jac_to_grad(values, aggregator)

    return step


def print_tasks(budget: float) -> None:
    """Task-wise steps, compiled, against the peer and against one plain gradient.

    The bar in gradients is for three tasks; m pullbacks take at least what stands as floor.
    """
    print(
        f"{'one loss per task':<28}{'compiled ms':>12}{'torchjd/ours':>14}  bar"
        f"{'ours/gradient':>15}  bar{'floor':>8}{'/eager gradient':>17}{'eager/compiled':>16}"
    )
    rows = [(m, 64, 128) for m in TASKS] + [(3, 128, 256)]
    for m, width, size in rows:
        model_fn, params, batch, floor = of_tasks(m, width, size)
        gradient = torch.func.grad(lambda p, b, f=model_fn: f(p, {}, b).sum())
        for name, linearize in {"structured": jd.structured, "dense": jd.dense}.items():
            step = partial(jd.jd_step, model_fn, linearize=linearize)
            torch.compiler.reset()
            ours = torch.compile(lambda p, b, step=step: step(p, b), fullgraph=True)
            plain = torch.compile(lambda p, b, g=gradient: g(p, b), fullgraph=True)
            runs: list[Callable[[], object]] = [
                partial(ours, params, batch),
                partial(plain, params, batch),
                torchjd_step(model_fn, params, batch),
                partial(gradient, params, batch),
                partial(step, params, batch),
            ]
            for run in runs:
                run()
            fast, one, peer, eager_one, slow = (median(t) for t in interleaved(runs, budget))
            print(
                f"{f'{width}-{4 * width}-{4 * width}-{m} {name}':<28}{fast * 1e3:>12.2f}"
                f"{marked(peer / fast, TASKS_FASTER if width == 64 else 0, least=True):>19}"
                f"{marked(fast / one, TASKS_SLOWER if m == 3 else math.inf, least=False):>20}"
                f"{floor:>8.2f}{fast / eager_one:>17.2f}{slow / fast:>16.2f}",
                flush=True,
            )


# --- rematerialisation --------------------------------------------------------------------------


def of_blocks(remat: bool, size: int = 2048, width: int = 256, count: int = 6) -> Any:
    """A step of residual blocks, each of which holds many times its input inside."""
    torch.manual_seed(0)
    params = [
        (torch.randn(4 * width, width) / width**0.5, torch.randn(width, 4 * width) / width)
        for _ in range(count)
    ]

    def block(pair: Any, x: Tensor) -> Tensor:
        return x + F.linear(F.linear(x, pair[0]).tanh().sin().sigmoid(), pair[1])

    inner = jd.remat(block) if remat else block

    def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
        for pair in params:
            x = inner(pair, x)
        return torch.stack([x.square().mean(), x.sin().mean()])

    def step(params: Any, x: Tensor) -> Any:
        return jd.jd_step(model_fn, params, x, linearize=matrix_free)

    return step, params, torch.randn(size, width)


def measured(way: str) -> tuple[float, float]:
    """Peak of this process in MB above what is there after a step, and seconds of a step."""
    step, params, x = of_blocks(way.endswith("remat"))
    if way.startswith("compiled"):
        run, _ = compiled(step, params, x)
    else:
        run = partial(step, params, x)
        run()
    if CLEAR.exists():
        CLEAR.write_text("5")  # the peak so far is forgotten
    before = _peak()
    for _ in range(2):
        run()
    peak = _peak() - before
    return peak, median(interleaved([run], 2.0)[0])


def print_remat() -> None:
    """Memory and time of a step of blocks, each way in a process of its own."""
    print(f"{'six blocks, m=2':<22}{'peak MB':>10}{'of plain':>10}{'ms':>10}{'of plain':>10}")
    for mode in ("eager", "compiled"):
        plain = None
        for kind in ("plain", "remat"):
            command = [sys.executable, "-W", "ignore", __file__, "--measure", f"{mode} {kind}"]
            run = subprocess.run(command, check=True, capture_output=True, text=True, env=RETURNED)
            peak, seconds = (float(x) for x in run.stdout.split())
            plain = plain or (peak, seconds)
            print(
                f"{f'{mode} {kind}':<22}{peak:>10.1f}{peak / plain[0]:>10.2f}"
                f"{seconds * 1e3:>10.1f}{seconds / plain[1]:>10.2f}",
                flush=True,
            )


# --- memory -------------------------------------------------------------------------------------


def print_memory(quick: bool) -> None:
    """Peak of the Gramian of ten losses over n, the elements of one gradient."""
    ways: dict[str, Any] = {
        "gradient": None,
        "matrix_free": matrix_free,
        "matrix_free 2": partial(matrix_free, chunk_size=2),
        "sketched": sketched(32, 0),
        "dense": jd.dense,
    }
    print(f"{'peak / n, m=10, b=8':<22}" + "".join(f"{name:>15}" for name in ways))
    for width in (128, 512) if quick else (128, 512, 2048):
        torch.manual_seed(0)
        params = [torch.randn(width, width) / width**0.5 for _ in range(4)]

        def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
            for w in params:
                x = torch.tanh(x @ w)
            return x[:, :10].square().mean(0)

        x, n = torch.randn(8, width), 4 * width**2
        total = torch.func.grad(lambda p, x=x, f=model_fn: f(p, {}, x).sum())
        cells = []
        for way in ways.values():
            with LiveBytes() as live:
                total(params) if way is None else way(model_fn, params, x).gram()
            cells.append(live.peak / (4 * n))
        print(f"{f'n={n}':<22}" + "".join(f"{cell:>15.2f}" for cell in cells), flush=True)


def main() -> None:
    """Print the tables that the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller models")
    parser.add_argument("--only", default="", help="examples, tasks, remat or memory")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the compiler
    budget = 0.7 if options.quick else 3.0
    if options.measure:
        print(*measured(options.measure))
        return
    tables: dict[str, Callable[[], None]] = {
        "examples": partial(print_examples, budget),
        "tasks": partial(print_tasks, budget),
        "remat": print_remat,
        "memory": partial(print_memory, options.quick),
    }
    for name, table in tables.items():
        if name.startswith(options.only):
            table()


if __name__ == "__main__":
    main()

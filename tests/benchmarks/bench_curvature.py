"""Cost of KFAC and EKFAC against curvlinops 3.0.1.

    python tests/benchmarks/bench_curvature.py [--quick] [--only mlp] [--memory] [--operations]
        [--peer]

CPU process time, one process, one thread, in turns, the best of each; float32, cross entropy
(mean), joint biases, expand, one batch, the number of examples given. Finding the layout is not
timed; factors, eigenvectors and eigenvalues are. Beside each ratio stands its bar. Without an
option the table of the estimates is printed; each option prints its own in its place, `--peer` the
stages of curvlinops alone.
"""

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_structured import CLEAR, _peak
from clocks import interleaved
from torch import Tensor, nn
from training import FusedBlock

from jdfunc import curvature as cv

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts a function when it is imported
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator

CLASSES, DAMPING = 10, 1e-3


class Case(NamedTuple):
    """A model, the parameters that count, and a batch."""

    model: nn.Module
    params: dict[str, Tensor]
    batch: tuple[Tensor, Tensor]


class Classifier(nn.Module):
    """Two blocks, mean over the positions, a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(FusedBlock(width, 4, causal=False) for _ in range(2)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


def _case(model: nn.Module, *shape: int) -> Case:
    params = {name: p for name, p in model.named_parameters() if ".norm" not in name}
    return Case(model, params, (torch.rand(shape), torch.randint(CLASSES, shape[:1])))


def mlp(size: int = 512, width: int = 1024) -> Case:
    """784-width-width-10."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, CLASSES),
    )
    return _case(model, size, 784)


def conv(size: int = 64) -> Case:
    """Three convolutions and a head on the mean of the last."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)),
    )
    return _case(model, size, 3, 32, 32)


def transformer(size: int = 32, length: int = 32, width: int = 64) -> Case:
    """Two blocks; the parameters of the norms are left out on both sides."""
    torch.manual_seed(0)
    return _case(Classifier(width), size, length, width)


MODELS: dict[str, Callable[[], Case]] = {"mlp": mlp, "conv": conv, "transformer": transformer}
TINY = {
    "mlp": partial(mlp, 2, 8),
    "conv": partial(conv, 2),
    "transformer": partial(transformer, 2, 2, 8),
}
FISHERS: dict[str, Callable[[], Any]] = {
    "type2": cv.type2,
    "mc": partial(cv.monte_carlo, 1),
    "empirical": cv.empirical,
}
PEER_FISHERS = {"type2": "type-2", "mc": "mc", "empirical": "empirical"}
METHODS = {"ekfac": (cv.ekfac, EKFACLinearOperator), "kfac": (cv.kfac, KFACLinearOperator)}
# How many times as fast as the peer, at least.
BARS = {("ekfac", "type2"): 2.0, ("ekfac", "mc"): 1.3, ("ekfac", "empirical"): 1.3}
KFAC_BAR = 0.9
OPERATION_BAR = 1.0
# Peak memory: at most max(factor x peer, peer + MB), by chunk size.
MEMORY_BARS = {None: (2.0, 64.0), 1: (1.2, 32.0)}


def peer_operator(case: Case, method: str, fisher: str) -> Any:
    """The peer's operator; nothing is computed yet."""
    return METHODS[method][1](
        case.model,
        nn.CrossEntropyLoss(),
        list(case.params.values()),
        [case.batch],
        fisher_type=PEER_FISHERS[fisher],
        separate_weight_and_bias=False,
        check_deterministic=False,
        num_data=len(case.batch[0]),
        num_per_example_loss_terms=1,
    )


def peer_stages(operator: Any) -> dict[str, Callable[[], object]]:
    """What the peer computes, in its order."""
    stages = {"factors": operator.compute_kronecker_factors}
    if isinstance(operator, EKFACLinearOperator):
        stages["eigh"] = operator._compute_eigenvectors
        stages["eigenvalues"] = operator.compute_eigenvalue_correction
    return stages


def peer_estimate(case: Case, method: str, fisher: str) -> Any:
    """The peer's estimate, all of it."""
    operator = peer_operator(case, method, fisher)
    for stage in peer_stages(operator).values():
        stage()
    return operator


def our_estimate(
    case: Case, method: str, fisher: str, chunk_size: int | None = None
) -> Callable[[], Any]:
    """Our estimate, its layout known."""
    params = {name: p.detach() for name, p in case.params.items()}
    rest = {k: p.detach() for k, p in case.model.named_parameters() if k not in params}

    def apply(params: Any, buffers: Any, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(case.model, {**params, **buffers}, (inputs,))

    layout = cv.curvature_layout(apply, params, rest, case.batch[0])
    est = METHODS[method][0](
        layout,
        likelihood=cv.cross_entropy(reduction=cv.mean),
        fisher=FISHERS[fisher](),
        sharing=cv.expand,
        joint_bias=True,
        chunk_size=chunk_size,
    )
    return partial(cv.build, est, params, rest, [case.batch], 0)


def bar_of(method: str, fisher: str) -> float:
    return BARS.get((method, fisher), KFAC_BAR)


def mark(miss: bool) -> str:
    return "*" if miss else " "


def rows(only: str) -> list[tuple[str, str, str]]:
    """Model, method and Fisher of each row."""
    return [
        (name, method, fisher)
        for method in METHODS
        for name in MODELS
        for fisher in FISHERS
        if name.startswith(only)
    ]


def print_estimates(only: str, budget: float) -> None:
    """The table of the estimates."""
    print(f"{'ms':<30}{'jdfunc':>10}{'curvlinops':>12}{'curvlinops/ours':>17}{'bar':>6}")
    for name, method, fisher in rows(only):
        case = MODELS[name]()
        fns = [our_estimate(case, method, fisher), partial(peer_estimate, case, method, fisher)]
        for fn in fns:
            fn()
        ours, theirs = (times[0] for times in interleaved(fns, budget, fewest=4))
        bar = bar_of(method, fisher)
        print(
            f"{f'{method} {name} {fisher}':<30}{ours * 1e3:>10.1f}{theirs * 1e3:>12.1f}"
            f"{theirs / ours:>16.2f}{mark(theirs / ours < bar)}{bar:>6}",
            flush=True,
        )


def print_peer(only: str, runs: int) -> None:
    """The stages of the peer, the best of each."""
    print(f"{'curvlinops, ms':<30}{'factors':>10}{'eigh':>10}{'eigenvalues':>13}{'all':>10}")
    for name, method, fisher in rows(only):
        case, records = MODELS[name](), []
        for _ in range(runs + 1):
            record = {}
            for stage, fn in peer_stages(peer_operator(case, method, fisher)).items():
                begin = time.process_time()
                fn()
                record[stage] = time.process_time() - begin
            records.append(record)
        best = min(records[1:], key=lambda record: sum(record.values()))
        cells = [best.get(stage, 0.0) for stage in ("factors", "eigh", "eigenvalues")]
        print(
            f"{f'{method} {name} {fisher}':<30}{cells[0] * 1e3:>10.1f}{cells[1] * 1e3:>10.1f}"
            f"{cells[2] * 1e3:>13.1f}{sum(cells) * 1e3:>10.1f}",
            flush=True,
        )


def print_operations(only: str, budget: float) -> None:
    """One product, one solve, and eight of each in one call."""
    print(
        f"{'ms':<30}{'jdfunc':>10}{'curvlinops':>12}{'curvlinops/ours':>17}{'bar':>6}"
        f"{'eight':>10}{'8 calls/eight':>15}{'bar':>6}"
    )
    for name, method, _ in (row for row in rows(only) if row[2] == "type2"):
        case = MODELS[name]()
        curv, operator = our_estimate(case, method, "type2")(), peer_estimate(case, method, "type2")
        inverse = KFACInverseLinearOperator(operator, damping=DAMPING, use_exact_damping=True)
        vector = {k: torch.randn_like(p) for k, p in case.params.items()}
        eight = {k: torch.randn(8, *p.shape) for k, p in case.params.items()}
        column = [v[..., None] for v in vector.values()]
        # Both keep what a damping needs from the first solve on.
        for title, ours, theirs in (
            ("matvec", partial(cv.matvec, curv), operator),
            ("solve", cv.inverse(curv, cv.exact(DAMPING)), inverse),
        ):
            fns = [partial(ours, vector), partial(theirs._matmat, column), partial(ours, eight)]
            for fn in fns:
                fn()
            mine, peer, at_once = (times[0] for times in interleaved(fns, budget, fewest=4))
            print(
                f"{f'{method} {name} {title}':<30}{mine * 1e3:>10.2f}{peer * 1e3:>12.2f}"
                f"{peer / mine:>16.2f}{mark(peer / mine < OPERATION_BAR)}{OPERATION_BAR:>6}"
                f"{at_once * 1e3:>10.2f}{8 * mine / at_once:>14.2f}{mark(8 * mine < at_once)}"
                f"{OPERATION_BAR:>6}",
                flush=True,
            )


def print_memory(only: str, peer: bool) -> None:
    """Growth of the resident memory of one estimate, in fresh processes."""
    print(f"{'peak MB':<30}{'curvlinops':>12}{'jdfunc':>10}{'bar':>8}{'chunks of 1':>13}{'bar':>8}")
    for row in rows(only):
        theirs = _in_child(row, "peer")
        print(f"{'{1} {0} {2}'.format(*row):<30}{theirs:>12.1f}", end="", flush=True)
        for chunk_size, (factor, more) in () if peer else MEMORY_BARS.items():
            found, bar = _in_child(row, str(chunk_size)), max(factor * theirs, theirs + more)
            width = 10 if chunk_size is None else 13
            print(f"{found:>{width}.1f}{bar:>7.0f}{mark(found > bar)}", end="", flush=True)
        print(flush=True)


def _in_child(row: tuple[str, str, str], side: str) -> float:
    command = [sys.executable, __file__, "--measure", *row, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measured(name: str, method: str, fisher: str, side: str) -> float:
    """Peak memory of one estimate in MB above what is there after one of a tiny model."""
    chunk_size = int(side) if side.isdigit() else None
    fns = []
    for case in (TINY[name](), MODELS[name]()):
        ours = side != "peer"
        fns.append(
            our_estimate(case, method, fisher, chunk_size)
            if ours
            else partial(peer_estimate, case, method, fisher)
        )
    fns[0]()
    if CLEAR.exists():
        CLEAR.write_text("5")  # the peak so far is forgotten
    before = _peak()
    kept = fns[1]()
    after = _peak()
    del kept
    return after - before


def main() -> None:
    """Print the table that the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--only", default="", help="models whose name starts so")
    parser.add_argument("--memory", action="store_true", help="peak memory, in fresh processes")
    parser.add_argument("--operations", action="store_true", help="products and solves")
    parser.add_argument("--peer", action="store_true", help="the stages of the peer alone")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        print(measured(*options.measure))
    elif options.memory:
        print_memory(options.only, options.peer)
    elif options.peer:
        print_peer(options.only, 4 if options.quick else 6)
    elif options.operations:
        print_operations(options.only, 0.3 if options.quick else 1.0)
    else:
        print_estimates(options.only, 1.0 if options.quick else 4.0)


if __name__ == "__main__":
    main()

"""Timing that the benchmarks share: CPU process time, functions in turns."""

import time
from collections.abc import Callable, Sequence


def interleaved(
    fns: Sequence[Callable[[], object]], budget: float, *, fewest: int = 3, most: int = 60
) -> list[list[float]]:
    """Sorted process times of each function in seconds, run in turns.

    A function leaves the turns once it has had ``fewest`` of them and ``budget`` seconds.
    """
    times: list[list[float]] = [[] for _ in fns]
    for turn in range(most):
        for fn, record in zip(fns, times, strict=True):
            if turn >= fewest and sum(record) > budget:
                continue
            begin = time.process_time()
            fn()
            record.append(time.process_time() - begin)
    return [sorted(record) for record in times]


def median(times: Sequence[float]) -> float:
    """The middle one of sorted times."""
    return times[len(times) // 2]

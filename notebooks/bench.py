"""Time per step against torchjd, on this machine; the directions are compared before the clocks.

Both libraries go from parameters and batch to `.grad`, with UPGrad. Run with `make bench`.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchjd.aggregation import UPGrad, UPGradWeighting
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad

import jdfunc as jd

Steps = dict[str, tuple[nn.Module, Callable[[], None]]]  # by library: what is trained, one step


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """A small convolutional and a wide fully connected network, each with a batch of 32."""
    cnn = nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 12 * 12, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    mlp = nn.Sequential(
        *(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    )
    return {"cnn": (cnn, torch.randn(32, 1, 28, 28)), "mlp": (mlp, torch.randn(32, 64))}


def instance_wise(model: nn.Module, x: Tensor, y: Tensor) -> Steps:
    """One objective per example: `jd_step` against the autogram engine."""

    def model_fn(params, buffers, batch):
        logits = torch.func.functional_call(model, params, (batch[0],))
        return F.cross_entropy(logits, batch[1], reduction="none")

    def ours():
        params = dict(model.named_parameters())
        jd.assign_grads(model, jd.jd_step(model_fn, params, (x, y), batch_dim=0))

    hooked = copy.deepcopy(model)  # the engine leaves hooks on its modules
    engine, weighting = Engine(hooked, batch_dim=0), UPGradWeighting()

    def theirs():
        losses = F.cross_entropy(hooked(x), y, reduction="none")
        losses.backward(weighting(engine.compute_gramian(losses)))

    return {"jdfunc": (model, ours), "torchjd": (hooked, theirs)}


def multi_task(model: nn.Module, x: Tensor, y: Tensor) -> Steps:
    """Two task losses: `jd_step` against autojac."""

    def tasks(logits: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(logits, y), logits.square().mean()])

    def model_fn(params, buffers, batch):
        return tasks(torch.func.functional_call(model, params, (batch,)))

    def ours():
        jd.assign_grads(model, jd.jd_step(model_fn, dict(model.named_parameters()), x))

    def theirs():
        backward(tasks(model(x)))
        jac_to_grad(model.parameters(), UPGrad())

    return {"jdfunc": (model, ours), "torchjd": (model, theirs)}


def measure(steps: Steps, repeats: int) -> tuple[dict[str, float], float]:
    """Median milliseconds of each step, in turns, and the cosine of the two directions."""
    directions, times = {}, {name: [] for name in steps}
    for _ in range(repeats + 2):  # two to warm up
        for name, (model, step) in steps.items():
            model.zero_grad()
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
            directions[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    cosine = F.cosine_similarity(*directions.values(), dim=0).item()
    return {name: 1e3 * statistics.median(values[2:]) for name, values in times.items()}, cosine


def main() -> None:
    """Print one line per problem and network."""
    parser = argparse.ArgumentParser(description="time per step against torchjd")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{'problem':14} {'model':5} {'jdfunc ms':>10} {'torchjd ms':>10}  cosine of directions")
    for name, (model, x) in networks().items():
        y = torch.randint(10, (len(x),))
        for problem in (instance_wise, multi_task):
            times, cosine = measure(problem(model, x, y), options.repeats)
            ours, theirs = times["jdfunc"], times["torchjd"]
            print(f"{problem.__name__:14} {name:5} {ours:10.1f} {theirs:10.1f}  {cosine:.5f}")


if __name__ == "__main__":
    main()

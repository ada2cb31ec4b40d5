"""Jacobian descent on handwritten digits: one table and three figures in a minute or two.

Two problems, each trained with the mean gradient (ordinary SGD) and with Jacobian descent:

instance-wise  Every example of a batch is an objective (Quinton and Rey, arXiv:2406.16232,
               section 6, at a smaller scale): a small CNN, 32 objectives per step. Parameters are
               a dict and an update is an expression.
multi-task     Two objectives that no network can meet at once: the class probabilities p should
               name the digit y, and the digit they expect, sum_k k p_k, should be 9 - y. The
               direction goes through `jd.assign_grads` to an unchanged `torch.optim.SGD`.

As in the paper, the learning rate of each method is the one with the smallest area under the
training-loss curve; it is found on pilot seeds that are not reported.
Run with `make demo` or `python notebooks/demo.py --seeds 5 --epochs 20 --out figures`.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import jdfunc as jd

METHODS = {"mean": jd.mean, "upgrad": jd.upgrad, "mgda": jd.mgda, "dualproj": jd.dualproj}
RATES = {"instance-wise": (0.05, 0.1, 0.2, 0.5, 1.0), "multi-task": (0.2, 0.5, 1.0, 2.0, 5.0)}
PILOT_SEEDS, N_TRAIN, BATCH_SIZE = (1_000, 1_001, 1_002), 320, 32
EPOCH = N_TRAIN // BATCH_SIZE  # steps
TOLERANCE = 1e-5  # smaller relative margins are rounding of float32
DIGITS = torch.arange(10.0)


class Data(NamedTuple):
    """Images [b, 1, 8, 8] in [0, 1] and labels [b], for training and for the test."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


class Run(NamedTuple):
    """What one training run leaves behind; a row per step."""

    losses: Tensor  # [steps, m]: on the batch, before the step
    worst: Tensor  # [steps]: change of the worst-off objective to first order, -lr min_i (G w)_i
    conflicts: Tensor  # [steps]: is the direction against the gradient of some objective?
    opposed: Tensor  # [steps]: share of the pairs of objectives with a negative cosine
    cosines: tuple[Tensor, Tensor]  # [m, m]: G with unit diagonal, at the first and last step
    seconds: Tensor  # [steps]: direction and update
    accuracy: float  # on the test images
    test_losses: tuple[float, ...]  # multi-task: name the digit, expect the reversed digit


def digits(seed: int) -> Data:
    """Split scikit-learn's 1,797 digits at random into N_TRAIN training images and the rest."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(pixels, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)[order]
    return Data(x[:N_TRAIN], y[:N_TRAIN], x[N_TRAIN:], y[N_TRAIN:])


def batches(data: Data, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of BATCH_SIZE, `epochs` times over the training images; sorted inside."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(N_TRAIN, generator=generator).split(BATCH_SIZE):
            index = index[data.y[index].argsort(stable=True)]  # for the picture of the Gramian
            yield data.x[index], data.y[index]


def summary(
    infos: list[jd.JDInfo], seconds: list[float], lr: float, accuracy: float, *test_losses: float
) -> Run:
    """Everything reported about a run follows from the losses, G and w of its steps."""
    gramians = torch.stack([info.gramian for info in infos])  # [steps, m, m]
    weights = torch.stack([info.weights for info in infos])  # [steps, m]
    m = weights.shape[-1]
    norms = gramians.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(1e-30)
    cosines = gramians / norms[:, :, None] / norms[:, None, :]
    slopes = (gramians @ weights[:, :, None])[:, :, 0]  # inner products of g_i and J'w
    return Run(
        losses=torch.stack([info.losses for info in infos]),
        worst=-lr * slopes.amin(-1),
        conflicts=~(jd.weightings.conflict_margin(gramians, weights) >= -TOLERANCE),
        opposed=(cosines < 0).float().sum((-2, -1)) / (m * (m - 1)),
        cosines=(cosines[0], cosines[-1]),
        seconds=torch.tensor(seconds),
        accuracy=accuracy,
        test_losses=test_losses,
    )


def instance_wise(weighting: Callable, lr: float, epochs: int, seed: int) -> Run:
    """One objective per example; parameters are a dict, an update is an expression."""
    torch.manual_seed(seed)
    data = digits(seed)
    cnn = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ELU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ELU(), nn.Flatten()),
        *(nn.Linear(256, 64), nn.ELU(), nn.Linear(64, 10)),
    )
    apply, params, buffers = jd.model_to_function(cnn)

    def losses(params, buffers, batch):
        x, y = batch
        logits, _ = apply(params, buffers, x)
        return F.cross_entropy(logits, y, reduction="none")

    infos, seconds = [], []
    for batch in batches(data, epochs, seed):
        start = time.perf_counter()
        info, grads = jd.value_and_jd_step(
            losses, params, batch, buffers=buffers, weighting=weighting, batch_dim=0
        )
        params = {name: p - lr * grads[name] for name, p in params.items()}
        seconds.append(time.perf_counter() - start)
        infos.append(info)
    with torch.no_grad():
        logits, _ = apply(params, buffers, data.x_test)
    accuracy = (logits.argmax(1) == data.y_test).float().mean().item()
    return summary(infos, seconds, lr, accuracy)


def multi_task(weighting: Callable, lr: float, epochs: int, seed: int) -> Run:
    """Two objectives that pull the same parameters apart; `torch.optim.SGD` makes the step."""
    torch.manual_seed(seed)
    data = digits(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def losses(params, buffers, batch):
        x, y = batch
        logits = torch.func.functional_call(model, params, (x,))
        expected = logits.softmax(-1) @ DIGITS
        reversed_digit = F.mse_loss(expected / 4.5, (9 - y) / 4.5)
        return torch.stack([F.cross_entropy(logits, y), reversed_digit])

    infos, seconds = [], []
    for batch in batches(data, epochs, seed):
        start = time.perf_counter()
        info, grads = jd.value_and_jd_step(losses, params, batch, weighting=weighting)
        jd.assign_grads(model, grads)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        infos.append(info)
    with torch.no_grad():
        test_losses = losses(params, {}, (data.x_test, data.y_test)).tolist()
        accuracy = (model(data.x_test).argmax(1) == data.y_test).float().mean().item()
    return summary(infos, seconds, lr, accuracy, *test_losses)


PROBLEMS = {"instance-wise": instance_wise, "multi-task": multi_task}


def area(run: Run) -> float:
    """Area under the training-loss curve, per step; infinite if the run diverged."""
    return run.losses.mean().nan_to_num(nan=math.inf).item()


def compare(seeds: int, epochs: int) -> dict[tuple[str, str], tuple[float, list[Run]]]:
    """Learning rate and runs of every (problem, method)."""
    results = {}
    total = len(METHODS) * sum(len(RATES[p]) * len(PILOT_SEEDS) + seeds for p in PROBLEMS)
    with tqdm(total=total, unit="run", ncols=90, mininterval=1) as bar:

        def run(problem: str, method: str, lr: float, seed: int) -> Run:
            bar.set_description(f"{problem} {method} lr={lr:g}", refresh=False)
            result = PROBLEMS[problem](METHODS[method], lr, epochs, seed)
            bar.update()
            return result

        for problem in PROBLEMS:
            for method in METHODS:
                areas = {
                    lr: sum(area(run(problem, method, lr, seed)) for seed in PILOT_SEEDS)
                    for lr in RATES[problem]
                }
                lr = min(areas, key=areas.__getitem__)
                results[problem, method] = lr, [run(problem, method, lr, s) for s in range(seeds)]
    return results


def spread(values: list[float], places: int = 3) -> str:
    """Mean and, for several seeds, standard deviation."""
    column = torch.tensor(values, dtype=torch.float64)
    deviation = f" ±{column.std():.{places}f}" if len(values) > 1 else ""
    return f"{column.mean():.{places}f}{deviation}"


def table(results: dict) -> str:
    """The comparison as text, one row per problem and method."""
    header = "problem|method|lr|train loss|test acc. %|test losses|opposed %|conflicts %|ms/step"
    rows = [header.split("|")]
    for (problem, method), (lr, runs) in results.items():
        test_losses = zip(*(run.test_losses for run in runs), strict=True)
        rows.append([
            *(problem, method, f"{lr:g}"),
            spread([run.losses[-EPOCH:].mean().item() for run in runs]),
            spread([100 * run.accuracy for run in runs], 1),
            ", ".join(spread(list(values)) for values in test_losses) or "-",
            f"{100 * torch.stack([run.opposed for run in runs]).mean():.0f}",
            f"{100 * torch.stack([run.conflicts for run in runs]).float().mean():.1f}",
            f"{1e3 * torch.stack([run.seconds for run in runs]).median():.1f}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def band(axis: plt.Axes, curves: Tensor, label: str) -> None:
    """Mean and range over the seeds of curves [seeds, steps], averaged over an epoch of steps."""
    smooth = curves.unfold(1, EPOCH, 1).mean(-1)
    steps = torch.arange(smooth.shape[1]) + EPOCH
    (line,) = axis.plot(steps, smooth.mean(0), label=label)
    axis.fill_between(steps, smooth.amin(0), smooth.amax(0), color=line.get_color(), alpha=0.15)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)


def plot_losses(results: dict) -> plt.Figure:
    """Training losses: mean over the examples, and each of the two tasks."""
    panels = {
        "instance-wise: mean over the examples": ("instance-wise", slice(None)),
        "multi-task: name the digit": ("multi-task", slice(0, 1)),
        "multi-task: expect the reversed digit": ("multi-task", slice(1, 2)),
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, (title, (problem, columns)) in zip(axes, panels.items(), strict=True):
        for method in METHODS:
            lr, runs = results[problem, method]
            curves = torch.stack([run.losses[:, columns].mean(-1) for run in runs])
            band(axis, curves, f"{method} (lr {lr:g})")
        axis.set(title=title, ylabel="training loss")
        axis.legend()
    axes[0].set_yscale("log")
    return figure


def plot_cosines(results: dict) -> plt.Figure:
    """Gramian of an instance-wise batch, unit diagonal, at both ends of a run."""
    _, runs = results["instance-wise", "upgrad"]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained")
    for axis, cosines, when in zip(axes, runs[0].cosines, ("first", "last"), strict=True):
        image = axis.imshow(cosines.numpy(), cmap="RdBu", vmin=-1, vmax=1)
        axis.set(title=f"{when} step", xlabel="example j, sorted by digit", ylabel="example i")
    figure.colorbar(image, ax=axes, label=r"cosine $G_{ij}\,/\,\sqrt{G_{ii}\,G_{jj}}$")
    figure.suptitle("Gramian of the per-example gradients (instance-wise, upgrad)")
    return figure


def plot_worst(results: dict) -> plt.Figure:
    """How the worst-off objective of each step fares, to first order."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, problem in zip(axes, PROBLEMS, strict=True):
        for method in METHODS:
            lr, runs = results[problem, method]
            band(axis, torch.stack([run.worst for run in runs]), f"{method} (lr {lr:g})")
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=problem, ylabel=r"$\max_i\ -\eta\,(Gw)_i$")
        axis.set_yscale("symlog", linthresh=1e-2)
        axis.legend()
    figure.suptitle("Predicted change of the worst-off objective (above 0: it gets worse)")
    return figure


FIGURES = {"losses": plot_losses, "cosines": plot_cosines, "worst": plot_worst}


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table, save table and figures."""
    parser = argparse.ArgumentParser(description="Jacobian descent on handwritten digits")
    parser.add_argument("--seeds", type=int, default=3, help="reported seeds")
    parser.add_argument("--epochs", type=int, default=10, help=f"passes over {N_TRAIN} images")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder to write to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # models this small gain nothing from more, and lose on a busy machine
    start = time.perf_counter()
    results = compare(options.seeds, options.epochs)
    text = f"""{table(results)}

lr           of {RATES}, by the area under the training-loss curve on {len(PILOT_SEEDS)} pilot seeds
train loss   mean over the objectives and the last epoch; ± is the standard deviation of {options.seeds} seeds
test losses  multi-task: name the digit, expect the reversed digit
opposed      pairs of objectives whose gradients have a negative cosine
conflicts    steps whose direction has a negative inner product with the gradient of some objective
ms/step      median time of direction and update
"""  # noqa: E501
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.txt").write_text(text)
    for name, plot in FIGURES.items():
        figure = plot(results)
        figure.savefig(options.out / f"{name}.png", dpi=120)
        plt.close(figure)
    print(f"\n{text}\n{time.perf_counter() - start:.0f} s; table and figures in {options.out}")


if __name__ == "__main__":
    main()

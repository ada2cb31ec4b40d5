"""The models of the benchmark of steps, and one training step of each kind for each of them.

Every step ends with the update of the parameters, by a learning rate of zero: all measure at one
point.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchjd.aggregation import UPGradWeighting
from torchjd.autogram import Engine

import jdfunc as jd

RATE = 0.0


class Case(NamedTuple):
    """A model with its batch; `forward` gives one loss per example."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    forward: Callable[[Callable[[Tensor], Tensor], tuple[Tensor, Tensor]], Tensor]


def per_example(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def per_sequence(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the next tokens of each sequence."""
    return F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").mean(-1)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Classifier(nn.Module):
    """Blocks on a sequence of vectors, mean over the positions, a linear head."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)).mean(1))


class FusedBlock(nn.Module):
    """Pre-norm block with one projection for queries, keys and values, causal or not."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Causal blocks whose head is the embedding: as a layer of its own, or used by the parent."""

    def __init__(
        self, vocabulary: int, width: int, length: int, blocks: int, *, head: bool = True
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(FusedBlock(width, 4, causal=True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.head = nn.Linear(width, vocabulary, bias=False) if head else None
        if self.head is not None:
            self.head.weight = self.tokens.weight
        self.register_buffer("order", torch.arange(length), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places(self.order.expand(x.shape))
        x = self.norm(self.blocks(x))
        return F.linear(x, self.tokens.weight) if self.head is None else self.head(x)


def mlp(size: int, width: int = 1024) -> Case:
    """MLP 784-width-width-10."""
    model = nn.Sequential(
        *(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 10),
    )
    return Case(model, (torch.randn(size, 784), torch.randint(10, (size,))), per_example)


def cnn(size: int) -> Case:
    """The network of the Jacobian descent paper for MNIST."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, groups=32), nn.MaxPool2d(2)),
        *(nn.ReLU(), nn.Conv2d(64, 64, 3, groups=64), nn.MaxPool2d(3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(576, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    return Case(model, (torch.randn(size, 1, 28, 28), torch.randint(10, (size,))), per_example)


def transformer(size: int, length: int = 16, width: int = 128) -> Case:
    """Four pre-norm blocks and a head."""
    batch = torch.randn(size, length, width), torch.randint(10, (size,))
    return Case(Classifier(width, 4), batch, per_example)


def gpt(size: int, length: int = 64, *, head: bool = True) -> Case:
    """Two causal blocks of width 64 with one matrix for embedding and head."""
    batch = torch.randint(101, (size, length)), torch.randint(101, (size, length))
    return Case(GPT(101, 64, length, 2, head=head), batch, per_sequence)


def model_fn_of(case: Case) -> Callable[..., Tensor]:
    """The pure function that jdfunc takes."""

    def model_fn(params, buffers, batch):
        def call(x: Tensor) -> Tensor:
            return torch.func.functional_call(case.model, params, (x,))

        return case.forward(call, batch)

    return model_fn


def jdfunc_step(case: Case) -> Callable[[], object]:
    """`jd_step`, one objective per example, and the update."""
    model_fn, params = model_fn_of(case), dict(case.model.named_parameters())

    def step():
        grads = jd.jd_step(model_fn, params, case.batch, batch_dim=0, weighting=jd.upgrad)
        _update((p, grads[name]) for name, p in params.items())

    return step


def torchjd_step(case: Case) -> Callable[[], object]:
    """The autogram engine, its weights, the backward pass of the weighted losses, the update."""
    model = copy.deepcopy(case.model)  # the engine leaves hooks on its modules
    engine, weighting, params = Engine(model, batch_dim=0), UPGradWeighting(), [*model.parameters()]

    def step():
        model.zero_grad()
        losses = case.forward(model, case.batch)
        losses.backward(weighting(engine.compute_gramian(losses)))
        _update((p, p.grad) for p in params)

    return step


def sgd_step(case: Case) -> Callable[[], object]:
    """The plain step: the gradient of the mean loss, and the update."""
    model = copy.deepcopy(case.model)
    params = [*model.parameters()]

    def step():
        model.zero_grad()
        case.forward(model, case.batch).mean().backward()
        _update((p, p.grad) for p in params)

    return step


def _update(pairs) -> None:
    with torch.no_grad():
        for p, grad in pairs:
            p.sub_(grad, alpha=RATE)


STEPS = {"jdfunc": jdfunc_step, "torchjd": torchjd_step, "sgd": sgd_step}

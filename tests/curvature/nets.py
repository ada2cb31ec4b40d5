"""Small networks in float64, one or more for every kind of layer that curvature knows.

Each is a pure `apply(params, buffers, inputs) -> outputs [b, *terms, C]` on a flat dict of
parameters; `build(seed=2)` gives other data and `build(size=)` another number of examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from models import Fn, images, randn, seq, tokens
from torch import Tensor, nn

Problem = tuple[Callable[..., Tensor], Any, Any, Any]


class Net(NamedTuple):
    """A network.

    Attributes:
        name: its name.
        build: ``(seed=1, size=None) -> (apply, params, buffers, inputs)``.
        module: makes the module, if all of its parameters are those of linear layers and
            convolutions that are used once: then hooks see all that KFAC needs.
        terms: how many axes the outputs have between the examples and the classes.
        batch_axis: of the inputs.
        unused: the names of parameters that the outputs do not depend on.
    """

    name: str
    build: Callable[..., Problem]
    module: Callable[[], nn.Module] | None = None
    terms: int = 0
    batch_axis: int = 0
    unused: tuple[str, ...] = ()


def module_net(
    name: str,
    make: Callable[[], nn.Module],
    data: Callable[[int], Any],
    *,
    size: int = 4,
    layers: bool = False,
    **kwargs: Any,
) -> Net:
    """A net around a module."""
    default_size = size

    def module() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = make().double().eval()
            with torch.no_grad():
                for param in made.parameters():  # biases and scales off their special values
                    param.add_(0.1 * torch.randn_like(param))
            return made

    def build(seed: int = 1, size: int | None = None) -> Problem:
        made = module()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inputs = data(default_size if size is None else size)

        def apply(params: Any, buffers: Any, inputs: Any) -> Tensor:
            args = inputs if isinstance(inputs, tuple) else (inputs,)
            return torch.func.functional_call(made, (params, buffers), args)

        params = {k: v.detach() for k, v in made.named_parameters()}
        return apply, params, {k: v.detach() for k, v in made.named_buffers()}, inputs

    return Net(name, build, module if layers else None, **kwargs)


def raw_net(
    name: str,
    make: Callable[[], Any],
    data: Callable[[int], Any],
    function: Callable[[Any, Any], Tensor],
    *,
    size: int = 4,
    **kwargs: Any,
) -> Net:
    """A net on a bare tree of parameters: function(params, inputs)."""
    default_size = size

    def build(seed: int = 1, size: int | None = None) -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            params = make()
            torch.manual_seed(seed)
            inputs = data(default_size if size is None else size)
        return (lambda params, buffers, inputs: function(params, inputs)), params, {}, inputs

    return Net(name, build, **kwargs)


# --- linear layers ----------------------------------------------------------------------------


def _mlp() -> nn.Module:
    return seq(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _weights() -> dict[str, Tensor]:
    return {"w": randn(4, 5), "b": randn(5), "v": 0.5 * randn(5, 3)}


def _linear_nets() -> list[Net]:
    return [
        module_net("mlp", _mlp, images(4), size=6, layers=True),
        module_net(
            "linear_no_bias",
            lambda: seq(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)),
            images(4),
            layers=True,
        ),
        module_net(
            "deep_linear",
            lambda: seq(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)),
            images(3),
            layers=True,
        ),
        module_net(
            "residual",
            lambda: Fn(
                lambda self, x: self.head(x + self.second(self.first(x).tanh())),
                first=nn.Linear(4, 3),
                second=nn.Linear(3, 4),
                head=nn.Linear(4, 3),
            ),
            images(4),
            layers=True,
        ),
        module_net(
            "shared_positions",
            lambda: Fn(
                lambda self, x: self.head(self.body(x).tanh().mean(1)),
                body=nn.Linear(3, 4),
                head=nn.Linear(4, 2),
            ),
            images(3, 3),
            layers=True,
        ),
        raw_net(
            "functional_linear",
            lambda: {"w": randn(5, 4), "b": randn(5), "v": 0.5 * randn(3, 5)},
            images(4),
            lambda p, x: F.linear(F.linear(x, p["w"], p["b"]).sigmoid(), p["v"]),
        ),
        raw_net(
            "in_out_storage",
            _weights,
            images(4),
            lambda p, x: (x @ p["w"] + p["b"]).tanh() @ p["v"],
        ),
        raw_net(
            "addmm",
            _weights,
            images(4),
            lambda p, x: torch.matmul(torch.addmm(p["b"], x, p["w"]).tanh(), p["v"]),
        ),
        raw_net(
            "weight_first",
            lambda: {"w": randn(5, 4), "v": 0.5 * randn(3, 5)},
            images(4),
            lambda p, x: (p["v"] @ (p["w"] @ x.mT).tanh()).mT,
        ),
        raw_net(
            "weight_first_batched",
            lambda: {"w": randn(5, 4), "v": 0.5 * randn(3, 5)},
            images(4, 2),
            lambda p, x: (p["v"] @ (p["w"] @ x).tanh()).sum(-1),
        ),
        raw_net(
            "einsum",
            lambda: {"w": randn(5, 4), "v": 0.5 * randn(5, 3)},
            images(2, 4),
            lambda p, x: torch.einsum(
                "bso,oc->bc", torch.einsum("bsi,oi->bso", x, p["w"]).tanh(), p["v"]
            ),
        ),
        raw_net(
            "einsum_heads",
            lambda: {k: 0.5 * randn(4, 2, 3) for k in "qkv"} | {"o": 0.5 * randn(2, 3, 3)},
            images(3, 4),
            _einsum_attention,
            size=3,
        ),
        module_net(
            "sequence_first",
            lambda: Fn(
                lambda self, x: self.head(self.body(x).tanh()).mean(0),
                body=nn.Linear(3, 4),
                head=nn.Linear(4, 2),
            ),
            lambda n: randn(3, n, 3),
            batch_axis=1,
        ),
        module_net(
            "dict_inputs",
            lambda: Fn(
                lambda self, x: self.head((self.left(x["left"]) * self.right(x["right"])).tanh()),
                left=nn.Linear(3, 4),
                right=nn.Linear(2, 4),
                head=nn.Linear(4, 2),
            ),
            lambda n: {"left": randn(n, 3), "right": randn(n, 2)},
        ),
        module_net(
            "unused",
            lambda: Fn(lambda self, x: self.used(x), used=nn.Linear(3, 2), spare=nn.Linear(2, 2)),
            images(3),
            unused=("spare.bias", "spare.weight"),
        ),
    ]


def _einsum_attention(p: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("bsd,dhe->bshe", x, p[name]) for name in "qkv")
    a = torch.einsum("bshe,bthe->bhst", q, k).softmax(-1)
    return torch.einsum("bhst,bthe,hec->bc", a, v, p["o"])


# --- convolutions -----------------------------------------------------------------------------


def _conv(name: str, convolution: Callable[[], nn.Module], *image: int) -> Net:
    """A convolution, tanh, and a second layer on the mean over positions."""

    def make() -> nn.Module:
        conv: Any = convolution()
        return Fn(
            lambda self, x: self.head(self.conv(x).tanh().flatten(2).mean(2)),
            conv=conv,
            head=nn.Linear(conv.out_channels, 2),
        )

    return module_net(name, make, images(*image), size=3, layers=True)


def _conv_nets() -> list[Net]:
    def conv2d(name: str, *args: Any, image: tuple[int, ...] = (2, 5, 4), **kwargs: Any) -> Net:
        return _conv(name, lambda: nn.Conv2d(*args, **kwargs), *image)

    return [
        module_net(
            "cnn",
            lambda: seq(
                nn.Conv2d(1, 2, 3, padding=1),
                nn.Tanh(),
                nn.MaxPool2d(2),
                nn.Conv2d(2, 3, 2, bias=False),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(3 * 1 * 2, 3),
            ),
            images(1, 4, 6),
            layers=True,
        ),
        _conv("conv1d", lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2), 2, 7),
        _conv(
            "conv1d_reflect", lambda: nn.Conv1d(2, 3, 2, padding=1, padding_mode="reflect"), 2, 5
        ),
        _conv("conv3d", lambda: nn.Conv3d(2, 2, (2, 1, 2), stride=(1, 2, 1)), 2, 3, 3, 3),
        conv2d("conv2d_stride", 2, 3, (3, 2), stride=(2, 3), padding=(1, 2)),
        conv2d("conv2d_dilation", 2, 3, 2, dilation=(2, 1), bias=False),
        conv2d("conv2d_same", 2, 3, (2, 3), padding="same", dilation=(2, 1)),
        conv2d("conv2d_circular", 2, 2, 3, padding=1, padding_mode="circular"),
        conv2d("conv2d_replicate", 2, 2, 2, padding=1, stride=2, padding_mode="replicate"),
        conv2d("conv2d_1x1", 2, 3, 1),
        conv2d("conv2d_uneven", 1, 2, 3, stride=2, image=(1, 4, 6)),
        conv2d("grouped", 4, 6, 2, groups=2, image=(4, 3, 3)),
        conv2d("depthwise", 3, 3, 3, padding=1, groups=3, image=(3, 3, 3)),
        conv2d("depthwise_multiplier", 2, 4, 2, groups=2, bias=False),
        _conv("conv1d_grouped", lambda: nn.Conv1d(4, 2, 2, dilation=2, groups=2), 4, 6),
        module_net(
            "conv_transpose",
            lambda: seq(nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), Head(7, 3)),
            images(2, 3),
        ),
    ]


class Head(nn.Module):
    """A linear layer on the mean over channels."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.channels, self.linear = channels, nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.unflatten(1, (self.channels, -1)).mean(1))


# --- embeddings, norms and ties ---------------------------------------------------------------


def _padded(n: int) -> Tensor:
    index = torch.randint(1, 5, (n, 4))
    index[:, 0] = 0
    index[:, 2] = index[:, 1]  # a repeated index in every example
    return index


def _embedding_nets() -> list[Net]:
    def embedding(name: str, **kwargs: Any) -> Net:
        return module_net(
            name,
            lambda: Fn(
                lambda self, x: self.head(self.table(x).tanh().mean(1)),
                table=nn.Embedding(5, 3, **kwargs),
                head=nn.Linear(3, 2),
            ),
            _padded,
        )

    def normed(name: str, norm: Callable[[], nn.Module], *shape: int) -> Net:
        return module_net(
            name,
            lambda: Fn(
                lambda self, x: self.head(self.norm(self.body(x)).tanh().flatten(2).mean(2)),
                body=nn.Conv1d(2, 4, 2),
                norm=norm(),
                head=nn.Linear(4, 2),
            ),
            images(*shape),
        )

    return [
        embedding("embedding"),
        embedding("embedding_padding", padding_idx=0),
        module_net(
            "layer_norm",
            lambda: seq(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
            images(3),
        ),
        module_net(
            "layer_norm_positions",
            lambda: Fn(
                lambda self, x: self.head(self.norm(x).tanh().mean(1)),
                norm=nn.LayerNorm(3),
                head=nn.Linear(3, 2),
            ),
            images(3, 3),
        ),
        module_net(
            "rms_norm",
            lambda: seq(nn.Linear(3, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 2)),
            images(3),
        ),
        normed("group_norm", lambda: nn.GroupNorm(2, 4), 2, 5),
        normed("batch_norm", lambda: nn.BatchNorm1d(4), 2, 5),
        raw_net(
            "tied_same_role",
            lambda: {"w": randn(3, 3)},
            images(3),
            lambda p, x: F.linear(F.linear(x, p["w"]).tanh(), p["w"]),
        ),
        module_net(
            "tied_modules",
            Tied,
            images(3),
        ),
        module_net("tied_embedding", lambda: TiedHead(5, 3), tokens(3, 5), terms=1, size=3),
        module_net("embedding_mixed_pooled", lambda: TiedHead(5, 3, pool=True), tokens(3, 5)),
    ]


class Tied(nn.Module):
    """One weight in two layers, one of which has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class TiedHead(nn.Module):
    """An embedding whose table is the output head too, tokens mixed in between."""

    def __init__(self, vocabulary: int, width: int, *, pool: bool = False) -> None:
        super().__init__()
        self.table, self.mix, self.pool = (
            nn.Embedding(vocabulary, width),
            nn.Linear(width, width),
            pool,
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        h = (h + self.mix(h.cumsum(1)).tanh()).tanh()
        return F.linear(h.mean(1) if self.pool else h, self.table.weight)


# --- attention, sequences and everything else -------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention, pooled or by token; cross attention on a pair of inputs."""

    def __init__(self, classes: int, *, pool: bool = True, width: int = 4, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True, **kwargs)
        self.head, self.pool = nn.Linear(width, classes), pool

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        y = self.attention(x, memory, memory, need_weights=False)[0]
        return self.head(y.mean(1) if self.pool else x + y)


class TokenAttention(nn.Module):
    """Tokens mixed by attention of plain linear layers, an output for each."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v)


class Recurrent(nn.Module):
    """An LSTM and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class ClassToken(nn.Module):
    """A free tensor put in front of the tokens, and a free scale."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 3)), nn.Parameter(torch.ones(()))
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], 1, 3), x], 1)
        return self.head((self.scale * self.mix(x)).tanh().cumsum(1)[:, -1] + x[:, 0])


def _pair(n: int) -> tuple[Tensor, Tensor]:
    return randn(n, 2, 4), randn(n, 3, 4)


def _sequence_nets() -> list[Net]:
    return [
        module_net("attention_self", lambda: Attention(2), images(3, 4), size=3),
        module_net("attention_no_bias", lambda: Attention(2, bias=False), images(3, 4), size=3),
        module_net("attention_cross", lambda: Attention(2), _pair, size=3),
        module_net(
            "attention_separate",
            SeparateAttention,
            lambda n: (randn(n, 2, 4), randn(n, 3, 2), randn(n, 3, 3)),
            size=3,
        ),
        module_net(
            "attention_bias_kv", lambda: Attention(2, add_bias_kv=True), images(2, 4), size=3
        ),
        module_net(
            "attention_tokens", lambda: Attention(2, pool=False), images(3, 4), terms=1, size=2
        ),
        module_net(
            "tokens",
            lambda: TokenAttention(3, 3),
            images(4, 3),
            terms=1,
            size=3,
            layers=True,
        ),
        module_net(
            "tokens_apart",
            lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
            images(3, 3),
            terms=1,
            size=3,
            layers=True,
        ),
        module_net("lstm", Recurrent, images(3, 2), size=3),
        module_net(
            "weight_norm",
            lambda: seq(
                nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
            ),
            images(3),
        ),
        module_net("class_token", ClassToken, images(2, 3)),
        module_net("prelu", lambda: seq(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), images(3)),
        module_net("everything", Everything, lambda n: torch.randint(0, 5, (n, 4)), size=3),
    ]


class SeparateAttention(nn.Module):
    """Attention whose keys and values have widths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, kdim=2, vdim=3)
        self.head = nn.Linear(4, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.head(self.attention(query, key, value, need_weights=False)[0].mean(1))


class Everything(nn.Module):
    """Embedding, norm, Conv1d, Conv3d of one frame, a free tensor and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(5, 3), nn.LayerNorm(3)
        self.conv1, self.conv3 = nn.Conv1d(3, 3, 2), nn.Conv3d(3, 2, (1, 2, 1))
        self.shift, self.head = nn.Parameter(torch.randn(2)), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm(self.table(x)).mT).tanh()
        h = self.conv3(h[:, :, None, :, None]).tanh().flatten(2).mean(2)
        return self.head(h + self.shift.exp())


NETS = {
    net.name: net for net in (*_linear_nets(), *_conv_nets(), *_embedding_nets(), *_sequence_nets())
}

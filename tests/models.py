"""The zoo: small models of odd sizes, in float64, each a pure `model_fn(params, buffers, batch)`.

A case says for which `batch_dim` it is valid; 0 only where losses[i] depends on example i alone.
`build()` gives equal numbers each time; `build(data_seed=2)` the same parameters on other data and
`size=` another number of examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as ckpt

Problem = tuple[Callable[..., Any], Any, Any, Any]
EITHER = (0, None)
TOGETHER = (None,)


class Case(NamedTuple):
    """One architecture with its losses and data."""

    name: str
    build: Callable[..., Problem]  # (data_seed=1, size=None) -> model_fn, params, buffers, batch
    batch_dims: tuple[Any, ...] = EITHER
    zero_params: tuple[str, ...] = ()  # no loss depends on these, or only by cancelled terms
    slow: bool = False


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def readout(out: Tensor) -> Tensor:
    """One generic loss per example of whatever the model returns."""
    flat = out.flatten(1)
    slope = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)
    return (flat.sin() * slope + 0.3 * flat.square()).sum(1)


def default_losses(apply: Callable[..., Any], batch: Any) -> Tensor:
    out = apply(*batch) if isinstance(batch, tuple) else apply(batch)
    return readout(out[0] if isinstance(out, tuple) else out)


def module_case(
    name: str,
    make: Callable[[], nn.Module],
    data: Callable[[int], Any],
    losses: Callable[..., Tensor] = default_losses,
    *,
    batch_dims: tuple[Any, ...] = EITHER,
    size: int = 3,
    train: bool = True,
    frozen: Callable[[str], bool] = lambda name: False,
    zero_params: tuple[str, ...] = (),
    slow: bool = False,
) -> Case:
    """A case around an `nn.Module` called through `torch.func.functional_call`."""
    default_size = size

    def build(data_seed: int = 1, size: int | None = None) -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = make().double().train(train)
            with torch.no_grad():
                for param in module.parameters():  # biases and scales off their special values
                    param.add_(0.1 * torch.randn_like(param))
            torch.manual_seed(data_seed)
            batch = data(default_size if size is None else size)
        params = {k: v.detach() for k, v in module.named_parameters() if not frozen(k)}
        buffers = {k: v.detach() for k, v in module.named_buffers()}

        def model_fn(params: Any, buffers: Any, batch: Any) -> Tensor:
            cloned = {k: v.clone() for k, v in buffers.items()}

            def apply(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(module, (params, cloned), args, kwargs)

            return losses(apply, batch)

        return model_fn, params, buffers, batch

    return Case(name, build, batch_dims, zero_params, slow)


def raw_case(
    name: str,
    make: Callable[[], Any],
    data: Callable[[int], Any],
    losses: Callable[[Any, Any], Tensor],
    *,
    batch_dims: tuple[Any, ...] = EITHER,
    size: int = 3,
    zero_params: tuple[str, ...] = (),
) -> Case:
    """A case on a bare tree of parameters: losses(params, batch)."""
    default_size = size

    def build(data_seed: int = 1, size: int | None = None) -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            params = make()
            torch.manual_seed(data_seed)
            batch = data(default_size if size is None else size)
        return (lambda params, buffers, batch: losses(params, batch)), params, {}, batch

    return Case(name, build, batch_dims, zero_params)


class Fn(nn.Module):
    """Wraps a function of the module and its inputs, to write small models inline."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            if isinstance(member, Tensor):
                member = nn.Parameter(member)
            setattr(self, name, member)
        self._forward = forward

    def forward(self, *args: Any) -> Any:
        return self._forward(self, *args)


def seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def images(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: randn(n, *shape)


def tokens(length: int, vocabulary: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(0, vocabulary, (n, length))


def _mlp() -> nn.Module:
    return seq(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _labelled(n: int) -> tuple[Tensor, Tensor]:
    return randn(n, 5), torch.randint(0, 3, (n,))


def _cross_entropy(apply: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(apply(x), y, reduction="none")


# --- linear algebra with a parameter on either side -------------------------------------------


def _linear_cases() -> list[Case]:
    def attention_einsum(p: Any, x: Tensor) -> Tensor:  # x [b, s, d], d = 6 = 2 heads x 3
        q = torch.einsum("bsd,dhe->bshe", x, p["q"])
        k = torch.einsum("bsd,dhe->bshe", x, p["k"])
        a = torch.einsum("bshe,bthe->bhst", q, k).softmax(-1)
        v = torch.einsum("bhst,bthe->bshe", a, torch.einsum("bsd,dhe->bshe", x, p["v"]))
        return readout(torch.einsum("bshe,hed->bsd", v, p["o"]))

    def heads() -> dict[str, Tensor]:
        return {k: 0.4 * randn(6, 2, 3) for k in "qkv"} | {"o": 0.4 * randn(2, 3, 6)}

    def weight() -> dict[str, Tensor]:
        return {"w": randn(5, 7), "b": randn(7)}

    return [
        module_case("mlp", _mlp, _labelled, _cross_entropy, size=5),
        module_case("mlp_one_example", _mlp, _labelled, _cross_entropy, size=1),
        module_case("linear_1d_output", lambda: nn.Linear(5, 1), images(5)),
        module_case("linear_3d_input", lambda: nn.Linear(5, 7, bias=False), images(2, 5)),
        module_case("linear_4d_input", lambda: nn.Linear(5, 3), images(2, 3, 5)),
        raw_case("matmul_right", weight, images(5), lambda p, x: readout(x @ p["w"] + p["b"])),
        raw_case(
            "matmul_left",
            lambda: {"w": randn(7, 5), "b": randn(7, 1)},
            images(5),
            lambda p, x: readout((p["w"] @ x.mT + p["b"]).mT),
        ),
        raw_case(
            "matmul_left_3d",
            lambda: {"w": randn(7, 5)},
            images(5, 2),
            lambda p, x: readout(p["w"] @ x),
        ),
        raw_case(
            "matmul_3d_input",
            weight,
            images(2, 5),
            lambda p, x: readout(torch.matmul(x, p["w"])),
            zero_params=("b",),
        ),
        raw_case(
            "matmul_vector",
            lambda: {"w": randn(5)},
            images(5),
            lambda p, x: (x @ p["w"]).sin(),
        ),
        raw_case(
            "addmm", weight, images(5), lambda p, x: readout(torch.addmm(p["b"], x, p["w"]).tanh())
        ),
        raw_case(
            "addmm_scaled",
            weight,
            images(5),
            lambda p, x: readout(torch.addmm(p["b"], x, p["w"], beta=0.7, alpha=-1.3)),
        ),
        raw_case(
            "einsum_bi_oi",
            lambda: {"w": randn(7, 5)},
            images(5),
            lambda p, x: readout(torch.einsum("bi,oi->bo", x, p["w"])),
        ),
        raw_case("einsum_heads", heads, images(3, 6), attention_einsum),
        raw_case(
            "einsum_per_head",
            lambda: {"w": randn(2, 3, 5)},
            images(2, 7, 3),
            lambda p, x: readout(torch.einsum("bhsd,hde->bhse", x, p["w"])),
        ),
        raw_case(
            "einsum_ellipsis_sum",
            lambda: {"w": randn(3, 5)},
            images(2, 3),
            lambda p, x: readout(torch.einsum("...d,de->...e", x, p["w"])),
        ),
        raw_case(
            "einsum_three_operands",
            lambda: {"u": randn(3, 2), "v": randn(5, 2)},
            lambda n: (randn(n, 3), randn(n, 5)),
            lambda p, xy: readout(torch.einsum("bi,ir,jr,bj->br", xy[0], p["u"], p["v"], xy[1])),
        ),
        raw_case(
            "baddbmm_per_head",
            lambda: {"w": randn(2, 3, 5), "b": randn(2, 1, 5)},
            images(2, 7, 3),
            lambda p, x: readout(x @ p["w"] + p["b"]),
        ),
        raw_case(
            "bmm_shared",
            lambda: {"w": randn(3, 5)},
            images(7, 3),
            lambda p, x: readout(torch.bmm(x, p["w"].expand(x.shape[0], 3, 5))),
        ),
        module_case(
            "bilinear",
            lambda: nn.Bilinear(3, 5, 2),
            lambda n: (randn(n, 3), randn(n, 5)),
        ),
        raw_case(
            "parameter_transposed_view",
            lambda: {"w": randn(5, 7)},
            images(5),
            lambda p, x: readout(F.linear(x, p["w"].t())),
        ),
        raw_case(
            "parameter_slices",
            lambda: {"w": randn(11, 5), "b": randn(11)},
            images(5),
            lambda p, x: readout(
                F.linear(x, p["w"][:4], p["b"][:4]) * F.linear(x, p["w"][4:8], p["b"][4:8])
                + F.linear(x, *[t[8:].sum(0, keepdim=True) for t in (p["w"], p["b"])])
            ),
        ),
        raw_case(
            "parameter_chunk_qkv",
            lambda: {"w": randn(9, 3)},
            images(5, 3),
            lambda p, x: readout(
                F.scaled_dot_product_attention(*(x @ w.T for w in p["w"].chunk(3, dim=0)))
            ),
        ),
        raw_case(
            "outer_scale_and_shift",
            lambda: {"scale": randn(5), "shift": randn(3, 1)},
            images(3, 5),
            lambda p, x: readout((x * p["scale"] + p["shift"]).sigmoid() / (1 + p["scale"] ** 2)),
        ),
        raw_case(
            "scalar_parameter",
            lambda: {"temperature": randn(1)[0], "w": randn(3, 5)},
            images(5),
            lambda p, x: readout(F.linear(x, p["w"]) * p["temperature"].exp()),
        ),
    ]


# --- convolutions -----------------------------------------------------------------------------


def _conv_cases() -> list[Case]:
    def conv2d(name: str, *args: Any, image: tuple[int, ...] = (2, 7, 5), **kwargs: Any) -> Case:
        return module_case(name, lambda: nn.Conv2d(*args, **kwargs), images(*image))

    return [
        module_case(
            "cnn",
            lambda: seq(
                nn.Conv2d(1, 3, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(3, 5, 2, stride=2),
                nn.GELU(),
                nn.Flatten(),
                nn.Linear(5 * 1 * 1, 3),
            ),
            images(1, 7, 5),
        ),
        module_case("conv1d", lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2), images(2, 11)),
        module_case(
            "conv1d_dilated_groups",
            lambda: nn.Conv1d(4, 6, 2, dilation=3, groups=2, bias=False),
            images(4, 11),
        ),
        conv2d("conv2d", 2, 3, 3),
        conv2d("conv2d_stride_padding", 2, 3, (3, 2), stride=(2, 3), padding=(1, 2)),
        conv2d("conv2d_dilation", 2, 3, 2, dilation=(2, 1), bias=False),
        conv2d("conv2d_groups", 4, 6, 3, padding=1, groups=2, image=(4, 5, 3)),
        conv2d("conv2d_depthwise", 3, 3, 3, padding=1, groups=3, image=(3, 5, 4)),
        conv2d("conv2d_depthwise_multiplier", 2, 4, 2, stride=2, groups=2),
        conv2d("conv2d_same", 2, 3, (2, 3), padding="same"),
        conv2d("conv2d_same_dilated", 2, 3, (2, 4), padding="same", dilation=(1, 2)),
        conv2d("conv2d_valid", 2, 3, 2, padding="valid"),
        conv2d("conv2d_circular", 2, 3, 3, padding=1, padding_mode="circular"),
        conv2d("conv2d_reflect", 2, 3, 3, padding=(1, 2), padding_mode="reflect"),
        conv2d("conv2d_replicate", 2, 3, 3, padding=1, stride=2, padding_mode="replicate"),
        conv2d("conv2d_1x1", 2, 5, 1),
        module_case(
            "conv2d_uneven_stride", lambda: nn.Conv2d(1, 2, 3, stride=2), images(1, 6, 8)
        ),  # the last row and column are never read
        module_case(
            "conv3d",
            lambda: nn.Conv3d(2, 2, (2, 1, 2), stride=(1, 2, 1), padding=(1, 0, 0)),
            images(2, 3, 4, 3),
        ),
        module_case(
            "conv3d_groups",
            lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 2, 1)),
            images(2, 3, 3, 2),
        ),
        module_case(
            "conv_frames_folded",
            lambda: Fn(
                lambda self, x: self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]),
                conv=nn.Conv2d(1, 2, 3, padding=1),
            ),
            images(2, 1, 3, 5),
        ),
        module_case(
            "conv_without_batch_dimension",
            lambda: Fn(
                lambda self, x: self.conv(x.transpose(0, 1).flatten(1)), conv=nn.Conv1d(2, 3, 1)
            ),
            lambda n: randn(n, 2, 5),
            lambda apply, x: readout(apply(x).unflatten(1, (x.shape[0], 5)).transpose(0, 1)),
        ),
        module_case(
            "conv_transpose1d",
            lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1, output_padding=1),
            images(3, 5),
        ),
        module_case(
            "conv_transpose2d",
            lambda: nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 3), output_padding=(1, 2)),
            images(2, 3, 2),
        ),
        module_case(
            "conv_transpose2d_groups",
            lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, dilation=2, bias=False),
            images(4, 3, 2),
        ),
        module_case(
            "conv_transpose3d",
            lambda: nn.ConvTranspose3d(2, 1, 2, stride=(1, 2, 1)),
            images(2, 2, 2, 3),
        ),
    ]


# --- embeddings and norms ---------------------------------------------------------------------


def _embedding_cases() -> list[Case]:
    def padded(n: int) -> Tensor:
        index = torch.randint(1, 7, (n, 5))
        index[:, 0] = 0
        index[:, 2] = index[:, 1]  # a repeated index in every example
        return index

    def bag(mode: str, weighted: bool = False, padding_idx: int | None = None) -> Case:
        name = f"embedding_bag_{mode}" + "_weighted" * weighted
        name += "" if padding_idx is None else "_padding"
        return module_case(
            name,
            lambda: Fn(
                lambda self, x, w: self.bag(x, per_sample_weights=w if weighted else None),
                bag=nn.EmbeddingBag(7, 3, mode=mode, padding_idx=padding_idx),
            ),
            lambda n: (padded(n), randn(n, 5)),
        )

    return [
        module_case("embedding", lambda: nn.Embedding(7, 3), padded),
        module_case("embedding_padding", lambda: nn.Embedding(7, 3, padding_idx=0), padded),
        module_case(
            "embedding_scalar_index", lambda: nn.Embedding(7, 3), lambda n: torch.arange(n) % 7
        ),
        raw_case(
            "embedding_by_indexing",
            lambda: {"table": randn(7, 3)},
            padded,
            lambda p, x: readout(p["table"][x].cumsum(1)),
        ),
        bag("sum"),
        bag("mean"),
        bag("max"),
        bag("sum", weighted=True),
        bag("sum", padding_idx=0),
        bag("mean", padding_idx=0),
        bag("max", padding_idx=0),
        bag("sum", weighted=True, padding_idx=-7),
        raw_case(
            "embedding_negative_padding",
            lambda: {"table": randn(7, 3)},
            padded,
            lambda p, x: readout(F.embedding(x, p["table"], padding_idx=-7).cumsum(1)),
        ),
        module_case(
            "embedding_bag_offsets",
            lambda: nn.EmbeddingBag(7, 3, mode="mean"),
            lambda n: (torch.randint(0, 7, (11,)), torch.tensor([0, 4, 5])),
            batch_dims=TOGETHER,
        ),
    ]


def _norm_cases() -> list[Case]:
    return [
        module_case("layer_norm", lambda: seq(nn.Linear(5, 7), nn.LayerNorm(7)), images(2, 5)),
        module_case("layer_norm_2d", lambda: nn.LayerNorm((3, 5)), images(3, 5)),
        module_case("layer_norm_no_bias", lambda: nn.LayerNorm(5, bias=False), images(2, 5)),
        module_case("rms_norm", lambda: seq(nn.Linear(5, 7), nn.RMSNorm(7)), images(2, 5)),
        module_case(
            "group_norm",
            lambda: seq(nn.Conv2d(1, 6, 2), nn.GroupNorm(3, 6), nn.ReLU()),
            images(1, 4, 3),
        ),
        module_case("group_norm_flat", lambda: seq(nn.Linear(5, 6), nn.GroupNorm(2, 6)), images(5)),
        module_case(
            "instance_norm",
            lambda: seq(nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, affine=True)),
            images(1, 7),
            zero_params=("0.bias",),
        ),
        module_case("instance_norm2d", lambda: nn.InstanceNorm2d(3, affine=True), images(3, 4, 3)),
        module_case(
            "batch_norm_eval",
            lambda: seq(
                nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)
            ),
            images(1, 4, 3),
            train=False,
        ),
        module_case(
            "batch_norm1d_eval",
            lambda: seq(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh()),
            images(5),
            train=False,
        ),
        module_case(
            "batch_norm_train",
            lambda: seq(
                nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)
            ),
            images(1, 4, 3),
            batch_dims=TOGETHER,
            size=5,
            zero_params=("0.bias",),
        ),
        module_case(
            "batch_norm1d_train",
            lambda: seq(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh()),
            images(5),
            batch_dims=TOGETHER,
            size=5,
            zero_params=("0.bias",),
        ),
        module_case(
            "layer_scale",
            lambda: Fn(
                lambda self, x: x + self.gamma * self.mlp(x),
                gamma=torch.ones(5),
                mlp=seq(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5)),
            ),
            images(3, 5),
        ),
        module_case("prelu", lambda: seq(nn.Linear(5, 7), nn.PReLU()), images(5)),
        module_case(
            "prelu_per_channel",
            lambda: seq(nn.Conv2d(1, 3, 2), nn.PReLU(3)),
            images(1, 4, 3),
        ),
    ]


# --- attention --------------------------------------------------------------------------------


def _attention(
    batch_first: bool = True, need_weights: bool = False, cross: bool = False, **kwargs: Any
):
    def forward(self: Any, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        y = inputs[1] if cross else x
        if not batch_first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        out, weights = self.attention(x, y, y, need_weights=need_weights)
        if not batch_first:
            out = out.transpose(0, 1)
        return torch.cat([out.flatten(1), weights.flatten(1)], 1) if need_weights else out

    def make() -> nn.Module:
        return Fn(forward, attention=nn.MultiheadAttention(6, 2, batch_first=batch_first, **kwargs))

    return make


class _Masked(nn.Module):
    def __init__(self, need_weights: bool, causal: bool, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **kwargs)
        self.need_weights, self.causal = need_weights, causal

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        causal = torch.ones(4, 4, dtype=torch.bool).triu(1) if self.causal else None
        return self.attention(
            x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=self.need_weights
        )[0]


def _padded_sequences(n: int) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(n, 4, dtype=torch.bool)
    padding[0, 3] = True
    padding[-1, 2:] = True
    return randn(n, 4, 6), padding


class _ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 6, 2, stride=2)
        self.cls = nn.Parameter(0.3 * torch.randn(1, 1, 6))
        self.positions = nn.Parameter(0.3 * torch.randn(1, 5, 6))
        self.block = nn.TransformerEncoderLayer(
            6, 2, 7, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.block(x)[:, 0])


class _GPT(nn.Module):
    """Two blocks, causal, embedding tied with the output head."""

    def __init__(self, vocabulary: int = 11, width: int = 6, length: int = 5) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.mlp = nn.ModuleList(
            seq(nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:
        b, t = index.shape
        x = self.tokens(index) + self.positions(torch.arange(t))
        for i in range(2):
            q, k, v = (
                z.view(b, t, 2, 3).transpose(1, 2)
                for z in self.qkv[i](self.norms[2 * i](x)).split(6, dim=-1)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out[i](y.transpose(1, 2).reshape(b, t, 6))
            x = x + self.mlp[i](self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x))


def _next_token(apply: Callable[..., Tensor], index: Tensor) -> Tensor:
    logits = apply(index[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), index[:, 1:].flatten(), reduction="none")
    return losses.view(index.shape[0], -1).mean(1)


def _encoder_layer(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, **kwargs)


def _sequence_first(apply: Callable[..., Tensor], x: Tensor) -> Tensor:
    return readout(apply(x.transpose(0, 1)).transpose(0, 1))


def _attention_cases() -> list[Case]:
    def mha(name: str, data: Any = None, **kwargs: Any) -> Case:
        return module_case(name, _attention(**kwargs), data or images(4, 6))

    two = lambda width: lambda n: (randn(n, 3, 6), randn(n, 5, width))  # noqa: E731
    cases = [
        mha("mha"),
        mha("mha_weights", need_weights=True),
        mha("mha_sequence_first", batch_first=False),
        mha("mha_sequence_first_weights", batch_first=False, need_weights=True),
        mha("mha_no_bias", bias=False),
        mha("mha_bias_kv_zero_attention", add_bias_kv=True, add_zero_attn=True),
        mha("mha_cross", two(6), cross=True),
        mha("mha_cross_kdim_vdim", two(5), cross=True, kdim=5, vdim=5),
        mha("mha_cross_sequence_first", two(6), cross=True, batch_first=False),
        module_case("mha_eval", _attention(), images(4, 6), train=False),
        module_case("mha_eval_weights", _attention(need_weights=True), images(4, 6), train=False),
    ]
    for weights in (False, True):
        for causal in (False, True):
            name = "mha_padding" + "_causal" * causal + "_weights" * weights
            cases.append(
                module_case(
                    name,
                    lambda weights=weights, causal=causal: _Masked(weights, causal),
                    _padded_sequences,
                    train=False,
                )
            )
    for norm_first in (False, True):
        for train in (False, True):
            name = "encoder_layer" + "_norm_first" * norm_first + ("_train" if train else "_eval")
            cases.append(
                module_case(
                    name,
                    _encoder_layer(batch_first=True, norm_first=norm_first),
                    images(4, 6),
                    train=train,
                )
            )

    def asymmetric(self: Any, x: Tensor, y: Tensor) -> Tensor:
        out, weights = self.attention(x, y, y.flip(1), average_attn_weights=False)
        bias = torch.linspace(-1, 1, 15, dtype=x.dtype).view(3, 5)
        biased = self.attention(x, y, y, attn_mask=bias)[0]
        return torch.cat([out.flatten(1), weights.flatten(1), biased.flatten(1)], 1)

    def frozen_body() -> nn.Module:
        layer = _encoder_layer(batch_first=True)()
        body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return Fn(
            lambda self, x: self.head(self.body(x)[:, 0]),
            body=body.requires_grad_(False),
            head=nn.Linear(6, 3),
        )

    return [
        *cases,
        module_case(
            "mha_masks_bias_kv_zero_attention",
            lambda: _Masked(True, True, add_bias_kv=True, add_zero_attn=True),
            _padded_sequences,
        ),
        module_case(
            "mha_keys_are_not_values",
            lambda: Fn(asymmetric, attention=nn.MultiheadAttention(6, 2, batch_first=True)),
            two(6),
        ),
        module_case(
            "frozen_encoder_eval",  # its fused path is open, since it needs no gradient
            frozen_body,
            images(4, 6),
            train=False,
            frozen=lambda k: "head" not in k,
        ),
        module_case(
            "encoder_layer_sequence_first", _encoder_layer(), images(4, 6), _sequence_first
        ),
        module_case(
            "encoder_layer_sequence_first_eval",
            _encoder_layer(),
            images(4, 6),
            _sequence_first,
            train=False,
        ),
        module_case(
            "encoder_layer_padding_eval",
            lambda: Fn(
                lambda self, x, padding: self.layer(x, src_key_padding_mask=padding),
                layer=_encoder_layer(batch_first=True)(),
            ),
            _padded_sequences,
            train=False,
        ),
        module_case(
            "encoder_stack_eval",
            lambda: nn.TransformerEncoder(
                _encoder_layer(batch_first=True)(), 2, enable_nested_tensor=False
            ),
            images(4, 6),
            train=False,
        ),
        module_case(
            "decoder_layer",
            lambda: nn.TransformerDecoderLayer(6, 2, 7, dropout=0.0, batch_first=True),
            two(6),
        ),
        module_case(
            "decoder_layer_eval",
            lambda: nn.TransformerDecoderLayer(6, 2, 7, dropout=0.0, batch_first=True),
            two(6),
            train=False,
        ),
        module_case("vit", _ViT, images(1, 4, 4)),
        module_case("vit_eval", _ViT, images(1, 4, 4), train=False),
        module_case("gpt_tied", _GPT, tokens(6, 11), _next_token),
        module_case(
            "class_token",
            lambda: Fn(
                lambda self, x: (
                    torch.cat([self.cls.expand(x.shape[0], 1, 5), x], 1) + self.positions
                ),
                cls=torch.randn(1, 1, 5),
                positions=torch.randn(4, 5),
            ),
            images(3, 5),
        ),
    ]


# --- sharing, freezing, free form -------------------------------------------------------------


class _Cubic(torch.autograd.Function):
    """y = (x @ w)³ with a hand-written backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w) ** 3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        inner = 3 * (x @ w) ** 2 * grad
        return inner @ w.mT, x.mT @ inner


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class _ParentUsesChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x).tanh() @ self.child.weight * self.scale + self.child.bias


class _Inplace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.first = nn.Linear(15, 7)
        self.second = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv(x)).mean(1).flatten(1)
        x = self.first(x).sigmoid_()
        y = self.second(x)
        y.add_(x).mul_(0.5)
        y += 0.1
        return y


def _recurrent(kind: type[nn.RNNBase], **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: kind(3, 5, batch_first=True, **kwargs)


def _normed(parametrization: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: seq(parametrization(nn.Linear(5, 7)), nn.Tanh(), nn.Linear(7, 2))


def _sharing_cases() -> list[Case]:
    mask = (torch.arange(35).reshape(7, 5) % 3 > 0).double()

    def freeform(p: Any, x: Tensor) -> Tensor:
        return readout(F.linear(x, p["w"] * mask).tanh()) + p["w"].sum() * x.sum(1)

    def mixed_recognition(p: Any, x: Tensor) -> Tensor:
        return readout(F.linear(x, p["w"], p["b"])) + p["w"].norm() * x[:, 0]

    def nested(p: Any, batch: Any) -> Tensor:
        x = F.linear(batch["x"], p["trunk"]["w"], p["trunk"]["b"]).tanh()
        return (
            readout(F.linear(x, p["heads"][0]))
            + (F.linear(x, p["heads"][1])[:, 0] - batch["y"]) ** 2
        )

    def dropout(apply: Callable[..., Tensor], batch: Any) -> Tensor:
        return readout(apply(batch["x"], batch["mask"]))

    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    return [
        module_case("tied_linear", _Tied, images(5)),
        raw_case(
            "tied_mixed_roles",
            lambda: {"w": randn(7, 5), "b": randn(5)},
            images(5),
            lambda p, x: readout(F.linear(F.linear(x, p["w"]).tanh(), p["w"].t(), p["b"])),
        ),
        raw_case(
            "tied_linear_and_embedding",
            lambda: {"table": randn(7, 3)},
            lambda n: torch.randint(0, 7, (n, 5)),
            lambda p, x: readout(F.linear(F.embedding(x, p["table"]).mean(1).sin(), p["table"])),
        ),
        raw_case(
            "tied_linear_and_conv",
            lambda: {"w": randn(3, 2)},
            images(2, 5),
            lambda p, x: readout(
                F.conv1d(x, p["w"][:, :, None]).tanh().mT @ p["w"] + F.linear(x.mT, p["w"])[..., :2]
            ),
        ),
        raw_case(
            "same_tensor_twice_in_params",
            lambda: (lambda w: {"a": w, "b": w})(randn(5, 5)),
            images(5),
            lambda p, x: readout(F.linear(F.linear(x, p["a"]).tanh(), p["b"])),
        ),
        module_case("parent_uses_child", _ParentUsesChild, images(5)),
        module_case(
            "linear_in_loop",
            lambda: Fn(
                lambda self, x: (
                    [x := (self.linear(x) + 0.1 * x).tanh() for _ in range(4)]  # noqa: F841
                )[-1],
                linear=nn.Linear(5, 5),
            ),
            images(5),
        ),
        module_case(
            "unused_parameter",
            lambda: Fn(lambda self, x: self.used(x), used=nn.Linear(5, 3), unused=nn.Linear(2, 2)),
            images(5),
            zero_params=("unused.weight", "unused.bias"),
        ),
        module_case("frozen_biases", _mlp, _labelled, _cross_entropy, frozen=lambda k: "bias" in k),
        module_case(
            "frozen_weights", _mlp, _labelled, _cross_entropy, frozen=lambda k: "weight" in k
        ),
        module_case(
            "frozen_trunk", _GPT, tokens(6, 11), _next_token, frozen=lambda k: "norms" not in k
        ),
        module_case(
            "frozen_attention_in_projection",
            _encoder_layer(batch_first=True),
            images(4, 6),
            train=False,
            frozen=lambda k: "in_proj" in k,
        ),
        module_case(
            "only_attention_in_projection_bias",
            _encoder_layer(batch_first=True),
            images(4, 6),
            train=False,
            frozen=lambda k: k != "self_attn.in_proj_bias",
        ),
        module_case("inplace", _Inplace, images(1, 3, 5)),
        module_case(
            "inplace_relu",
            lambda: seq(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3), nn.ReLU6(True)),
            images(5),
        ),
        module_case(
            "dropout_mask",
            lambda: Fn(
                lambda self, x, mask: self.second(self.first(x).relu() * mask / 0.5),
                first=nn.Linear(5, 7),
                second=nn.Linear(7, 3),
            ),
            lambda n: {"x": randn(n, 5), "mask": (randn(n, 7) > 0).double()},
            dropout,
        ),
        module_case("rnn", _recurrent(nn.RNN), images(4, 3)),
        module_case("lstm", _recurrent(nn.LSTM, num_layers=2), images(4, 3)),
        module_case("gru", _recurrent(nn.GRU, bidirectional=True), images(4, 3)),
        module_case(
            "gru_cell",
            lambda: Fn(
                lambda self, x: self.cell(x[:, 1], self.cell(x[:, 0])), cell=nn.GRUCell(3, 5)
            ),
            images(2, 3),
        ),
        module_case("weight_norm", _normed(weight_norm), images(5)),
        module_case("spectral_norm_eval", _normed(spectral_norm), images(5), train=False),
        module_case(
            "sequence_first",
            lambda: seq(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)),
            images(4, 3),
            _sequence_first,
        ),
        module_case(
            "folded_tokens",
            lambda: seq(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)),
            images(4, 3),
            lambda apply, x: readout(apply(x.flatten(0, 1)).unflatten(0, x.shape[:2])),
        ),
        module_case(
            "folded_sequence_first",
            lambda: seq(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)),
            images(4, 3),
            lambda apply, x: readout(
                apply(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (4, -1)).transpose(0, 1)
            ),
        ),
        raw_case("freeform", lambda: {"w": randn(7, 5)}, images(5), freeform),
        raw_case(
            "recognised_and_free",
            lambda: {"w": randn(7, 5), "b": randn(7)},
            images(5),
            mixed_recognition,
        ),
        raw_case(
            "loss_regularised_only",
            lambda: {"w": randn(3, 5), "z": randn(2, 2)},
            images(5),
            lambda p, x: readout(F.linear(x, p["w"])) + p["z"].square().sum(),
        ),
        raw_case(
            "nested_params",
            lambda: {
                "trunk": {"w": randn(7, 5), "b": randn(7)},
                "heads": [randn(3, 7), randn(1, 7)],
            },
            lambda n: {"y": randn(n), "x": randn(n, 5)},
            nested,
        ),
        raw_case(
            "insertion_order",
            lambda: {"z": randn(7, 5), "a": randn(3, 7), "m": randn(3)},
            images(5),
            lambda p, x: readout(F.linear(F.linear(x, p["z"]).tanh(), p["a"], p["m"])),
        ),
        raw_case(
            "custom_function",
            lambda: {"w": 0.5 * randn(5, 3), "v": randn(3, 3)},
            images(5),
            lambda p, x: readout(_Cubic.apply(x, p["w"]) @ p["v"]),
        ),
        raw_case(
            "shared_context",
            lambda: {"w": randn(3, 5), "v": randn(3, 2)},
            lambda n: (randn(n, 5), randn(4, 2)),
            lambda p, b: readout(F.linear(b[0], p["w"]) @ F.linear(b[1], p["v"]).T),
            batch_dims=((0, None), None),
        ),
    ]


# --- ways to write the same thing, and ways around it -----------------------------------------


def _spelling_cases() -> list[Case]:
    def w(*shape: int) -> Callable[[], dict[str, Tensor]]:
        return lambda: {"w": randn(*shape)}

    def wb() -> dict[str, Tensor]:
        return {"w": randn(7, 5), "b": randn(7)}

    def physics(p: Any, x: Tensor) -> Tensor:
        """Losses that hold the derivative of the model with respect to its input."""

        def u(x: Tensor) -> Tensor:
            return F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["v"]).sum()

        slope = torch.func.vmap(torch.func.grad(u))(x)
        return (slope - x).square().sum(1)

    def tangent(p: Any, x: Tensor) -> Tensor:
        """Losses that hold a forward-mode derivative with respect to the input."""

        def u(x: Tensor) -> Tensor:
            return F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["v"])

        value, slope = torch.func.jvp(u, (x,), (x.sin(),))
        return (slope - value).square().sum(1)

    def broadcasts(p: Any, x: Tensor) -> Tensor:
        w = p["w"]  # [2, 5, 3]
        outs = [
            (x @ w).transpose(0, 1),  # [b, 5] @ [2, 5, 3]
            x[:, None, None] @ w,  # [b, 1, 1, 5] @ [2, 5, 3]
            x[:, None, None].expand(-1, 2, 4, -1) @ w,
            x[:, None, None].expand(-1, 3, 4, -1) @ w[:1],
            (w.mT @ x.mT).permute(2, 0, 1),
            x[:, None].expand(-1, 2, -1) @ w[0],
            x @ p["v"],
            p["v"] @ x.mT,
            (x[:, None] @ p["v"]).sin(),
            torch.matmul(w[None, :, None, 0, :], x[:, None, :3, None]).flatten(1),
        ]
        return sum(
            readout((0.5 + 0.1 * k) * out.reshape(x.shape[0], -1)) for k, out in enumerate(outs)
        )

    def odd_einsums(p: Any, x: Tensor) -> Tensor:
        w, square = p["w"], p["s"]  # [5, 3], [5, 5]
        outs = [
            torch.einsum("bi,io->b", x, w),
            torch.einsum("bi,jo->bo", x, w),
            torch.einsum("bi,ii->bi", x, square),
            torch.einsum("bi,ii->b", x, square),
            torch.einsum("bi,ij->bij", x, square),
            torch.einsum("bi,ij->bji", x, square),
            torch.einsum("bi,ij", x, square),
            torch.einsum(" b i , j i -> j b ", x, square).mT,
            torch.einsum("bi,bj,ij->b", x, x, square),
            torch.einsum("ij,b...->b...ij", w, x[:, :2]),
            torch.einsum("...i,ij->...j", x[:, None, None], w),
            torch.einsum("io,b...i->bo...", w, x[:, None]),
            torch.einsum("bi->b", x * w[:, 0]),
            torch.einsum("bi,io->bo", x[:, :1], w),  # an axis of size one broadcasts
            torch.einsum("bij,io->bo", x[:, :, None] * x[:, None, :2], w),  # j is summed alone
        ]
        return sum(
            readout((0.5 + 0.1 * k) * out.reshape(x.shape[0], -1)) for k, out in enumerate(outs)
        )

    def no_grad_target(p: Any, x: Tensor) -> Tensor:
        prediction = F.linear(x, p["w"], p["b"]).tanh()
        with torch.no_grad():
            target = F.linear(2 * x, p["w"], p["b"]).sin()
        return (prediction - target).square().sum(1) + prediction.sum(1)

    def spellings(p: Any, x: Tensor) -> Tensor:
        w = p["w"]  # [5, 5]
        z = [
            F.linear(input=x, weight=w),
            F.linear(x, bias=p["b"], weight=w),
            x.matmul(w),
            torch.matmul(input=x, other=w),
            torch.matmul(w, x.mT).mT,
            x.mm(w),
            torch.mm(input=x, mat2=w),
            w.mm(x.mT).mT,
            x.__matmul__(w),
            w.__rmatmul__(x),
            torch.einsum("bi,ij->bj", [x, w]),
            torch.einsum("ij,bj", w, x),
            torch.einsum(x, [0, 1], w, [2, 1]),
            torch.tensordot(x, w, dims=1),
            torch.tensordot(x, w, ([1], [1])),
            torch.inner(x, w),
            torch.addmm(input=p["b"], mat1=x, mat2=w),
            p["b"].addmm(x, w),
            torch.linalg.multi_dot([x, w, w]),
            torch.stack([w.mv(row) for row in x]),
            torch.stack([torch.mv(w, row) for row in x]),
            torch.stack([w @ row for row in x]),
            torch.stack([row @ w for row in x]),
            torch.stack([F.linear(row, w, p["b"]) for row in x]),
            torch.stack([torch.addmv(p["b"], w, row) for row in x]),
            torch.bmm(x[:, None], w.expand(x.shape[0], 5, 5))[:, 0],
            torch.baddbmm(p["b"], x[:, None], w.repeat(x.shape[0], 1, 1))[:, 0],
            F.conv1d(x[..., None], w[..., None])[..., 0],
            F.linear(x, w.T),
            F.linear(x, w.t()),
            F.linear(x, w.mT.mT),
            F.linear(x, w.transpose(0, 1)),
            F.linear(x, w.permute(1, 0)),
            F.linear(x, w.swapaxes(-1, -2)),
            F.linear(x, w[:, :]),
            F.linear(x, w.contiguous()),
            F.linear(x, w.clone()),
            F.linear(x, w.view(25).view(5, 5)),
            F.linear(x, 0.5 * w),
            F.linear(x, w.detach()),
            (x @ w).detach(),
        ]  # fmt: skip
        return sum(readout(out * (0.3 + 0.1 * k)) for k, out in enumerate(z))

    def inplace_slice(p: Any, x: Tensor) -> Tensor:
        y = F.linear(x, p["w"], p["b"])
        y[:, 0] *= 2
        y[:, 1:3].tanh_()
        left, right = y.view(y.shape[0], -1)[:, :3], y[:, 3:]
        return readout(left) + readout(right.sin())

    def unbatched_convolutions(p: Any, x: Tensor) -> Tensor:
        outs = [F.conv2d(image, p["k"], p["b"], padding=1).tanh() for image in x]
        outs = [F.conv_transpose2d(out, p["k"], stride=2) for out in outs]
        return readout(torch.stack(outs))

    def unbatched_attention(self: Any, x: Tensor) -> Tensor:
        return torch.stack([self.attention(row, row, row, need_weights=False)[0] for row in x])

    def batch_with_flags(p: Any, batch: Any) -> Tensor:
        x = F.linear(batch["x"], p["w"], p["b"])
        return readout(x.tanh() if batch["squash"] else x) * batch["scale"]

    return [
        raw_case(
            "spellings", lambda: {"w": 0.3 * randn(5, 5), "b": randn(5)}, images(5), spellings
        ),
        raw_case(
            "parameter_as_input", w(3, 5), images(5), lambda p, x: readout(F.linear(p["w"], x).T)
        ),
        raw_case(
            "parameter_times_parameter",
            lambda: {"a": randn(5, 2), "b": randn(2, 7), "w": randn(7, 5)},
            images(5),
            lambda p, x: readout(F.linear(x, p["w"]) + x @ (p["a"] @ p["b"])),
        ),
        raw_case(
            "parameter_times_itself",
            w(5, 5),
            images(5),
            lambda p, x: readout(x @ (p["w"] @ p["w"].T) + x @ F.linear(p["w"], p["w"])),
        ),
        raw_case(
            "bias_from_weight",
            w(5, 5),
            images(5),
            lambda p, x: (
                readout(F.linear(x, p["w"], p["w"][0])) + readout(x @ p["w"] + p["w"][:, 1])
            ),
        ),
        raw_case(
            "functional_linear_of_low_rank",
            lambda: {"w": randn(7, 5), "a": randn(2, 5), "b": randn(7, 2), "scale": randn(1)},
            images(2, 5),
            lambda p, x: readout(
                F.linear(x, p["w"]) + p["scale"] * F.linear(F.linear(x, p["a"]), p["b"])
            ),
        ),
        raw_case(
            "noncontiguous_params",
            lambda: {
                "w": randn(5, 7).T,
                "k": randn(3, 3, 2, 1).permute(3, 2, 0, 1),
                "b": randn(4)[::2],
            },
            images(2, 5),
            lambda p, x: (
                readout(F.linear(x, p["w"]))
                + readout(F.conv2d(x[:, :, None, :].expand(-1, -1, 3, -1), p["k"]) * p["b"].sum())
            ),
        ),
        raw_case(
            "params_of_one_storage",
            lambda: (lambda flat: {"w": flat[:35].view(7, 5), "b": flat[35:]})(randn(42)),
            images(5),
            lambda p, x: readout(F.linear(x, p["w"], p["b"])),
        ),
        raw_case("no_grad_target", wb, images(5), no_grad_target),
        raw_case(
            "dead_branch",
            wb,
            images(5),
            lambda p, x: (F.linear(x, p["w"]).sum(), readout(F.linear(x, p["w"], p["b"])))[1],
        ),
        raw_case("inplace_slice", wb, images(5), inplace_slice),
        raw_case(
            "derivative_in_the_loss",
            lambda: {"w": randn(7, 5), "b": randn(7), "v": randn(1, 7)},
            images(5),
            physics,
        ),
        raw_case(
            "tangent_in_the_loss",
            lambda: {"w": randn(7, 5), "b": randn(7), "v": randn(1, 7)},
            images(5),
            tangent,
        ),
        raw_case(
            "matmul_broadcasts",
            lambda: {"w": 0.4 * randn(2, 5, 3), "v": randn(5)},
            images(5),
            broadcasts,
        ),
        raw_case(
            "einsum_odd_forms",
            lambda: {"w": 0.4 * randn(5, 3), "s": 0.4 * randn(5, 5)},
            images(5),
            odd_einsums,
        ),
        raw_case(
            "vmap_in_the_model",
            wb,
            images(5),
            lambda p, x: readout(
                torch.func.vmap(lambda row: F.linear(row, p["w"], p["b"]).tanh())(x)
            ),
        ),
        raw_case(
            "vmap_over_experts",
            lambda: {"w": randn(2, 7, 5), "b": randn(2, 7)},
            images(5),
            lambda p, x: readout(
                torch.func.vmap(F.linear, in_dims=(None, 0, 0), out_dims=1)(x, p["w"], p["b"])
            ),
        ),
        raw_case(
            "unbatched_convolutions",
            lambda: {"k": 0.5 * randn(2, 2, 3, 3), "b": randn(2)},
            images(2, 3, 4),
            unbatched_convolutions,
        ),
        module_case(
            "unbatched_attention",
            lambda: Fn(unbatched_attention, attention=nn.MultiheadAttention(6, 2)),
            images(4, 6),
        ),
        module_case(
            "channels_last",
            lambda: seq(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2)).to(
                memory_format=torch.channels_last
            ),
            lambda n: randn(n, 2, 5, 4).contiguous(memory_format=torch.channels_last),
        ),
        module_case(
            "embedding_scaled_by_frequency",
            lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
            lambda n: torch.randint(0, 3, (n, 4)),
            batch_dims=TOGETHER,
        ),
        module_case(
            "embedding_sparse",
            lambda: nn.Embedding(5, 3, sparse=True),
            lambda n: torch.arange(2 * n).view(n, 2) % 5,
        ),
        module_case(
            "learned_queries",
            lambda: Fn(
                lambda self, x: self.attention(
                    self.queries.expand(x.shape[0], -1, -1), x, x, need_weights=False
                )[0],
                queries=torch.randn(1, 3, 6),
                attention=nn.MultiheadAttention(6, 2, batch_first=True),
            ),
            images(4, 6),
        ),
        module_case(
            "attention_of_parameters",
            lambda: Fn(
                lambda self, x: F.scaled_dot_product_attention(
                    x, self.k.expand(x.shape[0], -1, -1), self.v.expand(x.shape[0], -1, -1)
                ),
                k=torch.randn(1, 5, 6),
                v=torch.randn(1, 5, 3),
            ),
            images(4, 6),
        ),
        raw_case(
            "batch_with_flags",
            wb,
            lambda n: {"x": randn(n, 5), "squash": True, "scale": 0.5},
            batch_with_flags,
            batch_dims=({"x": 0, "squash": None, "scale": None}, None),
        ),
    ]


# --- shapes of losses -------------------------------------------------------------------------


def _loss_shape_cases() -> list[Case]:
    def multitask(apply: Callable[..., Tensor], batch: Any) -> Tensor:
        x, y = batch
        out = apply(x)
        return torch.stack(
            [F.cross_entropy(out, y, reduction="none"), out.square().sum(1), out[:, 0].sin()], 1
        )

    def grid(apply: Callable[..., Tensor], batch: Any) -> Tensor:
        return multitask(apply, batch)[:, :2, None] * torch.tensor([1.0, 2.0, -0.5])

    def per_token(apply: Callable[..., Tensor], index: Tensor) -> Tensor:
        return F.cross_entropy(apply(index[:, :-1]).mT, index[:, 1:], reduction="none")

    def cnn() -> nn.Module:
        return seq(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))

    return [
        module_case("losses_per_example_and_task", _mlp, _labelled, multitask),
        module_case(
            "losses_per_example_and_task_cnn",
            cnn,
            lambda n: (randn(n, 1, 4, 3), torch.randint(0, 3, (n,))),
            multitask,
        ),
        module_case("losses_per_example_and_grid", _mlp, _labelled, grid),
        module_case("losses_per_token", _GPT, tokens(4, 11), per_token),
        module_case(
            "losses_per_task",
            _mlp,
            _labelled,
            lambda apply, batch: multitask(apply, batch).mean(0),
            batch_dims=TOGETHER,
            size=5,
        ),
        module_case(
            "losses_per_task_cnn",
            cnn,
            lambda n: (randn(n, 1, 4, 3), torch.randint(0, 3, (n,))),
            lambda apply, batch: multitask(apply, batch).mean(0),
            batch_dims=TOGETHER,
        ),
        module_case(
            "losses_grid",
            _mlp,
            _labelled,
            lambda apply, batch: grid(apply, batch).mean(0),
            batch_dims=TOGETHER,
        ),
        module_case(
            "loss_scalar",
            _mlp,
            _labelled,
            lambda apply, batch: multitask(apply, batch).mean(),
            batch_dims=TOGETHER,
        ),
        module_case(
            "losses_coupled",
            _mlp,
            _labelled,
            lambda apply, batch: _cross_entropy(apply, batch) - apply(batch[0]).mean(0)[0],
            batch_dims=TOGETHER,
        ),
        module_case(
            "losses_contrastive",
            _mlp,
            lambda n: randn(n, 5),
            lambda apply, x: -(lambda z: z @ z.T)(F.normalize(apply(x))).log_softmax(1).diagonal(),
            batch_dims=TOGETHER,
        ),
    ]


# --- Hugging Face, randomly initialised from a configuration ----------------------------------


def _hf_cases() -> list[Case]:
    def gpt2(attention: str) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            from transformers import GPT2Config, GPT2LMHeadModel

            config = GPT2Config(
                vocab_size=11, n_positions=7, n_embd=6, n_layer=2, n_head=2, n_inner=7,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
                use_cache=False, attn_implementation=attention,
            )  # fmt: skip
            return GPT2LMHeadModel(config)

        return make

    def bert(attention: str) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            from transformers import BertConfig, BertForSequenceClassification

            config = BertConfig(
                vocab_size=11, hidden_size=6, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=7, max_position_embeddings=7, num_labels=3,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                attn_implementation=attention,
            )  # fmt: skip
            return BertForSequenceClassification(config)

        return make

    def vit(attention: str) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            from transformers import ViTConfig, ViTForImageClassification

            config = ViTConfig(
                hidden_size=6, num_hidden_layers=2, num_attention_heads=2, intermediate_size=7,
                image_size=4, patch_size=2, num_channels=1, num_labels=3,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                attn_implementation=attention,
            )  # fmt: skip
            return ViTForImageClassification(config)

        return make

    def language(apply: Callable[..., Any], index: Tensor) -> Tensor:
        logits = apply(input_ids=index).logits[:, :-1]
        return F.cross_entropy(logits.mT, index[:, 1:], reduction="none").mean(1)

    def masked_language(apply: Callable[..., Any], batch: Any) -> Tensor:
        out = apply(input_ids=batch["index"], attention_mask=batch["mask"])
        return F.cross_entropy(out.logits, batch["label"], reduction="none")

    def sentences(n: int) -> dict[str, Tensor]:
        mask = torch.ones(n, 5, dtype=torch.long)
        mask[-1, 3:] = 0
        return {
            "index": torch.randint(0, 11, (n, 5)),
            "mask": mask,
            "label": torch.randint(0, 3, (n,)),
        }

    def vision(apply: Callable[..., Any], x: Tensor) -> Tensor:
        return readout(apply(pixel_values=x).logits)

    bert_keys = tuple(f"bert.encoder.layer.{i}.attention.self.key.bias" for i in range(2))
    vit_keys = tuple(f"vit.layers.{i}.attention.k_proj.bias" for i in range(2))
    cases = []
    for attention in ("eager", "sdpa"):
        cases += [
            module_case(
                f"hf_gpt2_{attention}", gpt2(attention), tokens(5, 11), language, slow=True
            ),
            module_case(
                f"hf_bert_{attention}",
                bert(attention),
                sentences,
                masked_language,
                zero_params=bert_keys,
                slow=True,
            ),
            module_case(
                f"hf_vit_{attention}",
                vit(attention),
                images(1, 4, 4),
                vision,
                train=False,
                zero_params=vit_keys,
                slow=True,
            ),
        ]
    return cases


# --- differentiable by plain autograd but refused by torch.func: saved tensor hooks, autograd.grad


def _autograd_only_cases() -> list[Case]:
    def make(use_reentrant: bool) -> Callable[[], nn.Module]:
        def forward(self: Any, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + ckpt.checkpoint(block, x, use_reentrant=use_reentrant)
            return x

        return lambda: Fn(
            forward,
            stem=nn.Linear(5, 5),
            blocks=nn.ModuleList(
                seq(nn.LayerNorm(5), nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5)) for _ in range(2)
            ),
        )

    def physics_by_autograd(p: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            u = F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["v"]).sum()
            (slope,) = torch.autograd.grad(u, x, create_graph=True)
        return (slope - x).square().sum(1)

    return [
        module_case("checkpoint", make(False), images(5)),
        raw_case(
            "derivative_in_the_loss_by_autograd",
            lambda: {"w": randn(7, 5), "b": randn(7), "v": randn(1, 7)},
            images(5),
            physics_by_autograd,
        ),
        module_case("checkpoint_sequence", make(False), images(3, 5)),
        module_case(
            "checkpoint_sequential",
            lambda: Fn(
                lambda self, x: ckpt.checkpoint_sequential(self.body, 2, x, use_reentrant=False),
                body=seq(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Sigmoid()),
            ),
            images(5),
        ),
    ]


AUTOGRAD_ONLY = _autograd_only_cases()
ZOO = [
    *_linear_cases(),
    *_conv_cases(),
    *_embedding_cases(),
    *_norm_cases(),
    *_attention_cases(),
    *_sharing_cases(),
    *_spelling_cases(),
    *_loss_shape_cases(),
    *_hf_cases(),
]
BY_NAME = {case.name: case for case in [*ZOO, *AUTOGRAD_ONLY]}
assert len(BY_NAME) == len(ZOO) + len(AUTOGRAD_ONLY), "two cases of one name"

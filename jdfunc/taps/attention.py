"""Rules for attention: the fused functions, taken apart into the products they are made of."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jdfunc.taps.contraction import contraction, linear
from jdfunc.taps.tap import Rule, Tap


def scaled_dot_product_attention(tap: Tap, func: Any, query: Tensor, *args: Any, **kwargs: Any):
    """Rule of SDPA: on CPU the plain formula, since its fused kernel has no batching rule."""
    if query.device.type != "cpu":
        return tap.call(func, query, *args, **kwargs)
    with sdpa_kernel(SDPBackend.MATH):
        return tap.call(func, query, *args, **kwargs)


def multi_head_attention(
    tap: Tap,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rule of `F.multi_head_attention_forward`: projections, attention, output projection."""
    batched = query.ndim == 3
    same = key is query and value is query
    if not batched:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
    target, batch, width = query.shape
    head = width // num_heads
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    packed = None if use_separate_proj_weight else in_proj_weight
    q, k, v = _projections(tap, func, (query, key, value), packed, separate, in_proj_bias, same)
    mask = _merged_mask(attn_mask, key_padding_mask, q, batch, num_heads)
    if bias_k is not None and bias_v is not None:
        tap.note(func, (bias_k, bias_v), {})
        k = torch.cat([k, bias_k.repeat(1, batch, 1)])
        v = torch.cat([v, bias_v.repeat(1, batch, 1)])
        mask = None if mask is None else F.pad(mask, (0, 1))

    def heads(x: Tensor) -> Tensor:  # [t, n, e] -> [n, heads, t, e/heads]
        return x.reshape(x.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3)

    q = heads(q)
    k = heads(k) if static_k is None else static_k.reshape(batch, num_heads, -1, head)
    v = heads(v) if static_v is None else static_v.reshape(batch, num_heads, -1, head)
    if add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (k, v))
        mask = None if mask is None else F.pad(mask, (0, 1))
    scores = q @ k.mT / math.sqrt(head)
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    if training and dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    mixed = (weights @ v).permute(2, 0, 1, 3).reshape(target, batch, width)
    output = linear(tap, func, mixed, out_proj_weight, out_proj_bias)
    reported = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
    if batched:
        return output, reported
    return output.squeeze(1), None if reported is None else reported.squeeze(0)


def _projections(
    tap: Tap,
    func: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    packed: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
    same: bool,
) -> list[Tensor]:
    """Project queries, keys and values by one packed weight, or by three."""
    if packed is not None and same:
        projected = linear(tap, func, inputs[0], packed, bias)
        return list(projected.reshape(*projected.shape[:-1], 3, -1).unbind(-2))
    if packed is not None:
        width = packed.shape[0] // 3
        parts = [slice(n * width, (n + 1) * width) for n in range(3)]
        return [
            _linear_part(tap, func, x, packed, bias, part)
            for x, part in zip(inputs, parts, strict=True)
        ]
    if bias is not None:
        tap.note(func, (bias,), {})
    biases = (None, None, None) if bias is None else bias.chunk(3)
    projected = []
    for x, weight, b in zip(inputs, separate, biases, strict=True):
        assert weight is not None
        projected.append(linear(tap, func, x, weight, b))
    return projected


def _linear_part(
    tap: Tap, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, part: slice
) -> Tensor:
    """Apply some rows of a packed projection: the other rows have cotangents of zero."""
    if bias is not None:
        tap.note(func, (bias,), {})
    axes = [f"s{n}" for n in range(x.ndim - 1)]
    after = weight.shape[0] - part.stop

    def call(w: Tensor) -> Tensor:
        return F.linear(x, w[part], None if bias is None else bias[part])

    return contraction(
        tap,
        func,
        call,
        (x, [*axes, "i"]),
        (weight, ["j", "i"]),
        [*axes, "j"],
        pad_free=(part.start, after),
        bias=bias,
    )


def _merged_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    like: Tensor,
    batch: int,
    num_heads: int,
) -> Tensor | None:
    """Return the two masks as one to add to the scores, broadcasting to [n, heads, t, s]."""
    merged = None
    if attn_mask is not None:
        merged = _additive(attn_mask, like)
        merged = merged.reshape(batch, num_heads, *merged.shape[1:]) if merged.ndim == 3 else merged
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, like)[:, None, None, :]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


RULES: dict[Any, Rule] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention,
}

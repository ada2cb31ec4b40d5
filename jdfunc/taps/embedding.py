"""Rules for embeddings: a product with one-hot vectors that are kept as indices."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jdfunc.factored.leaves import OneHot
from jdfunc.taps.tap import Rule, Tap


def embedding(
    tap: Tap,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rule of `F.embedding`; the row of ``padding_idx`` gets no gradient, as in torch."""
    found = tap.find(weight)
    if found is None or found.transposed or scale_grad_by_freq:
        # Frequencies are counted in the batch; what autograd makes of them has no factored form.
        return tap.call(
            func, input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    if max_norm is not None:
        raise ValueError(
            f"expected an embedding {found.name!r} without max_norm, which rewrites its parameter "
            "in place at every call; renormalise between steps instead"
        )

    def call(w: Tensor) -> Tensor:
        return F.embedding(input, w, padding_idx)

    def activations(indices: Tensor) -> OneHot:
        return OneHot(indices.reshape(1, -1))

    def cotangents(cotangent: Tensor) -> Tensor:
        flat = cotangent.reshape(1, -1, cotangent.shape[-1])
        if padding_idx is None:
            return flat
        return flat * (input.reshape(1, -1, 1) != padding_idx % weight.shape[0])

    return tap.use(
        found, func, call, weight, input, activations, cotangents, activations_first=True
    )


def embedding_bag(
    tap: Tap,
    func: Any,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Rule of `F.embedding_bag` on bags [n, length]: an embedding, then a reduction of each bag."""
    # Bags of different lengths, given by offsets, are left to torch.
    if input.ndim != 2 or tap.find(weight) is None:
        return tap.call(
            func,
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    vectors = embedding(
        tap, func, input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq
    )
    kept = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        kept = input != padding_idx % weight.shape[0]
    kept = kept[..., None]
    if mode == "max":
        lowest = vectors.masked_fill(~kept, -torch.inf).max(1).values
        return torch.where(kept.any(1), lowest, torch.zeros_like(lowest))
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights[..., None]
    total = torch.where(kept, vectors, torch.zeros_like(vectors)).sum(1)
    return total / kept.sum(1).clamp(min=1) if mode == "mean" else total


RULES: dict[Any, Rule] = {F.embedding: embedding, F.embedding_bag: embedding_bag}

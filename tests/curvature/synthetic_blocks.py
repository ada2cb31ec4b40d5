"""Random curvatures of every kind of block, and their matrices, assembled without jdfunc."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdfunc import pytrees
from jdfunc.curvature.blocks import Block, Factors, Spectrum
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.damping import exact
from jdfunc.factored.leaves import OneHot, Outer, Tied

F64 = torch.float64
KINDS = ("kfac", "known", "ekfac", "thin", "identity")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=F64)


def params_tree() -> dict[str, Any]:
    """Nested, not in the order of the layout, with a scalar."""
    return {
        "linear": {"weight": randn(3, 4), "bias": randn(3)},
        "stored": {"weight": randn(4, 2), "bias": randn(2)},
        "conv": {"weight": randn(4, 3, 2, 1), "bias": randn(4)},
        "alone": {"weight": randn(3, 2), "bias": randn(3)},
        "embedding": randn(5, 3),
        "norm": {"weight": randn(4), "bias": randn(4)},
        "unused": [randn(2, 2), randn()],
    }


LAYOUT = (
    Block(("stored.weight", "stored.bias"), ((4, 2), (2,)), ((1, 4, 2), (1, 1, 2)), -2, 0),
    Block(("linear.weight", "linear.bias"), ((3, 4), (3,)), ((1, 3, 4), (1, 3, 1)), -1, 1),
    Block(("conv.weight", "conv.bias"), ((4, 3, 2, 1), (4,)), ((2, 2, 6), (2, 2, 1)), -1, 1),
    Block(("alone.weight",), ((3, 2),), ((1, 3, 2),), -1, 1),
    Block(("alone.bias",), ((3,),), ((1, 3, 1),)),
    Block(("embedding",), ((5, 3),), ((1, 5, 3),), -1, 0),
    Block(("norm.weight", "norm.bias"), ((4,), (4,)), ((1, 1, 4), (1, 1, 4))),
    Block(("unused.0",), ((2, 2),), ((1, 1, 4),)),
    Block(("unused.1",), ((),), ((1, 1, 1),)),
)


class Case(NamedTuple):
    """A curvature, and for each block its two factors, or its own matrix on M flattened."""

    curv: Curvature
    truth: dict[str, list[Any]]


def spd(d: int, rank: int | None = None) -> Tensor:
    x = randn(d, d if rank is None else rank)
    return x @ x.T / d


def orthonormal(d: int, r: int) -> Tensor:
    return torch.linalg.qr(randn(d, d))[0][:, :r].contiguous()


def curvature(kind: str, damping: Any = None, rank: int | None = None) -> Case:
    """A curvature whose products are held in one way; biases, norms and zeros in theirs."""
    blocks, truth = {}, {}
    for block in LAYOUT:
        h, i, j = block.shape
        name = block.name
        if name.startswith("unused"):
            blocks[name] = Spectrum(None, None, torch.zeros(h, i, j, dtype=F64))
            truth[name] = [torch.zeros(i * j, i * j, dtype=F64)]
        elif name == "norm.weight":
            dense = spd(j)
            blocks[name], truth[name] = _held_dense(kind, dense)
        else:
            make = _product if block.activations is not None else _bias
            blocks[name], truth[name] = make(kind, h, i, j, rank, name == "embedding")
    return Case(Curvature(LAYOUT, blocks, exact(0.1) if damping is None else damping), truth)


def _held_dense(kind: str, dense: Tensor) -> Any:
    if kind == "kfac":
        return Factors(torch.ones(1, 1, dtype=F64), dense[None]), [(torch.eye(1).double(), dense)]
    values, vectors = torch.linalg.eigh(dense)
    return Spectrum(None, vectors[None].contiguous(), values[None, None]), [dense]


def _bias(kind: str, h: int, i: int, j: int, rank: int | None, diagonal: bool) -> Any:
    factors, pairs = _product("kfac", h, i, j, None, False)
    ones = torch.ones(h, j, dtype=F64)
    pairs = [(left, torch.eye(j, dtype=F64)) for left, _ in pairs]
    return Factors(factors.left, ones), pairs


def _product(kind: str, h: int, i: int, j: int, rank: int | None, diagonal: bool) -> Any:
    """Factors or a spectrum of one layer, and per group the pair (L, R), or the matrix."""
    if kind in ("kfac", "known"):
        diagonals = torch.rand(h, i, dtype=F64)
        left = [torch.diag(x) for x in diagonals] if diagonal else [spd(i, rank) for _ in range(h)]
        right = [spd(j, rank) for _ in range(h)]
        pairs = list(zip(left, right, strict=True))
        L, R = torch.stack(left), torch.stack(right)
        if kind == "kfac":
            return Factors(diagonals if diagonal else L, R), pairs
        (a, P), (b, Q) = torch.linalg.eigh(L), torch.linalg.eigh(R)
        a, b, P, Q = a.clamp(min=0), b.clamp(min=0), P.contiguous(), Q.contiguous()
        if diagonal:
            a, P = diagonals, None
        return Spectrum(P, Q, a[..., None] * b[..., None, :], (a, b)), pairs
    r, q = (max(1, i // 2), max(1, j // 2)) if kind == "thin" else (i, j)
    P = None if kind == "identity" or diagonal else _stack(h, i, r)
    Q = None if kind == "identity" else _stack(h, j, q)
    values = torch.rand(h, i if P is None else r, q, dtype=F64) + 0.01
    matrices = []
    for g in range(h):
        left = torch.eye(i, dtype=F64) if P is None else P[g]
        right = torch.eye(j, dtype=F64) if Q is None else Q[g]
        vectors = torch.kron(left.contiguous(), right.contiguous())
        matrices.append(vectors @ torch.diag(values[g].flatten()) @ vectors.T)
    return Spectrum(P, Q, values), matrices


def _stack(h: int, d: int, r: int) -> Tensor:
    return torch.stack([orthonormal(d, r) for _ in range(h)])


# --- the matrix of a curvature ---------------------------------------------------------------


def group_matrices(case: Case, block: Block) -> list[Tensor]:
    return [torch.kron(*t) if isinstance(t, tuple) else t for t in case.truth[block.name]]


def whole(blocks: dict[str, list[Tensor]]) -> Tensor:
    """The matrix over the leaves of the params, from those of each group of each block."""
    names = pytrees.names(params_tree())
    sizes = {n: leaf.numel() for n, leaf in zip(names, pytrees.leaves(params_tree()), strict=True)}
    starts, at = {}, 0
    for name in names:
        starts[name], at = at, at + sizes[name]
    F = torch.zeros(at, at, dtype=F64)
    for block in LAYOUT:
        index = positions(block, starts)
        dense = torch.block_diag(*blocks[block.name])
        F[index[:, None], index] = dense
    return F


def positions(block: Block, starts: dict[str, int]) -> Tensor:
    """Where the elements of M, flattened, stand among all parameters."""
    index = torch.full(block.shape, -1)
    at = 0
    for name, part in zip(block.params, block.parts, strict=True):
        own = starts[name] + torch.arange(math.prod(part)).reshape(part)
        if block.axis == -1:
            index[:, :, at : at + part[2]] = own
        else:
            index[:, at : at + part[1]] = own
        at += part[block.axis]
    assert (index >= 0).all()
    return index.flatten()


def dense(case: Case) -> Tensor:
    return whole({block.name: group_matrices(case, block) for block in LAYOUT})


def matrix_power(F: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh((F + F.T) / 2)
    zero = values.abs() < 1e-12 * values.max()
    values = torch.where(zero, 1.0, values)
    powers = torch.where(zero, 0.0 if p else 1.0, values**p)
    return vectors @ torch.diag(powers) @ vectors.T


def flat(tree: Any) -> Tensor:
    """A tree with leaves [*columns, *param.shape] as [*columns, n]."""
    like, leaves = pytrees.leaves(params_tree()), pytrees.leaves(tree)
    columns = leaves[0].shape[: leaves[0].ndim - like[0].ndim]
    pairs = zip(leaves, like, strict=True)
    return torch.cat([leaf.reshape(*columns, own.numel()) for leaf, own in pairs], -1)


def columns_tree(*columns: int) -> Any:
    return pytrees.map(lambda leaf: randn(*columns, *leaf.shape), params_tree())


def few_blocks(case: Case, tree: Any) -> tuple[Curvature, Any]:
    """Three blocks and their part of a tree, for what takes long: a joint bias, one-hot, a zero."""
    tops = ("linear", "embedding", "unused")
    layout = tuple(b for b in LAYOUT if b.name.split(".")[0] in tops)
    return case.curv._replace(layout=layout), {top: tree[top] for top in tops}


# --- rows ------------------------------------------------------------------------------------


def factored_rows(m: int, shared: bool = False) -> Any:
    """Rows as linearizations hold them: factored weights, dense biases, a tie, one-hot vectors."""
    p, a = params_tree(), (1 if shared else m)

    def outer(left: Tensor, right: Tensor, param: Tensor) -> Outer:
        return Outer(left, right, param)

    conv = p["conv"]["weight"]
    return {
        "linear": {
            "weight": outer(randn(m, 1, 2, 3), randn(a, 1, 2, 4), p["linear"]["weight"]),
            "bias": randn(m, 3),
        },
        "stored": {
            "weight": outer(randn(a, 1, 2, 4), randn(m, 1, 2, 2), p["stored"]["weight"]),
            "bias": randn(m, 2),
        },
        "conv": {
            "weight": outer(randn(m, 2, 5, 2), randn(a, 2, 5, 6), conv),
            "bias": randn(m, 4),
        },
        "alone": {
            "weight": Tied(
                (
                    outer(randn(m, 1, 1, 3), randn(m, 1, 1, 2), p["alone"]["weight"]),
                    outer(randn(m, 1, 3, 3), randn(a, 1, 3, 2), p["alone"]["weight"]),
                )
            ),
            "bias": randn(m, 3),
        },
        "embedding": outer(
            OneHot(torch.randint(0, 5, (m, 1, 4))),  # pyright: ignore
            randn(m, 1, 4, 3),
            p["embedding"],
        ),
        "norm": {"weight": randn(m, 4), "bias": randn(m, 4)},
        "unused": [
            Outer(randn(m, 1, 0, 4), randn(m, 1, 0, 1), p["unused"][0]),
            randn(m),
        ],
    }


def dense_rows(rows: Any) -> Any:
    """Rows [m, *param.shape], from the formula."""

    def one(leaf: Any) -> Tensor:
        if isinstance(leaf, Tensor):
            return leaf
        total: Any = 0
        for use in leaf.uses if isinstance(leaf, Tied) else (leaf,):
            left = use.left
            if isinstance(left, OneHot):
                left = torch.nn.functional.one_hot(left.indices, use.param.shape[0]).double()
            total = total + torch.einsum("rhsi,rhsj->rhij", *_expanded(left, use.right))
        param = (leaf.uses[0] if isinstance(leaf, Tied) else leaf).param
        return total.reshape(-1, *param.shape)

    return pytrees.map(one, rows, is_leaf=lambda x: isinstance(x, (Tensor, Outer, Tied)))


def _expanded(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    m = max(left.shape[0], right.shape[0])
    return left.expand(m, *left.shape[1:]), right.expand(m, *right.shape[1:])


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Largest error relative to the largest element wanted, or absolute below one."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    error = float((got.double() - wanted).abs().max()) if wanted.numel() else 0.0
    assert error <= tolerance * scale, f"error {error:.2e} at scale {scale:.2e}"

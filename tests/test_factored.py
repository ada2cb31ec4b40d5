"""Factored rows against dense rows: J, Jᵀw, G and row norms of every layout, in both forms."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import jdfunc as jd
from jdfunc.factored import leaves, products
from jdfunc.factored.leaves import OneHot, Outer, Tied
from jdfunc.factored.products import GramCost

HUGE = 1 << 40
F64 = torch.float64


def randn(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64).to(dtype)


# --- the truth --------------------------------------------------------------------------------


def dense(leaf: Any) -> Tensor:
    """Rows [*rows, *param.shape] in float64, from the formula."""
    total: Any = 0
    for use in leaf.uses if isinstance(leaf, Tied) else (leaf,):
        left = use.left
        if isinstance(left, OneHot):
            left = F.one_hot(left.indices, use.param.shape[0])
        total = total + torch.einsum("...hsi,...hsj->...hij", left.double(), use.right.double())
    rows = total.shape[:-3]
    return total.reshape(*rows, *(leaf.uses[0] if isinstance(leaf, Tied) else leaf).param.shape)


def matrix(leaf: Any) -> Tensor:
    """Rows as [m, n]."""
    rows = leaves.rows_shape(leaf)
    return dense(leaf).reshape(rows.numel(), leaves.param_of(leaf).numel())


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == wanted.shape, f"{tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    error = float((got.double() - wanted).abs().max()) if wanted.numel() else 0.0
    assert error <= tolerance * scale, f"error {error:.2e} at scale {scale:.2e}"


def forced(form: str | None) -> Any:
    """Make `gram` take one form whatever it costs; the size of its blocks stays the same."""
    true_cost = products.gram_cost

    def cost(leaf: Any, other: Any = None) -> tuple[GramCost, GramCost]:
        pairwise, materialised = true_cost(leaf, other)
        if form == "pairwise":
            pairwise = pairwise._replace(multiply_adds=-(10**18))
        if form == "materialised":
            materialised = materialised._replace(multiply_adds=-(10**18))
        return pairwise, materialised

    return mock.patch.object(products, "gram_cost", cost)


def check_gram(leaf: Any, other: Any = None, sizes: Any = (1, 300, HUGE)) -> None:
    wanted = matrix(leaf) @ matrix(leaf if other is None else other).T
    for form in ("pairwise", "materialised", None):
        for size in sizes:
            with forced(form):
                close(products.gram(leaf, other, size), wanted)


# --- leaves of any layout ---------------------------------------------------------------------


class Layout(NamedTuple):
    """Sizes of one leaf."""

    rows: tuple[int, ...]
    left_shared: tuple[bool, ...]  # which row axes the left side holds once
    right_shared: tuple[bool, ...]
    h: int
    s: int
    i: int
    j: int


def outer(layout: Layout, dtype: torch.dtype = F64) -> Outer:
    r, h, s = layout.rows, layout.h, layout.s
    left = [1 if shared else n for n, shared in zip(r, layout.left_shared, strict=True)]
    right = [1 if shared else n for n, shared in zip(r, layout.right_shared, strict=True)]
    shape = (h, layout.i, layout.j) if h > 1 else (layout.i, layout.j)
    return Outer(
        randn(*left, h, s, layout.i, dtype=dtype),
        randn(*right, h, s, layout.j, dtype=dtype),
        randn(*shape, dtype=dtype),
    )


def one_hot(layout: Layout, dtype: torch.dtype = F64) -> Outer:
    """One-hot vectors, in few enough kinds that they repeat."""
    left = [1 if shared else n for n, shared in zip(layout.rows, layout.left_shared, strict=True)]
    indices = torch.randint(0, layout.i, (*left, 1, layout.s))
    right = randn(*layout.rows, 1, layout.s, layout.j, dtype=dtype)
    return Outer(OneHot(indices), right, randn(layout.i, layout.j, dtype=dtype))


ROWS = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 6)),
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)),
)


@st.composite
def layouts(draw: Any, rows: tuple[int, ...] | None = None, param: Any = None) -> Layout:
    rows = draw(ROWS) if rows is None else rows
    shared = [draw(st.sampled_from(["neither", "left", "right"])) for _ in rows]
    h, i, j = param or (draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    return Layout(
        rows,
        tuple(k == "left" for k in shared),
        tuple(k == "right" for k in shared),
        h,
        draw(st.integers(0, 5)),
        i,
        j,
    )


@st.composite
def factored(draw: Any) -> Any:
    """A leaf of one to three uses, with or without one-hot vectors."""
    first = draw(layouts())
    kinds = draw(st.lists(st.sampled_from(["outer", "one_hot"]), min_size=1, max_size=3))
    h = 1 if "one_hot" in kinds else first.h
    uses = []
    for kind in kinds:
        layout = draw(layouts(first.rows, (h, first.i, first.j)))
        # A leaf whose uses all share a row axis has other rows: let the first hold every row.
        if not uses:
            layout = layout._replace(right_shared=(False,) * len(first.rows))
        uses.append(one_hot(layout) if kind == "one_hot" else outer(layout))
    return uses[0] if len(uses) == 1 and draw(st.booleans()) else Tied(tuple(uses))


many = settings(max_examples=150)


@many
@given(factored())
def test_materialise(leaf: Any) -> None:
    close(leaves.materialise(leaf), dense(leaf))


@many
@given(factored())
def test_rows_shape(leaf: Any) -> None:
    assert leaves.rows_shape(leaf) == dense(leaf).shape[: -leaves.param_of(leaf).ndim]


@many
@given(factored())
def test_combine(leaf: Any) -> None:
    weights = randn(*leaves.rows_shape(leaf))
    wanted = (weights.reshape(1, -1) @ matrix(leaf)).reshape(leaves.param_of(leaf).shape)
    close(leaves.combine(leaf, weights), wanted)


@settings(max_examples=80)
@given(factored())
def test_gram(leaf: Any) -> None:
    check_gram(leaf)


@settings(max_examples=80)
@given(st.data())
def test_cross_gram(data: Any) -> None:
    """Rows of two batches, of other numbers of rows, positions and uses, in either order."""
    first = data.draw(layouts())
    second_rows = data.draw(ROWS)
    pair = []
    for rows in (first.rows, second_rows):
        kinds = data.draw(st.lists(st.sampled_from(["outer", "one_hot"]), min_size=1, max_size=2))
        h = first.h if first.h > 1 else 1
        uses = []
        for kind in kinds:
            layout = data.draw(layouts(rows, (h, first.i, first.j)))
            if not uses:
                layout = layout._replace(right_shared=(False,) * len(rows))
            uses.append(one_hot(layout) if kind == "one_hot" and h == 1 else outer(layout))
        pair.append(Tied(tuple(uses)) if len(uses) > 1 else uses[0])
    check_gram(*pair)
    check_gram(pair[1], pair[0], sizes=(HUGE,))


@many
@given(factored())
def test_squared_norms(leaf: Any) -> None:
    wanted = matrix(leaf).square().sum(1).reshape(leaves.rows_shape(leaf))
    close(products.squared_norms(leaf), wanted)


@many
@given(st.data())
def test_concatenate(data: Any) -> None:
    """Two uses as one: the rows of their sum, or None where the sides do not line up."""
    first = data.draw(layouts())
    second = data.draw(layouts(first.rows, (first.h, first.i, first.j)))
    kinds = [data.draw(st.booleans()) and first.h == 1 for _ in range(2)]
    one, two = (
        one_hot(layout) if kind else outer(layout)
        for layout, kind in zip((first, second), kinds, strict=True)
    )
    joined = leaves.concatenate(one, two)
    assert (joined is None) == (kinds[0] != kinds[1])
    if joined is not None:
        assert leaves.positions(joined.left) == first.s + second.s
        assert joined.right.shape[-2] == first.s + second.s
        both = leaves.materialise(one) + leaves.materialise(two)
        close(leaves.materialise(joined), both.expand(dense(joined).shape))
        assert joined.param is one.param


def test_concatenate_refuses_other_matrices() -> None:
    one = outer(Layout((3,), (False,), (False,), 1, 2, 4, 5))
    for h, i, j in ((2, 4, 5), (1, 5, 4), (1, 4, 3), (1, 2, 5)):
        assert leaves.concatenate(one, outer(Layout((3,), (False,), (False,), h, 2, i, j))) is None
    fewer_axes = outer(Layout((), (), (), 1, 2, 4, 5))
    assert leaves.concatenate(one, fewer_axes) is None


def test_a_tied_leaf_of_rows_that_each_use_shares_in_part() -> None:
    """No use alone holds every row on its right side."""
    one = outer(Layout((3, 2), (True, False), (False, True), 2, 3, 4, 5))
    two = outer(Layout((3, 2), (False, True), (True, False), 2, 1, 4, 5))
    leaf = Tied((one, two))
    check_gram(leaf)
    close(leaves.materialise(leaf), dense(leaf))
    close(products.squared_norms(leaf), matrix(leaf).square().sum(1).reshape(3, 2))
    weights = randn(3, 2)
    close(leaves.combine(leaf, weights), (weights.reshape(-1) @ matrix(leaf)).reshape(2, 4, 5))


def test_elements() -> None:
    one = outer(Layout((3,), (True,), (False,), 2, 4, 5, 7))
    assert leaves.elements(one) == 2 * 4 * 5 + 3 * 2 * 4 * 7
    two = one_hot(Layout((3,), (False,), (False,), 1, 4, 5, 7))
    assert leaves.elements(two) == 3 * 4 + 3 * 4 * 7
    assert leaves.elements(Tied((one, two))) == leaves.elements(one) + leaves.elements(two)


def test_param_of_any_shape() -> None:
    """The kernel of a convolution: [h, i, j] reshaped."""
    left, right = randn(3, 2, 4, 5), randn(3, 2, 4, 6)
    leaf = Outer(left, right, randn(10, 2, 3))
    assert leaves.materialise(leaf).shape == (3, 10, 2, 3)
    close(leaves.materialise(leaf), dense(leaf))
    close(leaves.combine(leaf, torch.ones(3, dtype=F64)), dense(leaf).sum(0))


# --- blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [*range(1, 10), *range(250, 271)])
def test_symmetric_product(m: int) -> None:
    x = randn(m, 3)
    got = products.product(x, x, symmetric=True)
    close(got, x @ x.T)
    close(got, got.T)
    close(products.product(x, x, symmetric=False), x @ x.T)


def recorded_blocks(m: int, q: int, cells: int, **options: Any) -> list[tuple[int, int, int, int]]:
    """Check a matrix made by blocks of a known one, and return the blocks asked for."""
    truth = randn(m, q)
    truth = truth + truth.T if options["symmetric"] else truth
    blocks = []

    def block(a: slice, b: slice) -> Tensor:
        blocks.append((a.start, a.stop, b.start, b.stop))
        assert a.stop <= m
        assert b.stop <= q
        return truth[a, b]

    close(products.by_blocks(block, m, q, cells, **options), truth, 0.0)
    return blocks


@settings(max_examples=300)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 2000), st.booleans(), st.booleans())
@example(m=1, q=1, cells=1, symmetric=True, strips=True)
@example(m=5, q=5, cells=24, symmetric=True, strips=False)
@example(m=5, q=5, cells=25, symmetric=True, strips=False)
def test_blocks_cover_and_are_bounded(
    m: int, q: int, cells: int, symmetric: bool, strips: bool
) -> None:
    q = m if symmetric else q
    blocks = recorded_blocks(m, q, cells, symmetric=symmetric, strips=4 if strips else 1)
    sizes = [(b - a) * (d - c) for a, b, c, d in blocks]
    assert max(sizes) <= cells
    if symmetric:
        assert all(d <= b for _, b, _, d in blocks), "above the diagonal block"
    else:
        assert sum(sizes) == m * q
        if cells >= m * q:
            assert len(blocks) == 1


@pytest.mark.parametrize("m", [4, 256, 257, 1000])
def test_strips_save_work(m: int) -> None:
    blocks = recorded_blocks(m, m, m * m, symmetric=True, strips=4)
    assert len(blocks) == 4
    assert sum((b - a) * (d - c) for a, b, c, d in blocks) <= (5 / 8) * m * m + m
    assert len(recorded_blocks(m, m, m * m, symmetric=True, strips=2)) == 2
    assert len(recorded_blocks(m, m, m * m, symmetric=True, strips=1)) == 1


def test_strips_save_work_where_blocks_are_bounded_too() -> None:
    """A bound between that of a strip and that of the whole does not make the strips higher."""
    blocks = recorded_blocks(64, 64, 64 * 64 - 1, symmetric=True, strips=4)
    assert {b - a for a, b, _, _ in blocks} == {16}
    assert sum((b - a) * (d - c) for a, b, c, d in blocks) == 5 / 8 * 64 * 64


@pytest.mark.parametrize(("m", "n", "strips"), [(63, 4096, 1), (64, 4096, 2), (64, 4095, 1),
                                                (255, 4096, 2), (256, 5, 4)])  # fmt: skip
def test_products_are_cut_where_it_pays(m: int, n: int, strips: int, monkeypatch: Any) -> None:
    cuts = []
    by_blocks = products.by_blocks

    def recorded(*args: Any, **options: Any) -> Tensor:
        cuts.append(options["strips"])
        return by_blocks(*args, **options)

    monkeypatch.setattr(products, "by_blocks", recorded)
    x = torch.randn(m, n, dtype=torch.float64)
    close(products.product(x, x, symmetric=True), x @ x.mT, 1e-12)
    assert cuts == [strips]


def test_blocks_are_square() -> None:
    """A square reads the fewest vectors for its cells."""
    blocks = recorded_blocks(32, 32, 64, symmetric=False, strips=1)
    assert {(b - a, d - c) for a, b, c, d in blocks} == {(8, 8)}
    assert len(blocks) == 16


@pytest.mark.parametrize("m", [5, 64, 67])
@pytest.mark.parametrize("shared", [False, True])
def test_strips_of_leaves(m: int, shared: bool) -> None:
    """Enough vectors m·s that the symmetric form is cut."""
    layout = Layout((m,), (shared,), (False,), 1, 4 if m > 5 else 60, 3, 2)
    check_gram(outer(layout), sizes=(3000, HUGE))
    check_gram(one_hot(layout), sizes=(3000, HUGE))
    grid = layout._replace(rows=(m, 2), left_shared=(shared, False), right_shared=(False, False))
    check_gram(outer(grid), sizes=(3000, HUGE))


@pytest.mark.parametrize("form", ["pairwise", "materialised"])
def test_temporaries_stay_below_the_bound(form: str) -> None:
    """No temporary of a Gramian of 60 rows is above the bound where 60² of them would be."""
    leaf, bound = outer(Layout((60,), (False,), (False,), 1, 11, 13, 17)), 50_000
    largest, held = 0, {t.untyped_storage().data_ptr() for t in (leaf.left, leaf.right)}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in held:
                largest = max(largest, out.numel() * out.element_size())
            return out

    for size, above in ((HUGE, True), (bound, False)):
        largest = 0
        with forced(form), Watch():
            products.gram(leaf, None, size)
        assert (largest > bound) == above, largest


# --- the cost of each form --------------------------------------------------------------------


def meta(rows: int, s: int, i: int, j: int, *, h: int = 1, shared: bool = False) -> Outer:
    """A leaf of shapes without data."""
    left = torch.empty(1 if shared else rows, h, s, i, device="meta")
    right = torch.empty(rows, h, s, j, device="meta")
    return Outer(left, right, torch.empty(h, i, j, device="meta"))


def test_gram_cost_by_hand() -> None:
    # m = 3 rows of one position, 4 x 5: 9 pairs on each side, and 9 products of them.
    assert products.gram_cost(meta(3, 1, 4, 5)) == ((9 * 4 + 9 * 5 + 9, 27), (3 * 20 + 9 * 20, 60))
    # Two positions: four times the pairs.
    assert products.gram_cost(meta(3, 2, 4, 5)) == (
        (36 * 4 + 36 * 5 + 36, 108),
        (3 * 2 * 20 + 9 * 20, 60),
    )
    # A side that all rows share is multiplied once.
    assert products.gram_cost(meta(3, 2, 4, 5, shared=True))[0] == (4 * 4 + 36 * 5 + 36, 76)
    # Groups: twice the pairs, and a parameter of twice the size.
    assert products.gram_cost(meta(3, 2, 4, 5, h=2)) == (
        (72 * 4 + 72 * 5 + 72, 216),
        (3 * 2 * 40 + 9 * 40, 120),
    )
    # Another batch of 2 rows of 3 positions.
    assert products.gram_cost(meta(3, 2, 4, 5), meta(2, 3, 4, 5)) == (
        (36 * 4 + 36 * 5 + 36, 108),
        ((3 * 2 + 2 * 3 + 6) * 20, 100),
    )


def test_gram_cost_of_one_hot_vectors() -> None:
    """Indices are compared: one operation a pair, not i."""
    indices = torch.empty(3, 1, 2, dtype=torch.long, device="meta")
    right, param = torch.empty(3, 1, 2, 5, device="meta"), torch.empty(4, 5, device="meta")
    hot = Outer(OneHot(indices), right, param)
    assert products.gram_cost(hot)[0] == (36 + 36 * 5 + 36, 108)
    full = Outer(torch.empty(3, 1, 2, 4, device="meta"), right, param)
    assert products.gram_cost(hot, full)[0] == (36 + 36 * 5 + 36, 108)
    assert products.gram_cost(full, hot)[0] == (36 + 36 * 5 + 36, 108)


def test_gram_cost_of_tied_uses() -> None:
    """Pairs of uses, each with each."""
    one, two = meta(3, 2, 4, 5), meta(3, 1, 4, 5)
    tied = Tied((one, two))
    pairs = [products.gram_cost(a, b)[0] for a in (one, two) for b in (one, two)]
    assert products.gram_cost(tied)[0] == (
        sum(p.multiply_adds for p in pairs),
        sum(p.elements for p in pairs),
    )
    assert products.gram_cost(tied)[1] == (3 * 3 * 20 + 9 * 20, 60)


def test_gram_cost_of_strips() -> None:
    """From 256 vectors on, five eighths of the pairs are computed; not of two batches."""
    below, above = meta(255, 1, 4, 8), meta(256, 1, 4, 8)
    for leaf, m, share in ((below, 255, 8), (above, 256, 5)):
        assert products.gram_cost(leaf)[0] == (share * m * m * 13 // 8, share * m * m * 3 // 8)
    assert products.gram_cost(above, meta(256, 1, 4, 8))[0].elements == 3 * 256**2
    assert products.gram_cost(meta(64, 4, 4, 8))[0].elements == 5 * 3 * 256**2 // 8


def test_total_cost_counts_a_write_and_a_read() -> None:
    assert GramCost(7, 3).total == 7 + 2 * 3 * products.MULTIPLY_ADDS_PER_ELEMENT


sizes = st.integers(1, 60)


@given(sizes, sizes, sizes, sizes, st.integers(1, 4), st.booleans(), st.integers(0, 4))
def test_gram_cost_grows(m: int, s: int, i: int, j: int, h: int, shared: bool, grown: int) -> None:
    """More of any size never costs less, in either form."""
    small = [m, s, i, j, h]
    big = [n + 7 * (k == grown) for k, n in enumerate(small)]
    if m * s < products.SMALLEST_STRIPS <= big[0] * big[1]:  # where cutting begins to save
        return
    one, two = (
        products.gram_cost(meta(a, b, c, d, h=e, shared=shared)) for a, b, c, d, e in (small, big)
    )
    for before, after in zip(one, two, strict=True):
        assert before.multiply_adds <= after.multiply_adds
        assert before.elements <= after.elements
        assert before.total <= after.total


@pytest.mark.parametrize("rows", [2, 64, 256])
def test_wide_layers_are_pairwise(rows: int) -> None:
    for i, j in ((784, 1024), (1024, 1024), (64, 10)):
        pairwise, materialised = products.gram_cost(meta(rows, 1, i, j))
        assert pairwise.total < materialised.total


@pytest.mark.parametrize("rows", [2, 32, 64])
def test_small_kernels_with_many_positions_are_materialised(rows: int) -> None:
    for s, i, j in ((26 * 26, 9, 32), (24 * 24, 25, 6), (400, 3, 4)):
        pairwise, materialised = products.gram_cost(meta(rows, s, i, j))
        assert materialised.total < pairwise.total


@given(factored())
def test_the_cost_knows_shapes_alone(leaf: Any) -> None:
    def without_data(x: Any) -> Any:
        if isinstance(x, Tensor):
            return torch.empty_like(x, device="meta")
        parts = map(without_data, x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)

    assert products.gram_cost(without_data(leaf)) == products.gram_cost(leaf)


@pytest.mark.parametrize("kind", ["pairwise", "materialised"])
def test_the_cheaper_form_is_taken(kind: str) -> None:
    s, i, j = (1, 40, 30) if kind == "pairwise" else (90, 3, 2)
    leaf = outer(Layout((5,), (False,), (False,), 1, s, i, j))
    taken = []
    for name in ("_pairwise", "_materialised"):
        true = getattr(products, name)

        def spy(*args: Any, true: Any = true, name: str = name) -> Tensor:
            taken.append(name)
            return true(*args)

        with mock.patch.object(products, name, spy):
            products.gram(leaf, None, HUGE)
    assert set(taken) == {f"_{kind}"}


# --- precision, NaN ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["outer", "one_hot", "tied"])
def test_products_accumulate_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded numbers, over a long sum."""
    layout = Layout((4,), (False,), (False,), 1, 300, 5, 7)
    hot, full = one_hot(layout, dtype), outer(layout, dtype)
    leaf = {"outer": full, "one_hot": hot, "tied": Tied((full, hot))}[kind]
    wanted = matrix(leaf)
    for form in ("pairwise", "materialised"):
        with forced(form):
            got = products.gram(leaf, None, HUGE)
            assert got.dtype == torch.float32
            close(got, wanted @ wanted.T, 1e-5)
            close(products.gram(leaf, full, 3000), wanted @ matrix(full).T, 1e-5)
    norms = products.squared_norms(leaf)
    assert norms.dtype == torch.float32
    close(norms, wanted.square().sum(1), 1e-5)
    rows, combined = leaves.materialise(leaf), leaves.combine(leaf, torch.ones(4))
    assert rows.dtype == combined.dtype == dtype
    # Rounded once, at the end.
    close(rows.reshape(4, -1), wanted, torch.finfo(dtype).eps + 1e-6)
    close(combined.flatten(), wanted.sum(0), torch.finfo(dtype).eps + 1e-6)


@pytest.mark.parametrize("form", ["pairwise", "materialised"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["outer", "one_hot", "tied"])
@pytest.mark.parametrize("s", [3, 40])
def test_nan_poisons_its_own_row_and_column(kind: str, side: str, form: str, s: int) -> None:
    """Also where a symmetric Gramian is cut into strips (s = 40)."""
    layout = Layout((7,), (False,), (False,), 1, s, 5, 4)
    full = outer(layout)
    hot = one_hot(layout)
    if kind == "one_hot":
        hot.right[2, 0, 1, 1] = torch.nan
    else:
        getattr(full, side)[2, 0, 1, 1] = torch.nan
    leaf = {"outer": full, "one_hot": hot, "tied": Tied((hot, full))}[kind]
    poisoned = torch.zeros(7, dtype=torch.bool)
    poisoned[2] = True
    for size in (1, 2000, HUGE):
        with forced(form):
            got = products.gram(leaf, None, size)
        assert torch.equal(got.isnan(), poisoned[:, None] | poisoned)
    assert torch.equal(products.squared_norms(leaf).isnan(), poisoned)
    assert torch.equal(leaves.materialise(leaf).flatten(1).isnan().any(1), poisoned)


def test_infinite_rows_do_not_spoil_others() -> None:
    x = randn(300, 4)
    x[17, 2] = torch.inf
    got = products.product(x, x, symmetric=True)
    kept = torch.arange(300) != 17
    close(got[kept][:, kept], x[kept] @ x[kept].T)


def test_gram_of_integer_powers_is_exact() -> None:
    """Small whole numbers: every form gives the same bits."""
    leaf = Outer(torch.arange(24.0).reshape(3, 1, 2, 4), torch.ones(3, 1, 2, 2), torch.ones(4, 2))
    wanted = (matrix(leaf) @ matrix(leaf).T).float()
    for form in ("pairwise", "materialised"):
        with forced(form):
            assert torch.equal(products.gram(leaf, None, HUGE), wanted)


# --- uses by rules, in spellings beyond those of the zoo --------------------------------------


def last(*dims: int) -> Any:
    return lambda w, x: x @ torch.transpose(w, *dims)


SPELLINGS: dict[str, Any] = {  # w [4, 4], x [3, 4]
    "addmm_parameter_first": lambda w, x: torch.addmm(x.T, w, x.T, beta=0.5, alpha=-1.5).T,
    "addmm_parameter_first_integer": lambda w, x: torch.addmm(x.T, w, x.T, alpha=3).T,
    "addmm_parameter_last_integer": lambda w, x: torch.addmm(x, x, w, alpha=-2),
    "transposed": last(0, 1),
    "transposed_from_the_end": last(-1, -2),
    "transposed_mixed": last(1, -2),
    "transposed_onto_itself": last(0, 0),
    "transposed_onto_itself_mixed": last(1, -1),
    "transposed_twice": lambda w, x: x @ w.T.mT,
    "transposed_three_times": lambda w, x: x @ w.T.mT.t(),
    "transposed_by_name": lambda w, x: x @ w.transpose(dim0=0, dim1=1),
    "transposed_by_name_onto_itself": lambda w, x: x @ w.transpose(dim0=0, dim1=-2),
    "by_itself": lambda w, x: x @ (w @ w),
    "by_its_transpose": lambda w, x: x @ (w @ w.T),
}


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, batch_dim: Any) -> None:
    def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
        return SPELLINGS[name](params["w"], x).sin().sum(1)

    params, x = {"w": randn(4, 4)}, randn(3, 4)
    rows = jd.structured(model_fn, params, x, batch_dim=batch_dim).rows
    wanted = oracles.jacobian_rows(model_fn, params, {}, x)
    oracles.assert_close(jd.to_dense(rows), wanted, tolerance=1e-12)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("padding", [-1, -5, 0, 4])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_with_padding_from_the_end(mode: str, padding: int, batch_dim: Any) -> None:
    """Padding of bags counted from the end, and bags of nothing but padding."""

    def model_fn(params: Any, buffers: Any, index: Tensor) -> Tensor:
        out = F.embedding_bag(index, params["w"], padding_idx=padding, mode=mode)
        return (out.sin() + out).sum(1)

    index = torch.tensor([[0, 4, 2], [4, 4, 4], [0, 0, 0], [1, 2, 4]])
    params = {"w": randn(5, 3)}
    lin = jd.structured(model_fn, params, index, batch_dim=batch_dim)
    torch.testing.assert_close(lin.losses, model_fn(params, {}, index))
    wanted = oracles.jacobian_rows(model_fn, params, {}, index)
    oracles.assert_close(jd.to_dense(lin.rows), wanted, tolerance=1e-12)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("call", [F.embedding, F.embedding_bag])
def test_an_embedding_that_rewrites_its_parameter_is_refused(call: Any, batch_dim: Any) -> None:
    params, before = {"table": 3 * torch.ones(5, 3, dtype=F64)}, 3 * torch.ones(5, 3, dtype=F64)

    def model_fn(params: Any, buffers: Any, index: Tensor) -> Tensor:
        return call(index, params["table"], max_norm=1.0).flatten(1).sum(1)

    index = torch.randint(0, 5, (4, 2))
    for linearize in (jd.structured, jd.dense):
        with pytest.raises(ValueError, match="'table' without max_norm"):
            linearize(model_fn, params, index, batch_dim=batch_dim)
    assert torch.equal(params["table"], before)


def test_an_embedding_scaled_by_frequencies_of_the_batch_is_refused() -> None:
    """By a module, which hands its options on by position, and by keyword."""
    params, index = {"weight": randn(5, 3)}, torch.randint(0, 5, (4, 2))
    module = torch.nn.Embedding(5, 3, scale_grad_by_freq=True).double()
    for call in (
        lambda p, i: torch.func.functional_call(module, p, (i,)),
        lambda p, i: F.embedding(i, p["weight"], scale_grad_by_freq=True),
    ):
        with pytest.raises(ValueError, match="scale_grad_by_freq"):
            jd.gramian(
                lambda p, b, i, f=call: f(p, i).sin().sum((1, 2)), params, index, batch_dim=0
            )


@pytest.mark.parametrize("masked", [False, True])
def test_attention_without_a_batch_axis(masked: bool) -> None:
    """One loss per token; dropout is off in evaluation mode."""
    module = torch.nn.MultiheadAttention(4, 2, dropout=0.5).double().eval()
    padding = torch.tensor([False, True, False, False, True]) if masked else None

    def model_fn(params: Any, buffers: Any, x: Tensor) -> Tensor:
        options = {"key_padding_mask": padding}
        return torch.func.functional_call(module, params, (x, x, x), options)[0].sin().sum(1)

    params, x = {k: p.detach() for k, p in module.named_parameters()}, randn(5, 4)
    lin = jd.structured(model_fn, params, x)
    torch.testing.assert_close(lin.losses, model_fn(params, {}, x))
    wanted = oracles.jacobian_rows(model_fn, params, {}, x)
    oracles.assert_close(jd.to_dense(lin.rows), wanted, tolerance=1e-11)

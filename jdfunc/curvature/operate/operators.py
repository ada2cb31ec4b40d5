"""F and its powers as operators on pytrees like the params.

Leaves are [*columns, *param.shape]: one vector, or many at once. In every function, a damping of
None means the damping of the curvature where the power is negative, and none where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jdfunc import pytrees, random
from jdfunc.curvature.blocks import Block
from jdfunc.curvature.operate.curvature import Curvature, damping_of
from jdfunc.curvature.operate.damping import Damping
from jdfunc.curvature.operate.parts import (
    Part,
    applied,
    diagonal,
    dtype_of,
    identity_power,
    values_of,
)
from jdfunc.curvature.operate.powers import Power, power_of
from jdfunc.curvature.operate.trees import check_names, map_blocks, map_named
from jdfunc.types import Params

__all__ = [
    "apply",
    "diag",
    "inverse",
    "matmat",
    "matvec",
    "power",
    "sample",
    "solve",
    "to_dense",
]


def matvec(curv: Curvature, tree: Params) -> Params:
    """F v, without damping.

    Args:
        curv: F.
        tree: v, a pytree like the params, leaves [*columns, *param.shape].

    Returns:
        F v, of the structure, shapes and dtypes of v. Computed in the dtype of the blocks, float32
        at least.

    Raises:
        ValueError: the leaves of v are not those of the params, by name or by shape.
        TypeError: a leaf is no floating-point tensor.

    Cost: for a block [i, j] with factors, i j (i + j) multiply-adds for each column; twice that
    with a spectrum. No eigenvalue problem.

    Example:
        >>> from jdfunc.curvature.blocks import Factors
        >>> from jdfunc.curvature.operate.damping import exact
        >>> layout = (Block(("w",), ((1, 2),), ((1, 1, 2),), activations=1),)
        >>> F = Factors(torch.tensor([[2.0]]), torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]))
        >>> matvec(Curvature(layout, {"w": F}, exact(1.0)), {"w": torch.tensor([[1.0, 0.0]])})
        {'w': tensor([[4., 2.]])}
    """
    return Power(curv.layout, _parts(curv))(tree)


#: The same, for trees with column axes.
matmat = matvec


def power(curv: Curvature, p: float, damping: Damping | None = None) -> Power:
    """(F + damping)^p, prepared: everything that does not depend on its argument is computed.

    Directions whose damped eigenvalue is zero have no inverse; negative powers leave them zero, as
    that of Moore and Penrose does. So a parameter without curvature gives 0, not NaN. "Zero" is
    less than the smallest normal number of the dtype; see `jdfunc.curvature.pseudo` for more.

    Args:
        curv: F.
        p: any real number; power 0 is the identity.
        damping: a rule; None: the curvature's own if p < 0, none if not.

    Returns:
        A function of a pytree like the params, leaves [*columns, *param.shape]; a metric too.

    Raises:
        ValueError: the damping does not fit the blocks, or factors are not finite.
        TypeError: p is no number.

    Cost: the eigenvalues of the factors, d³ for each side of width d, and none for a spectrum.

    Example:
        >>> from jdfunc.curvature.blocks import Spectrum
        >>> from jdfunc.curvature.operate.damping import exact
        >>> layout = (Block(("w",), ((2,),), ((1, 1, 2),)),)
        >>> F = Spectrum(None, None, torch.tensor([[[0.0, 3.0]]]))
        >>> power(Curvature(layout, {"w": F}, exact(1.0)), -0.5)({"w": torch.tensor([1.0, 1.0])})
        {'w': tensor([1.0000, 0.5000])}
    """
    return power_of(curv.layout, curv.blocks, damping_of(curv, p, damping), p)


def inverse(curv: Curvature, damping: Damping | None = None) -> Power:
    """(F + damping)⁻¹, prepared: `power` −1.

    Args:
        curv: F.
        damping: a rule; the curvature's own if None.

    Returns:
        A function of a pytree like the params: a metric for `jdfunc.jd_step`.
    """
    return power(curv, -1, damping)


def solve(curv: Curvature, tree: Params, damping: Damping | None = None) -> Params:
    """(F + damping)⁻¹ v; see `inverse` to solve more than once.

    Args:
        curv: F.
        tree: v, a pytree like the params, leaves [*columns, *param.shape].
        damping: a rule; the curvature's own if None.

    Returns:
        A pytree of the structure, shapes and dtypes of v.
    """
    return inverse(curv, damping)(tree)


def apply(
    curv: Curvature, tree: Params, power: float = -1, damping: Damping | None = None
) -> Params:
    """(F + damping)^power v.

    Args:
        curv: F.
        tree: v, a pytree like the params, leaves [*columns, *param.shape].
        power: any real number.
        damping: a rule; None: the curvature's own if the power is negative, none if not.

    Returns:
        A pytree of the structure, shapes and dtypes of v.
    """
    if power == 1 and damping is None:
        return matvec(curv, tree)
    return power_of(curv.layout, curv.blocks, damping_of(curv, power, damping), power)(tree)


def diag(
    curv: Curvature, params: Params, damping: Damping | None = None, power: float = 1
) -> Params:
    """The diagonal of (F + damping)^power.

    Args:
        curv: F.
        params: the params, for structure and dtypes.
        damping: a rule; None: the curvature's own if the power is negative, none if not.
        power: any real number.

    Returns:
        A pytree like the params: of −1, marginal variances of N(0, (F + damping)⁻¹).

    Raises:
        ValueError: the params are not those of the curvature.
    """
    if power == 1 and damping is None:
        parts = _parts(curv)
    else:
        p, rule = power, damping_of(curv, power, damping)
        parts = power_of(curv.layout, curv.blocks, rule, p).parts

    def one(block: Block, matrix: Tensor) -> Tensor:
        return diagonal(parts[block.name]).expand(matrix.shape)

    return map_blocks(one, curv.layout, params)


def sample(
    curv: Curvature,
    params: Params,
    key: random.Key,
    n: int,
    damping: Damping | None = None,
) -> Params:
    """Samples of N(0, (F + damping)⁻¹), (F + damping)^(−½) z with z standard normal.

    The root is the symmetric one, which does not depend on the choice of eigenvectors: the same key
    gives the same samples on every device, up to rounding. The first samples of a key do not depend
    on n. Where F + damping has no inverse, samples are 0.

    Args:
        curv: F.
        params: the params, for structure, dtypes and device; to be added to the samples.
        key: an int, or an int64 tensor without axes.
        n: how many.
        damping: a rule, such as a prior precision; the curvature's own if None.

    Returns:
        A pytree like the params with leaves [n, *param.shape].

    Raises:
        ValueError: n is negative, or the params are not those of the curvature.
    """
    if n < 0:
        raise ValueError(f"expected a number of samples, got {n}")
    root = power(curv, -0.5, damping)
    columns = pytrees.map(lambda leaf: leaf.detach().expand(n, *leaf.shape), params)
    order = {block.name: k for k, block in enumerate(curv.layout)}

    def one(block: Block, matrix: Tensor) -> Tensor:
        part = root.parts[block.name]
        own = random.fold_in(key, order[block.name])
        z = random.normal(own, matrix.numel()).reshape(matrix.shape)
        return applied(part, z.to(device=matrix.device, dtype=dtype_of(part)))

    return map_blocks(one, curv.layout, columns)


def to_dense(operator: Curvature | Power, order: Sequence[str] | None = None) -> Tensor:
    """F, or a power of it, as a matrix: for tests and small models.

    Args:
        operator: F, which is not damped; or what `power` and `inverse` return.
        order: the names of the parameters in the order of rows and columns,
            ``jdfunc.pytrees.names(params)`` for that of the leaves; that of the layout if None.

    Returns:
        A matrix [n, n] over the elements of the parameters, each flattened in row-major order.

    Raises:
        ValueError: the order does not name each parameter once.
    """
    parts = operator.parts if isinstance(operator, Power) else _parts(operator)
    shapes = {
        name: shape
        for block in operator.layout
        for name, shape in zip(block.params, block.shapes, strict=True)
    }
    names = list(shapes if order is None else order)
    check_names(operator.layout, names)
    if len(set(names)) != len(names):
        raise ValueError(f"expected every parameter once, got {names}")
    sizes = [torch.Size(shapes[name]).numel() for name in names]
    if not names:
        return torch.zeros(0, 0)
    like = values_of(next(iter(parts.values())))
    pieces = torch.eye(sum(sizes), device=like.device).split(sizes, 1)
    columns = {
        name: piece.reshape(sum(sizes), *shapes[name])
        for name, piece in zip(names, pieces, strict=True)
    }

    def one(block: Block, matrix: Tensor) -> Tensor:
        part = parts[block.name]
        return applied(part, matrix.to(dtype_of(part)))

    mapped = map_named(one, operator.layout, columns)
    pairs = zip(names, sizes, strict=True)
    return torch.cat([mapped[name].reshape(sum(sizes), size) for name, size in pairs], 1)


def _parts(curv: Curvature) -> dict[str, Part]:
    return {block.name: identity_power(block, curv.blocks[block.name]) for block in curv.layout}

"""The linear complementarity problem z ≥ 0, A z + q ≥ 0, zᵀ(A z + q) = 0 for semidefinite A.

It is the core of every cone method. The search for the free set F = {i : zᵢ > 0} branches on data,
so it sits behind the operator `jdfunc::lcp`, which tracing sees as opaque and `vmap` as one more
batch dimension. Given F, z_F = −A_FF⁻¹ q_F, and that is what is differentiated.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from jdfunc.solvers.pivoting import descend, pivot, solve_masked
from jdfunc.solvers.scalar import pivot_floats
from jdfunc.solvers.splitting import douglas_rachford

__all__ = ["lcp"]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}  # of signs, where the bounds have size 1
PIVOT_ROUNDS = 12  # after which a row goes to the descent that cannot cycle
DIRECT_SIZE = 32  # m up to which pivoting needs no first guess, and a batch goes in one piece
FLOATS_SIZE = 512  # k m² up to which Python floats beat tensor operators
FLOAT_ROUNDS = 60  # of Python floats, where a round is cheap
SPLITTING_ROWS = 8  # for fewer right-hand sides, factorising afresh costs less than splitting


def lcp(
    matrix: Float[Tensor, "*batch m m"],
    q: Float[Tensor, "*batch k m"],
    *,
    bounds: Float[Tensor, "*batch k m"] | None = None,
    ridge: float = 1e-10,
) -> Float[Tensor, "*batch k m"]:
    """The z with z ≥ 0, y = A_r z + q ≥ 0, zᵀy = 0, for k right-hand sides that share one matrix.

    A_r = A + ridge · diag(A): with D = diag(A)^½ the problem solved is the one of S + ridge · I, S
    = D⁻¹AD⁻¹, so nothing depends on the scale of a row. Up to m = 32: block principal pivoting.
    Above: Douglas–Rachford splitting in float32 guesses the free sets, and pivoting verifies and
    corrects them in the dtype of `matrix`. Rows that pivoting leaves are finished by active-set
    descent.

    Args:
        matrix: A, shape [*batch, m, m], symmetric PSD, float64 (float32 where a device has no
            other).
        q: shape [*batch, k, m], units of A times those of z.
        bounds: u, shape [*batch, k, m], where q = A u is known: signs are then judged against the
            size of D u, which is safer than that of D⁻¹ q if the latter is mere rounding.
        ridge: added to the unit diagonal of S; dimensionless. Multiplied by 10 until S + ridge · I
            is positive definite.

    Returns:
        z, shape [*batch, k, m], dtype and device of `matrix`. Zero where A_ii = 0; NaN for a batch
        element that is not finite. Differentiable in `matrix` and `q` wherever zᵢ + yᵢ > 0 for all
        i.

    Cost: per problem one product of [k, m] and [m, m] for each of 10 to 300 float32 splitting
    steps, and a Cholesky factorisation of size |F| for each row and pivoting round (2 to 5 rounds).

    References:
        Kim and Park, Fast Nonnegative Matrix Factorization: An Active-Set-Like Method and
        Comparisons, SIAM J. Sci. Comput. 2011. Douglas and Rachford as in Eckstein and Bertsekas,
        Math. Programming 55, 1992.

    Example:
        >>> q = torch.tensor([[-1.0, 2.0]], dtype=torch.float64)
        >>> lcp(torch.eye(2, dtype=torch.float64), q, ridge=0.0)
        tensor([[1., 0.]], dtype=torch.float64)
    """
    if is_plain(matrix, q):
        return torch.ops.jdfunc.lcp(matrix, q, bounds, ridge)[0]
    return _LCP.apply(matrix, q, bounds, ridge)[0]


def is_plain(*tensors: Tensor) -> bool:
    """Whether nothing is compiled, transformed or differentiated, so that the operator suffices."""
    return not (
        torch.compiler.is_compiling()
        or any(tensor.requires_grad for tensor in tensors)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


class _LCP(torch.autograd.Function):
    """The operator, with the derivatives that the final free set implies."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrix: Tensor, q: Tensor, bounds: Tensor | None, ridge: float
    ) -> tuple[Tensor, ...]:
        return torch.ops.jdfunc.lcp(matrix, q, bounds, ridge)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        matrix, *_ = inputs
        z, free, ridges = output
        ctx.mark_non_differentiable(free, ridges)
        ctx.save_for_backward(matrix, z, free, ridges)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        matrix, z, free, ridges = ctx.saved_tensors
        dual = _solve_at(matrix, ridges, -grads[0], free)
        outer = dual.mT @ z
        on_diagonal = ridges[..., None] * (dual * z).sum(-2)
        return -(outer + outer.mT) / 2 - torch.diag_embed(on_diagonal), -dual, None, None


def _solve_at(
    matrix: Float[Tensor, "*batch m m"],
    ridge: Float[Tensor, "*batch"],
    q: Float[Tensor, "*batch k m"],
    free: Bool[Tensor, "*batch k m"],
) -> Float[Tensor, "*batch k m"]:
    """The x with x_F = −(A_r)_FF⁻¹ q_F and zero elsewhere, differentiable."""
    root = _root_diagonal(matrix)
    normal = _normalise(matrix, root, ridge)
    return solve_masked(normal[..., None, :, :], q / root[..., None, :], free) / root[..., None, :]


def _root_diagonal(matrix: Float[Tensor, "*batch m m"]) -> Float[Tensor, "*batch m"]:
    """diag(A)^½, with 1 in place of 0."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return torch.where(diagonal > 0, diagonal, 1).sqrt()


def _normalise(matrix: Tensor, root: Tensor, ridge: Tensor | float) -> Float[Tensor, "*batch m m"]:
    """D⁻¹AD⁻¹ + ridge · I, with a diagonal of exactly 1 + ridge."""
    eye = torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device)
    diagonal = 1 + ridge[..., None, None] if isinstance(ridge, Tensor) else 1 + ridge
    return torch.where(eye, diagonal, matrix / root[..., :, None] / root[..., None, :])


def _search(matrix: Tensor, q: Tensor, bounds: Tensor | None, ridge: float) -> tuple[Tensor, ...]:
    """The eager operator: solution, free set and the ridge used, for any leading dimensions."""
    batch, (k, m) = matrix.shape[:-2], q.shape[-2:]
    if is_tiny(matrix, k):
        found = _search_floats(matrix, q, bounds, ridge)
        if found is not None:
            return found
    flat, q = matrix.reshape(-1, m, m), q.reshape(-1, k, m)
    root = _root_diagonal(flat)[:, None, :]
    broken = ((flat.sum((-2, -1)) + q.sum((-2, -1))) * 0).isnan()[:, None, None]
    if broken.any():
        flat = torch.where(broken, torch.eye(m).to(flat), flat)
        root, q = torch.where(broken, 1, root), torch.where(broken, 0, q)
    normal, ridges = _definite(flat, root[:, 0], ridge)
    size = q / root if bounds is None else bounds.reshape(q.shape) * root
    size = size.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1)
    q = q / (root * size)
    if m <= DIRECT_SIZE:
        shared = normal if len(normal) == 1 else normal.repeat_interleave(k, 0)
        z = _solve_rows(shared, q.reshape(-1, m))
    else:
        z = torch.cat([_solve_rows(normal[i : i + 1], q[i]) for i in range(len(q))] or [q])
    z = z.reshape(q.shape)
    free = (z > 0).reshape(*batch, k, m)
    z = torch.where(broken, torch.nan, z * (size / root))
    return z.reshape(*batch, k, m), free, ridges.reshape(batch)


def is_tiny(matrix: Tensor, k: int) -> bool:
    """Whether Python floats solve k right-hand sides sooner than tensor operators do."""
    return matrix.ndim == 2 and k * matrix.numel() <= FLOATS_SIZE and matrix.device.type == "cpu"


def _search_floats(
    matrix: Tensor, q: Tensor, bounds: Tensor | None, ridge: float
) -> tuple[Tensor, ...] | None:
    """`_search` for one tiny problem, or None where that has to decide."""
    z = pivot_floats(
        matrix.tolist(),
        q.tolist(),
        None if bounds is None else bounds.tolist(),
        ridge=ridge,
        tol=TOLERANCE[q.dtype],
        rounds=FLOAT_ROUNDS,
    )
    if z is None:
        return None
    solution = torch.tensor(z, dtype=q.dtype)
    return solution, solution > 0, torch.tensor(ridge, dtype=q.dtype)


def _solve_rows(matrix: Tensor, q: Tensor) -> Float[Tensor, "rows m"]:
    """Each row's z ≥ 0; `matrix` is one for all rows of q, or one per row."""
    tol = TOLERANCE[q.dtype]
    free = q < -tol
    start = torch.zeros_like(q)
    if not free.any():
        return start
    if q.shape[-1] > DIRECT_SIZE and len(q) >= SPLITTING_ROWS:
        guess = douglas_rachford(matrix[0].float(), q.float(), tol=3e-4, max_iters=300)
        free = (guess > 0) & free.any(-1, keepdim=True)
        start = torch.where(free, guess.to(q.dtype), 0)
    z, unfinished = pivot(matrix, q, free, tol=tol, rounds=PIVOT_ROUNDS)
    left = unfinished.nonzero()[:, 0]
    if len(left):
        own, q = matrix if len(matrix) == 1 else matrix[left], q[left]
        z[left] = descend(own, q, start[left], tol=tol, rounds=20 * q.shape[-1])
    return z.clamp(min=0)


def _definite(matrix: Tensor, root: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """D⁻¹AD⁻¹ + ridge · I for the smallest ridge · 10ⁿ that makes it positive definite."""
    ridges = torch.full(matrix.shape[:1], ridge, dtype=matrix.dtype, device=matrix.device)
    normal = _normalise(matrix, root, ridge)
    smallest = torch.finfo(matrix.dtype).eps
    for _ in range(20):
        failed = torch.linalg.cholesky_ex(normal).info > 0
        if not failed.any():
            break
        ridges = torch.where(failed, 10 * ridges.clamp(min=smallest), ridges)
        normal = _normalise(matrix, root, ridges)
    return normal, ridges


def _search_fake(
    matrix: Tensor, q: Tensor, bounds: Tensor | None, ridge: float
) -> tuple[Tensor, ...]:
    ridges = matrix.new_empty(matrix.shape[:-2])
    return torch.empty_like(q), torch.empty_like(q, dtype=torch.bool), ridges


def _search_vmap(
    info: Any, in_dims: tuple, matrix: Tensor, q: Tensor, bounds: Tensor | None, ridge: float
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The mapped dimension becomes one more leading batch dimension."""

    def leading(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        if dim is None:
            return tensor.expand(info.batch_size, *tensor.shape)
        return tensor.movedim(dim, 0)

    tensors = map(leading, (matrix, q, bounds), in_dims)
    return torch.ops.jdfunc.lcp(*tensors, ridge), (0, 0, 0)


# A plain library operator costs a third of the call overhead of `torch.library.custom_op`.
_LIBRARY = torch.library.Library("jdfunc", "FRAGMENT")
_LIBRARY.define(
    "lcp(Tensor matrix, Tensor q, Tensor? bounds, float ridge) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("lcp", _search, "CompositeExplicitAutograd")
torch.library.register_fake("jdfunc::lcp", _search_fake, lib=_LIBRARY)
torch.library.register_vmap("jdfunc::lcp", _search_vmap, lib=_LIBRARY)

"""Curvature: KFAC and EKFAC as stateless pytrees, and what is computed with them.

`losses`: a loss seen from the outputs. `layouts`: the block of every parameter. `estimate`: from
batches to blocks. `operate`: products, powers, scalars, metrics.

Example:
    >>> import torch
    >>> from jdfunc import curvature as cv
    >>> params, X, y = {"w": torch.zeros(3, 2)}, torch.eye(2), torch.tensor([0, 2])
    >>> def apply(params, buffers, x):
    ...     return torch.nn.functional.linear(x, params["w"])
    >>> layout = cv.curvature_layout(apply, params, None, X)
    >>> curv = cv.build(cv.ekfac(layout, likelihood=cv.cross_entropy()), params, None, [(X, y)])
    >>> cv.solve(curv, params, damping=cv.exact(1e-3))["w"].shape
    torch.Size([3, 2])
"""

from jdfunc.curvature.blocks import Block, Factors, Spectrum
from jdfunc.curvature.estimate.build import build
from jdfunc.curvature.estimate.estimators import Estimator, ekfac, kfac
from jdfunc.curvature.estimate.passes import Precision
from jdfunc.curvature.estimate.saving import load_state_dict, state_dict
from jdfunc.curvature.estimate.sharing import Sharing, expand, reduce
from jdfunc.curvature.estimate.state import State
from jdfunc.curvature.estimate.steps import merge
from jdfunc.curvature.layouts.layout import Layout, diagonal, excluded, full_block, kron
from jdfunc.curvature.layouts.survey import curvature_layout
from jdfunc.curvature.losses.fishers import (
    Fisher,
    default_fisher,
    empirical,
    forward_only,
    monte_carlo,
    signed,
    type2,
)
from jdfunc.curvature.losses.likelihoods import bce_with_logits, custom, mse
from jdfunc.curvature.losses.several import Heads, several
from jdfunc.curvature.losses.softmax import cross_entropy
from jdfunc.curvature.losses.targets import Labelled, Weighted
from jdfunc.curvature.losses.terms import Likelihood
from jdfunc.curvature.losses.terms import mean_reduction as mean
from jdfunc.curvature.losses.terms import sum_reduction as sum
from jdfunc.curvature.operate.affinity import affinity
from jdfunc.curvature.operate.curvature import Curvature
from jdfunc.curvature.operate.damping import (
    exact,
    heuristic,
    per_block,
    plain,
    pseudo,
    relative,
    undamped,
)
from jdfunc.curvature.operate.linear_operator import as_linear_operator
from jdfunc.curvature.operate.metric import (
    influence,
    laplace_variance,
    metric_gramian,
    natural_step,
)
from jdfunc.curvature.operate.operators import (
    apply,
    diag,
    inverse,
    matvec,
    power,
    sample,
    solve,
    to_dense,
)
from jdfunc.curvature.operate.powers import Power
from jdfunc.curvature.operate.scalars import det, eigenvalues, frobenius_norm, logdet, trace

matmat = matvec  # columns stand in front, whatever their number

__all__ = [
    "Block",
    "Curvature",
    "Estimator",
    "Factors",
    "Fisher",
    "Heads",
    "Labelled",
    "Layout",
    "Likelihood",
    "Power",
    "Precision",
    "Sharing",
    "Spectrum",
    "State",
    "Weighted",
    "affinity",
    "apply",
    "as_linear_operator",
    "bce_with_logits",
    "build",
    "cross_entropy",
    "curvature_layout",
    "custom",
    "default_fisher",
    "det",
    "diag",
    "diagonal",
    "eigenvalues",
    "ekfac",
    "empirical",
    "exact",
    "excluded",
    "expand",
    "forward_only",
    "frobenius_norm",
    "full_block",
    "heuristic",
    "influence",
    "inverse",
    "kfac",
    "kron",
    "laplace_variance",
    "load_state_dict",
    "logdet",
    "matmat",
    "matvec",
    "mean",
    "merge",
    "metric_gramian",
    "monte_carlo",
    "mse",
    "natural_step",
    "per_block",
    "plain",
    "power",
    "pseudo",
    "reduce",
    "relative",
    "sample",
    "several",
    "signed",
    "solve",
    "state_dict",
    "sum",
    "to_dense",
    "trace",
    "type2",
    "undamped",
]

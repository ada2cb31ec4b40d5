"""Curvature: KFAC and EKFAC as stateless pytrees, and what is computed with them.

layout = curvature_layout(apply, params, buffers, inputs)
est = ekfac(layout, likelihood=cross_entropy())
curv = build(est, params, buffers, data)
grads = jdfunc.jd_step(model_fn, params, batch, metric=inverse(curv, exact(1e-3)))
"""

from jdfunc.curvature.blocks import Block, Factors, Spectrum
from jdfunc.curvature.build import build
from jdfunc.curvature.curvature import Curvature
from jdfunc.curvature.damping import exact, heuristic, per_block, plain, pseudo, relative, undamped
from jdfunc.curvature.estimators import Estimator, ekfac, kfac
from jdfunc.curvature.fishers import (
    Fisher,
    default_fisher,
    empirical,
    forward_only,
    monte_carlo,
    signed,
    type2,
)
from jdfunc.curvature.layout import Layout, diagonal, excluded, full_block, kron
from jdfunc.curvature.likelihoods import bce_with_logits, custom, mse
from jdfunc.curvature.linear_operator import as_linear_operator
from jdfunc.curvature.metric import influence, laplace_variance, metric_gramian, natural_step
from jdfunc.curvature.operators import apply, diag, inverse, matvec, power, sample, solve, to_dense
from jdfunc.curvature.passes import Precision
from jdfunc.curvature.powers import Power
from jdfunc.curvature.saving import load_state_dict, state_dict
from jdfunc.curvature.scalars import det, eigenvalues, frobenius_norm, logdet, trace
from jdfunc.curvature.sharing import Sharing, expand, reduce
from jdfunc.curvature.softmax import cross_entropy
from jdfunc.curvature.state import State
from jdfunc.curvature.steps import merge
from jdfunc.curvature.survey import curvature_layout
from jdfunc.curvature.targets import Labelled, Weighted
from jdfunc.curvature.terms import Likelihood
from jdfunc.curvature.terms import mean_reduction as mean
from jdfunc.curvature.terms import sum_reduction as sum

matmat = matvec  # columns stand in front, whatever their number

__all__ = [
    "Block",
    "Curvature",
    "Estimator",
    "Factors",
    "Fisher",
    "Labelled",
    "Layout",
    "Likelihood",
    "Power",
    "Precision",
    "Sharing",
    "Spectrum",
    "State",
    "Weighted",
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
    "signed",
    "solve",
    "state_dict",
    "sum",
    "to_dense",
    "trace",
    "type2",
    "undamped",
]

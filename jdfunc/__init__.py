"""jdfunc: functional Jacobian descent. Train with many objectives at once, on `torch.func`."""

from jdfunc import weightings
from jdfunc.algebra import combine, gram, gram_blocks, row_norms, to_dense
from jdfunc.functional import assign_grads, model_to_function
from jdfunc.independence import check_batch_independence
from jdfunc.linearizations import dense, jacobian, structured
from jdfunc.plan import Plan, plan
from jdfunc.remat import remat
from jdfunc.step import gramian, jd_step, value_and_jd_step
from jdfunc.types import JDInfo, Linearization
from jdfunc.weightings import constant, dualproj, mean, mgda, upgrad
from jdfunc.weightings.base import Weighting, as_weighting, flattened, stateless

__all__ = [
    "JDInfo",
    "Linearization",
    "Plan",
    "Weighting",
    "as_weighting",
    "assign_grads",
    "check_batch_independence",
    "combine",
    "constant",
    "dense",
    "dualproj",
    "flattened",
    "gram",
    "gram_blocks",
    "gramian",
    "jacobian",
    "jd_step",
    "mean",
    "mgda",
    "model_to_function",
    "plan",
    "remat",
    "row_norms",
    "stateless",
    "structured",
    "to_dense",
    "upgrad",
    "value_and_jd_step",
    "weightings",
]

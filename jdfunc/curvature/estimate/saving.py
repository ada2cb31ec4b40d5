"""States of estimators to flat dicts of tensors and back, tied to the layout they belong to."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jdfunc import checkpoint, pytrees
from jdfunc.curvature.blocks import Factors
from jdfunc.curvature.estimate.basis import Basis
from jdfunc.curvature.estimate.factors import Moments
from jdfunc.curvature.estimate.state import Counters, State
from jdfunc.curvature.layouts.layout import Layout

#: The name under which the fingerprint of the layout is saved.
FINGERPRINT = "layout"


def state_dict(state: State, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a state by name, for `torch.save`, and a fingerprint of its layout.

    Args:
        state: of an estimator.
        layout: that the estimator was made with.

    Returns:
        A flat dict of tensors, not copies; no parameters of the model among them.

    Example:
        >>> import torch
        >>> from jdfunc import curvature as cv
        >>> params = {"w": torch.zeros(2, 1)}
        >>> layout = cv.curvature_layout(lambda p, b, x: x @ p["w"], params, None, torch.eye(2))
        >>> est = cv.kfac(layout, likelihood=cv.mse())
        >>> saved = cv.state_dict(est.init(params), layout)
        >>> int(cv.load_state_dict(saved, layout).step)
        0
    """
    return {FINGERPRINT: _fingerprint(layout), **checkpoint.state_dict(state)}


def load_state_dict(saved: Mapping[str, Tensor], layout: Layout) -> State:
    """The state that `state_dict` saved.

    Args:
        saved: what `state_dict` returned, or `torch.load(..., weights_only=True)` of it.
        layout: of the model, found anew or the same.

    Returns:
        The state, on the device of the tensors.

    Raises:
        ValueError: it was saved with another layout, or a tensor is missing or not expected.
    """
    if FINGERPRINT not in saved or int(saved[FINGERPRINT]) != int(_fingerprint(layout)):
        raise ValueError(
            "expected a state that was saved with this layout, got one of another: parameters, "
            "shapes, uses or rules differ; rebuild the layout as it was, or start from init"
        )
    like = _skeleton(layout, saved)
    names = pytrees.field_names(like)
    extra = sorted(saved.keys() - {*names, FINGERPRINT})
    missing = sorted(set(names) - saved.keys())
    if missing or extra:
        raise ValueError(
            f"expected the tensors of a state, missing {missing}, not expected {extra}"
        )
    _, restore = pytrees.flatten(like)
    return restore([saved[name] for name in names])


def _fingerprint(layout: Layout) -> Tensor:
    digest = hashlib.sha256(layout.fingerprint().encode()).digest()
    return torch.tensor(int.from_bytes(digest[:7], "big"))


def _skeleton(layout: Layout, saved: Mapping[str, Tensor]) -> State:
    """Return a state of the right structure, with numbers in the place of its tensors."""

    def has(prefix: str) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for name in saved)

    def side(name: str) -> Any:
        return number if name in saved else ()

    number: Any = 0
    factors, basis = {}, {}
    for layer in layout.layers:
        roles = tuple(Factors(number, number) for _ in layer.roles)
        expanded = roles if has(f"factors.{layer.name}.expanded") else ()
        factors[layer.name] = Moments(roles, (number,) * len(roles), expanded)
    factors |= {rest.params[0]: number for rest in layout.rests if rest.rule.covered}
    if has("eigenvalues"):
        for name in factors:
            basis[name] = Basis(side(f"basis.{name}.left"), side(f"basis.{name}.right"))
    biases = {layer.bias for layer in layout.layers} - {None}
    known = [name for name in (*factors, *biases) if f"eigenvalues.{name}" in saved]
    counters = Counters(number, number, number)
    return State(number, factors, basis, dict.fromkeys(known, number), counters, counters)

"""The tap: a mode that sees every torch function and takes note where a parameter is used.

A use that a rule recognises is computed with the parameter's *shadow*, an equal tensor that is
differentiated apart from the parameter. What autograd then still finds between the losses and the
parameter itself is every use that no rule took, whatever the operation: nothing can be dropped.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.overrides import TorchFunctionMode

from jdfunc.factored.leaves import Side


class Parameter(NamedTuple):
    """A parameter, or a transposed view of it, found among the arguments of a function."""

    name: str
    transposed: bool


class Direct(NamedTuple):
    """A way to the rows of a use that does not build its activations' side.

    Attributes:
        elements: ``shape of the output -> elements`` of the side that is not built.
        rows: ``(given, output cotangent) -> row``, in the shape of the parameter.
    """

    elements: Callable[[torch.Size], int]
    rows: Callable[[Tensor, Tensor], Tensor]


class Use(NamedTuple):
    """One recognised use of a parameter: output = contraction of the parameter with activations.

    Attributes:
        name: of the parameter.
        param: its shadow.
        function: that used it, for the plan.
        given: the tensor that the parameter was contracted with.
        version: how often ``given`` had been written to by then.
        activations: ``given -> side`` [h, s, i].
        cotangents: ``output cotangent -> side`` [h, s, j].
        activations_first: whether the parameter is laid out as [h, i, j].
        direct: another way to its rows, if there is one.
        bias: the parameter that is added to the output, as long as it is wide, if there is one.
        padded: how many entries of the cotangents' axis, before and after, are zero because this
            use takes a part of the parameter.
    """

    name: str
    param: Tensor
    function: str
    given: Tensor
    version: int
    activations: Callable[[Tensor], Side]
    cotangents: Callable[[Tensor], Tensor]
    activations_first: bool
    direct: Direct | None
    bias: str | None
    padded: tuple[int, int]


Rule = Callable[..., Any]


class Tap(TorchFunctionMode):
    """Run the rules of the functions that a model calls, and keep their uses.

    Args:
        params: the tensors that the model is given, by name.
        rules: what to do at a call of a function; the function itself is called at others.
        shadows: tensors equal to the params, by name; None keeps no uses. Where they are given,
            the tap is made inside a transform of `torch.func`.
        observe: called with the output of every use; what it returns goes on into the model.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        rules: Mapping[Any, Rule],
        shadows: Mapping[str, Tensor] | None = None,
        observe: Callable[[Tensor], Tensor] = lambda output: output,
    ) -> None:
        super().__init__()
        self.known = [(param, Parameter(name, False)) for name, param in params.items()]
        self.by_id = {} if torch.compiler.is_compiling() else {id(t): p for t, p in self.known}
        self.rules = rules
        self.shadows = shadows
        self.observe = observe
        self.level = None if shadows is None else transform_level()
        self.uses: list[Use] = []
        self.other_uses: dict[str, list[str]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:  # written in Python, in words that Dynamo does not trace
            func = torch.unflatten
        rule = self.rules.get(func)
        if rule is not None:
            return rule(self, func, *args, **kwargs)
        return self.call(func, *args, **kwargs)

    def find(self, tensor: Any) -> Parameter | None:
        """Return the parameter that a tensor is, if any."""
        if torch.compiler.is_compiling():  # it would guard on the id of every input
            return next((found for known, found in self.known if known is tensor), None)
        return self.by_id.get(id(tensor))

    def note(self, func: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        """Take note of parameters that go into a function without a rule."""
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                found = self.find(tensor) if isinstance(tensor, Tensor) else None
                if found is not None:
                    functions = self.other_uses.setdefault(found.name, [])
                    functions.append(getattr(func, "__name__", str(func)))

    def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function that takes no part in a rule."""
        output = func(*args, **kwargs)
        outputs = output if isinstance(output, (list, tuple)) else (output,)
        if any(isinstance(value, Tensor) for value in outputs):  # not a size, a device, a dtype
            self.note(func, args, kwargs)
        return output

    def view(self, found: Parameter, view: Tensor) -> Tensor:
        """Remember a transposed view of a parameter."""
        self.known.append((view, Parameter(found.name, not found.transposed)))
        self.by_id[id(view)] = self.known[-1][1]
        return view

    def use(
        self,
        found: Parameter,
        func: Any,
        call: Callable[[Tensor], Tensor],
        weight: Tensor,
        given: Tensor,
        activations: Callable[[Tensor], Side],
        cotangents: Callable[[Tensor], Tensor],
        *,
        activations_first: bool,
        direct: Direct | None = None,
        bias: Tensor | None = None,
        padded: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Compute ``call(weight)`` with the shadow of the weight and keep the use."""
        if self.shadows is None:
            return call(weight)
        if transform_level() != self.level:
            # Below a transform of the model's own, whose cotangents are not those of the losses.
            self.note(func, (weight,), {})
            return call(weight)
        shadow = self.shadows[found.name]
        output = call(shadow.mT if found.transposed else shadow)
        compiling = torch.compiler.is_compiling()
        if not (compiling or output.requires_grad):  # inside no_grad
            self.note(func, (weight,), {})
            return call(weight)
        added = None if bias is None else self.find(bias)
        self.uses.append(
            Use(
                name=found.name,
                param=shadow,
                function=getattr(func, "__name__", str(func)),
                # The compiler cannot see versions; it drops a copy that nothing writes to.
                given=given.clone() if compiling else given,
                version=0 if compiling else given._version,
                activations=activations,
                cotangents=cotangents,
                activations_first=activations_first,
                direct=direct,
                bias=None if added is None else added.name,
                padded=padded,
            )
        )
        return self.observe(output)


def transform_level() -> int:
    """Return how many transforms of `torch.func` are around, one at least, compiled or not."""
    return retrieve_current_functorch_interpreter().level()

"""The layout: which block of F every parameter belongs to, found once from an example batch."""

import math
from typing import Any, NamedTuple

from jdfunc.curvature.blocks import Block, Shape
from jdfunc.curvature.estimate.capture import ApplyFn, UseOf


class ParamRule(NamedTuple):
    """How the curvature of a parameter is held, for `curvature_layout(rules=...)`.

    Attributes:
        label: what the layout prints.
        product: as a product of factors, if its uses allow it.
        full: with off-diagonal elements.
        covered: whether it has curvature at all.
    """

    label: str
    product: bool
    full: bool
    covered: bool = True


kron = ParamRule("kron", product=True, full=True)
full_block = ParamRule("dense", product=False, full=True)
diagonal = ParamRule("diag", product=False, full=False)
excluded = ParamRule("excluded", product=False, full=False, covered=False)
unused = ParamRule("unused", product=False, full=False, covered=False)


class Layer(NamedTuple):
    """A parameter used as a matrix [h, i, j].

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        matrix: (h, i, j).
        bias: the parameter added to what it makes, where its gradient is that of the outputs.
        bias_shape: its shape.
        uses: its uses, in the order of the model's calls.
        diagonal: which sides are diagonal: one-hot vectors, and sides that are too wide.
        sliced: whether each use took a part of the parameter, as the projections of attention with
            different inputs do; the parts are groups then.
    """

    name: str
    shape: Shape
    matrix: Shape
    bias: str | None
    bias_shape: Shape
    uses: tuple[UseOf, ...]
    diagonal: tuple[bool, bool]
    sliced: bool = False

    @property
    def sides(self) -> tuple[int, ...]:
        """The side on which activations stand, for each pair of activations and cotangents."""
        return (1,) if self.sliced else tuple(use.activations for use in self.uses)

    @property
    def biased(self) -> tuple[bool, ...]:
        """Whether the bias was added, for each pair."""
        return (self.bias is not None,) if self.sliced else tuple(bool(u.bias) for u in self.uses)

    @property
    def roles(self) -> tuple[int, ...]:
        """The sides on which activations stand: one, or both for a tied embedding and head."""
        return tuple(sorted(set(self.sides)))

    def block(self, joint_bias: bool) -> Block:
        """The block of the weight, with its bias if they are joint."""
        (h, i, j), roles = self.matrix, self.roles
        role = roles[0] if len(roles) == 1 else None
        alone = Block((self.name,), (self.shape,), (self.matrix,), -1, role)
        if not self.joint(joint_bias) or self.bias is None:
            return alone
        part, axis = ((h, 1, j), -2) if role == 0 else ((h, i, 1), -1)
        return Block(
            (self.name, self.bias),
            (self.shape, self.bias_shape),
            (self.matrix, part),
            axis,
            role,
        )

    def joint(self, joint_bias: bool) -> bool:
        """Whether weight and bias share a block: not where activations stand on both sides."""
        return joint_bias and self.bias is not None and len(self.roles) == 1

    def bias_block(self) -> Block:
        """The block of the bias alone, in the basis of the cotangents."""
        assert self.bias is not None
        (h, i, j), left = self.matrix, self.bias_activations() == 1
        part = (h, i, 1) if left else (h, 1, j)
        return Block((self.bias,), (self.bias_shape,), (part,))

    def bias_activations(self) -> int:
        """The side of the activations in the uses that the bias is added to."""
        return next(use.activations for use in self.uses if use.bias is not None)


class Rest(NamedTuple):
    """Parameters whose curvature is that of their own rows: one dense block, or a diagonal.

    Attributes:
        params: by name.
        shapes: their shapes.
        rule: `full_block`, `diagonal`, `excluded` or `unused`.
        why: what used them, or why they are here.
    """

    params: tuple[str, ...]
    shapes: tuple[Shape, ...]
    rule: ParamRule
    why: str

    def block(self) -> Block:
        """The block: M [1, 1, p], all parameters one after the other."""
        parts = tuple((1, 1, math.prod(shape)) for shape in self.shapes)
        return Block(self.params, self.shapes, parts)


class Layout(NamedTuple):
    """What is done with every parameter: static, no tensors; prints as a table.

    Attributes:
        apply: the model, ``(params, buffers, inputs) -> outputs``.
        batch_dim: the example axis of the inputs.
        names: of all parameters, in the order of the leaves of params.
        layers: those that are used as a matrix.
        rests: the others.
        outputs: those of one example, on the meta device.
        bytes_fixed: memory of the activations of one example.
        bytes_each: memory of the cotangents of one example, for one vector.
    """

    apply: ApplyFn
    batch_dim: Any
    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    rests: tuple[Rest, ...]
    outputs: Any
    bytes_fixed: int
    bytes_each: int

    def blocks(self, joint_bias: bool = True) -> tuple[Block, ...]:
        """The blocks of F, every parameter in one of them."""
        blocks = [layer.block(joint_bias) for layer in self.layers]
        blocks += [
            layer.bias_block()
            for layer in self.layers
            if layer.bias is not None and not layer.joint(joint_bias)
        ]
        return (*blocks, *(rest.block() for rest in self.rests))

    def fingerprint(self) -> str:
        """A text that two layouts share if states of one fit the other."""
        return repr((self.names, self.layers, self.rests))

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("parameter", "shape", "rule", "block", "used by")]
        for layer in self.layers:
            h, i, j = layer.matrix
            sides = [
                f"diag({n})" if d else str(n) for n, d in zip((i, j), layer.diagonal, strict=True)
            ]
            size = (f"{h} × " if h > 1 else "") + " ⊗ ".join(sides)
            functions = ", ".join(dict.fromkeys(use.function for use in layer.uses))
            lines.append((layer.name, _times(layer.shape), kron.label, size, functions))
            if layer.bias is not None:
                lines.append((layer.bias, _times(layer.bias_shape), "bias", layer.name, functions))
        for rest in self.rests:
            for name, shape in zip(rest.params, rest.shapes, strict=True):
                block = "+".join(rest.params) if rest.rule.full else ""
                lines.append((name, _times(shape), rest.rule.label, block, rest.why))
        order = {name: k for k, name in enumerate(self.names)}
        lines[1:] = sorted(lines[1:], key=lambda line: order[line[0]])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def _times(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "scalar"

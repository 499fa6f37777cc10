"""The one statement of an op's shapes and types, and everything that can be read off it without torch or onnx."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeattn import expr
from edgeattn.errors import UsageError

_ARGUMENT = re.compile(r"(\w+)\s*(?::\s*(\w+)\s*)?(?:\[([^\]]*)\])?$")
_ATTRIBUTES = ("int", "float", "ints")


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: dims are names (inputs) or expressions (outputs); dtype "T" follows the call."""

    name: str
    dims: tuple[str, ...]
    dtype: str = "T"


@dataclass(frozen=True)
class Signature:
    """Inputs, attributes (name to "int", "float" or "ints") and outputs of an op."""

    inputs: tuple[Tensor, ...]
    attributes: dict[str, str]
    outputs: tuple[Tensor, ...]

    def bind(self, op: str, shapes: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Return the value of every dim name, given one shape per input.

        Sizes may be ints or symbolic. Raises EA0110 when the number of inputs, a rank or two sizes disagree.
        """
        if len(shapes) != len(self.inputs):
            raise UsageError("EA0110", f"{op}: expects {len(self.inputs)} tensors, got {len(shapes)}")
        sizes: dict[str, Any] = {}
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            if len(shape) != len(tensor.dims):
                raise UsageError("EA0110", f"{op}: {tensor.name} must be [{' '.join(tensor.dims)}], got {list(shape)}")
            for dim, size in zip(tensor.dims, shape, strict=True):
                expected = int(dim) if dim.isdigit() else sizes.setdefault(dim, size)
                if isinstance(size, int) and isinstance(expected, int) and size != expected:
                    raise UsageError("EA0110", f"{op}: {tensor.name} has {dim} = {size}, expected {expected}")
        return sizes

    def output_shapes(self, sizes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Return the shape of every output; integer attributes may appear in `sizes` beside dims."""
        return [tuple(expr.evaluate(dim, sizes) for dim in output.dims) for output in self.outputs]


def parse(text: str) -> Signature:
    """Read `(q[b d n], A: float32[d], *, scale: float) -> (out[b d n], count: int32[1])`."""
    match = re.fullmatch(r"\s*\((.*)\)\s*->\s*\((.*)\)\s*", text, re.DOTALL)
    if not match:
        raise ValueError(f"{text!r}: not a signature")
    left, _, right = match[1].partition("*,") if "*," in match[1] else (match[1], "", "")
    attributes = {}
    for part in _split(right):
        name, _, kind = (piece.strip() for piece in part.partition(":"))
        if kind not in _ATTRIBUTES:
            raise ValueError(f"{part!r}: an attribute is int, float or ints")
        attributes[name] = kind
    outputs = tuple(_tensor(part, tuple(_dims(part))) for part in _split(match[2]))
    return Signature(tuple(_tensor(part, tuple(_dims(part))) for part in _split(left)), attributes, outputs)


def symbolic(text: str, sizes: Mapping[str, int | str | None]) -> int | str | None:
    """Evaluate a dim expression over ints and symbol names: an int, a symbol expression, or None when unknown."""
    values = {name: sizes.get(name) for name in expr.names(text)}
    if any(value is None for value in values.values()):
        return None
    if all(isinstance(value, int) for value in values.values()):
        return int(expr.evaluate(text, values))
    if text in values:
        return values[text]
    return re.sub(r"[A-Za-z_]\w*", lambda word: str(values.get(word[0], word[0])), text)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and parentheses."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _tensor(text: str, dims: tuple[str, ...]) -> Tensor:
    match = _ARGUMENT.match(text)
    if not match:
        raise ValueError(f"{text!r}: not a tensor argument")
    return Tensor(match[1], dims, match[2] or "T")


def _dims(text: str) -> list[str]:
    """Split the bracketed dims at spaces outside parentheses: `b 4*c cdiv(h, 2)`."""
    inner = text[text.index("[") + 1 : text.rindex("]")]
    return re.findall(r"(?:[^\s()]|\([^()]*\))+", inner)

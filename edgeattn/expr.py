"""The integer language of grids, extra arguments and output dims: `+ - * // cdiv(a, b) min max`, names and integers.

The same text is evaluated here (with plain ints, or torch SymInts while exporting), by the Python plugin and by the C++
plugin, so the language stays this small.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any


def cdiv(a: Any, b: Any) -> Any:
    """Return a / b rounded up."""
    return (a + b - 1) // b


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {"cdiv": cdiv, "min": min, "max": max}


def evaluate(text: str, values: Mapping[str, Any]) -> Any:
    """Return the value of `text`; ValueError for anything outside the language, KeyError for an unknown name."""
    return _evaluate(_parse(text), values)


def names(text: str) -> set[str]:
    """Return the dim and attribute names that `text` mentions."""
    calls = {id(node.func) for node in ast.walk(_parse(text)) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(_parse(text)) if isinstance(node, ast.Name) and id(node) not in calls}


@functools.cache
def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r}: not an integer expression") from error


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left, values), _evaluate(node.right, values))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        left, right = (_evaluate(argument, values) for argument in node.args)
        return _FUNCTIONS[node.func.id](left, right)
    raise ValueError(f"{ast.unparse(node)!r}: outside the language (+ - * // cdiv min max, names, integers)")

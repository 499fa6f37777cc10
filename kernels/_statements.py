"""A writer of ONNX function bodies: statements are appended, values get fresh names."""

from collections.abc import Mapping, Sequence
from typing import Any

from edgeattn.op import constant


class Statements:
    """The statements of a body under construction; `str()` gives their text."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._constants: dict[str, str] = {}

    def __str__(self) -> str:
        return "\n".join(self._lines)

    def add(self, operator: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """Append a node with one output, named `out` or afresh; return the name."""
        name = out or f"v{len(self._lines)}"
        self._append([name], operator, inputs, attributes)
        return name

    def split(self, value: str, axis: int, parts: int) -> list[str]:
        """Append a Split into equal parts, unless there is only one; return their names."""
        if parts == 1:
            return [value]
        names = [f"v{len(self._lines)}_{position}" for position in range(parts)]
        self._append(names, "Split", [value], {"axis": axis, "num_outputs": parts})
        return names

    def scan(self, step: str, outputs: Sequence[str], inputs: Sequence[str]) -> None:
        """Append a Scan with one carried value; `step` is the graph of one step as text."""
        head = f"Scan<num_scan_inputs = {len(inputs) - 1}, body = {step.strip()}>"
        self._lines.append(f"{', '.join(outputs)} = {head}({', '.join(inputs)})")

    def const(self, values: Any, dtype: str = "int64") -> str:
        """Return the name of a constant; equal ones are stated once."""
        text = constant("value", values, dtype)
        if text not in self._constants:
            self._constants[text] = f"c{len(self._constants)}"
            self._lines.append(constant(self._constants[text], values, dtype))
        return self._constants[text]

    def _append(
        self, names: Sequence[str], operator: str, inputs: Sequence[str], attributes: Mapping[str, Any]
    ) -> None:
        written = ", ".join(f"{key} = {_text(value)}" for key, value in attributes.items())
        written = f"<{written}>" if written else ""
        self._lines.append(f"{', '.join(names)} = {operator}{written}({', '.join(inputs)})")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{', '.join(map(str, value))}]" if isinstance(value, Sequence) else str(value)

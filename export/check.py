"""What must hold for a finished graph: valid, completely typed, and within the operator rules of each target."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from edgeattn.errors import AccuracyError
from edgeattn.export.lower import edge_nodes
from edgeattn.export.precision import module_path
from edgeattn.op import DOMAIN
from edgeattn.target import Target

_RULE_TYPES = {
    ir.DataType.FLOAT: "FP32", ir.DataType.FLOAT16: "FP16", ir.DataType.BFLOAT16: "BF16", ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64", ir.DataType.BOOL: "BOOL", ir.DataType.INT8: "INT8",
}  # fmt: skip


@dataclass(frozen=True)
class Violation:
    """An operator that a target does not take: how often, in which PyTorch module first, and why."""

    op: str
    count: int
    module: str
    reason: str


def check_graph(model: ir.Model) -> None:
    """Raise EA0702 unless the ONNX checker accepts `model` and every value has a type and a shape."""
    try:
        onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise AccuracyError("EA0702", f"the ONNX checker refuses the graph: {str(error).splitlines()[0]}") from error
    missing = incomplete_values(model)
    if missing:
        raise AccuracyError("EA0702", f"{len(missing)} values have no type or shape, the first is {missing[0]}")


def incomplete_values(model: ir.Model) -> list[str]:
    """Return the names of values of the main graph without a type or with an unknown size."""
    values = [value for node in model.graph for value in node.outputs if value.name]
    return [str(value.name) for value in [*model.graph.inputs, *values] if not _complete(value)]


def target_violations(model: ir.Model, target: Target) -> list[Violation]:
    """Return what the oldest TensorRT of `target` cannot take, bodies included; nothing for `portable`.

    An op that is always a plugin is not looked into.
    """
    if not target.tensorrt[0]:
        return []
    found: Counter[tuple[str, str]] = Counter()
    modules: dict[tuple[str, str], str] = {}
    plugins = {node for node, op in edge_nodes(model) if op.plugin_only}
    for node, path in flat_nodes(model, plugins):
        reason = _refusal(node, target)
        if reason:
            found[node.op_type, reason] += 1
            modules.setdefault((node.op_type, reason), path)
    return [Violation(op, count, modules[op, reason], reason) for (op, reason), count in found.items()]


@functools.cache
def operator_rules() -> dict[str, Any]:
    """Return the table of operators TensorRT's parser imports."""
    table: dict[str, Any] = json.loads((Path(__file__).parent / "tensorrt_ops.json").read_text())
    return table


def flat_nodes(model: ir.Model, leave_out: Collection[ir.Node] = ()) -> list[tuple[ir.Node, str]]:
    """Return every node, those of linked bodies too, each with the module path of the call."""
    flat = []
    for node in model.graph.all_nodes():
        if node in leave_out:
            continue
        function = model.functions.get((node.domain, node.op_type, ""))
        inner = [node] if function is None else list(function.all_nodes())
        flat += [(each, module_path(node)) for each in inner]
    return flat


def _refusal(node: ir.Node, target: Target) -> str:
    if node.domain == DOMAIN:
        return "no body is linked"
    rule = operator_rules()["ops"].get(node.op_type)
    if rule is None or not rule["supported"]:
        return "not imported by TensorRT's ONNX parser"
    old = target.tensorrt[0].split(".")[0] == "10" and int(target.tensorrt[0].split(".")[1]) < 15
    if old and not rule["trt_10_3"].get("supported", True):
        return f"not imported by TensorRT {target.tensorrt[0]}"
    types = {_RULE_TYPES.get(value.dtype) for value in node.inputs[:1] if value is not None and value.dtype}
    refused = sorted(str(kind) for kind in types if kind and kind not in rule["dtypes"])
    return f"does not take {', '.join(refused)}" if refused and rule["dtypes"] else ""


def _complete(value: ir.Value) -> bool:
    if value.dtype is None or value.shape is None:
        return False
    return all(isinstance(size, int) or size.value is not None for size in value.shape)

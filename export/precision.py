"""Precision: a float32 graph becomes strongly typed float16, with the sensitive operators kept in float32.

Every node is either *low* or float32. On each edge where the need differs one Cast is inserted, shared by all users of
the value. Graph inputs and outputs keep float32 and their names: the caller sees one interface at every precision.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeattn.errors import UnsupportedError
from edgeattn.export.lower import edge_nodes
from edgeattn.op import Op

# Long sums, exponentials and divisions by small numbers: what half precision loses, the paper figures do not forgive.
SENSITIVE = {
    "Softmax", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization",
    "RMSNormalization", "ReduceSum", "ReduceMean", "ReduceL2", "ReduceProd", "GlobalAveragePool", "CumSum", "Exp",
    "Log", "Pow", "Sqrt", "Reciprocal", "Erf", "Softplus", "Scan", "Loop", "Range",
}  # fmt: skip
# Inputs that stay float32 whatever the node: scales and sizes, not activations.
_FLOAT_INPUTS = {"Resize": (1, 2), "Clip": (), "Pad": ()}
_FLOAT16_MAX = 65504.0
_MOVING = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Split", "Slice", "Gather"}


@dataclass(frozen=True)
class Choice:
    """The precision of one node's results, and why."""

    node: str
    dtype: str
    reason: str


def to_float16(model: ir.Model, keep: Sequence[str] = (), plan: Mapping[str, str] | None = None) -> list[Choice]:
    """Turn `model` into float16 in place and return the choice made for every floating node.

    `keep` are module path patterns (`blocks.2.*`) that stay float32; `plan` maps a node name to "float32" or "float16"
    and wins over everything else. Raises EA0403 when a value has no type.
    """
    for position, node in enumerate(model.graph):
        node.name = node.name or f"node_{node.op_type}_{position}"
    ops = dict(edge_nodes(model))
    choices = [_choose(node, keep, plan or {}, ops.get(node)) for node in model.graph if _is_floating(node)]
    choices = _join_islands(model, choices)
    low = {choice.node for choice in choices if choice.dtype == "float16"}
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    constants: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if not _is_floating(node):
            continue
        wanted = ir.DataType.FLOAT16 if node.name in low else ir.DataType.FLOAT
        for position, value in enumerate(node.inputs):
            if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                continue
            kind = ir.DataType.FLOAT if _stays_float(node, position, ops.get(node)) else wanted
            if value.dtype != kind:
                node.replace_input_with(position, _converted(model, node, value, kind, casts, constants))
        _set_result_types(node, wanted, ops.get(node))
    _restore_outputs(model)
    return choices


def as_document(choices: Sequence[Choice], precision: str) -> dict[str, Any]:
    """Return the editable `precision.json`."""
    nodes = {choice.node: {"dtype": choice.dtype, "reason": choice.reason} for choice in choices}
    return {"schema": "edgeattn.precision/1", "precision": precision, "nodes": nodes}


def module_path(node: ir.Node) -> str:
    """Return the PyTorch module path of a node ("blocks2.3.mixer.m"), or "" when the exporter recorded none."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    names = [part.strip("' ") for part in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""


def _join_islands(model: ir.Model, choices: Sequence[Choice]) -> list[Choice]:
    """Keep what only moves data between float32 nodes in float32: two casts less, and no value leaves the range."""
    found = {choice.node: choice for choice in choices}
    wide = {name for name, choice in found.items() if choice.dtype == "float32"}
    for node in model.graph:
        if node.op_type not in _MOVING or node.name not in found or found[node.name].reason != "default":
            continue
        before = [value.producer() for value in node.inputs[:1] if value is not None]
        after = [use.node for value in node.outputs for use in value.uses()]
        if after and all(each is not None and each.name in wide for each in (*before, *after)):
            found[str(node.name)] = Choice(str(node.name), "float32", "between float32 nodes")
            wide.add(str(node.name))
    return list(found.values())


def _choose(node: ir.Node, keep: Sequence[str], plan: Mapping[str, str], op: Op | None) -> Choice:
    name = node.name or ""
    if name in plan:
        return Choice(name, plan[name], "precision plan")
    if node.domain in ("", "ai.onnx") and node.op_type in SENSITIVE:
        return Choice(name, "float32", f"{node.op_type} is computed in float32")
    path = module_path(node)
    matched = next((pattern for pattern in keep if fnmatch.fnmatchcase(path, pattern)), None)
    if matched is not None:
        return Choice(name, "float32", f"kept by {matched}")
    if op is not None and op.wide:
        return Choice(name, "float32", f"{op.onnx_name} has results beyond the range of float16")
    if op is not None:
        return Choice(name, "float16", "float16 in and out, float32 inside")
    return Choice(name, "float16", "default")


def _is_floating(node: ir.Node) -> bool:
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    for value in node.outputs:
        if value.dtype is None:
            raise UnsupportedError("EA0403", f"{value.name}: no type", where=module_path(node))
    return any(value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) for value in values) and node.op_type != "Shape"


def _stays_float(node: ir.Node, position: int, op: Op | None) -> bool:
    if op is not None:
        return op.signature.inputs[position].dtype == "float32"
    return position in _FLOAT_INPUTS.get(node.op_type, ())


def _converted(
    model: ir.Model,
    node: ir.Node,
    value: ir.Value,
    kind: ir.DataType,
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
    constants: dict[ir.Value, ir.Value],
) -> ir.Value:
    """Return `value` as `kind`: an initializer converted once, anything else behind one shared Cast."""
    if value.is_initializer():
        if value not in constants:
            constants[value] = _half_initializer(model, value)
        return constants[value]
    if (value, kind) not in casts:
        cast = ir.node("Cast", [value], attributes={"to": int(kind)}, name=f"{value.name}_to_{kind.name.lower()}")
        result = cast.outputs[0]
        result.name, result.dtype, result.shape = cast.name, kind, value.shape
        producer = value.producer()
        if producer is None:
            model.graph.insert_before(model.graph[0], cast)
        else:
            model.graph.insert_after(producer, cast)
        casts[value, kind] = result
    return casts[value, kind]


def _half_initializer(model: ir.Model, value: ir.Value) -> ir.Value:
    assert value.const_value is not None
    array = value.const_value.numpy()
    clamped = np.clip(array, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)
    if len(value.uses()) == 1:
        value.const_value = ir.tensor(clamped, name=value.name)
        value.dtype = ir.DataType.FLOAT16
        return value
    copy = ir.Value(name=f"{value.name}_float16", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16))
    copy.const_value = ir.tensor(clamped, name=copy.name)
    model.graph.register_initializer(copy)
    return copy


def _set_result_types(node: ir.Node, wanted: ir.DataType, op: Op | None) -> None:
    if node.op_type in ("Cast", "ConstantOfShape"):
        _retarget(node, wanted)
    for position, value in enumerate(node.outputs):
        fixed = op is not None and op.signature.outputs[position].dtype != "T"
        if value.dtype == ir.DataType.FLOAT and not fixed:
            value.dtype = wanted


def _retarget(node: ir.Node, wanted: ir.DataType) -> None:
    """Make a node that names its own result type produce `wanted` instead of float32."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(wanted))
    elif node.op_type == "ConstantOfShape" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor()
        if tensor.dtype == ir.DataType.FLOAT and wanted == ir.DataType.FLOAT16:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float16)))


def _restore_outputs(model: ir.Model) -> None:
    """Give every output float32 and its old name back, behind a Cast where it became float16."""
    for position, value in enumerate(model.graph.outputs):
        if value.dtype != ir.DataType.FLOAT16:
            continue
        producer = value.producer()
        assert producer is not None
        name = value.name
        value.name = f"{name}_float16"
        cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, name=f"{name}_to_float")
        result = cast.outputs[0]
        result.name, result.dtype, result.shape = name, ir.DataType.FLOAT, value.shape
        model.graph.insert_after(producer, cast)
        model.graph.outputs[position] = result

"""Linking: every edgeattn node gets the function body for its sizes, so that any ONNX Runtime runs the file."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx import parser

from edgeattn.errors import UnsupportedError
from edgeattn.export.translate import OPSET
from edgeattn.op import DOMAIN, OPS, Op

OP_METADATA = "edgeattn.op"
_BODY_TYPES = {ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


def edge_nodes(model: ir.Model) -> list[tuple[ir.Node, Op]]:
    """Return the nodes of our ops, linked or not, with the op each belongs to."""
    by_name = {op.onnx_name: op for op in OPS}
    found = []
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            found.append((node, by_name[node.metadata_props.get(OP_METADATA, node.op_type)]))
    return found


def link_bodies(model: ir.Model) -> ir.Model:
    """Give each node the function of its dims, attributes and type; equal bodies are one function. Returns `model`."""
    for node, op in edge_nodes(model):
        name, text = op.function(node_dims(node, op), node_attributes(node), _body_type(node, op), OPSET)
        key = (DOMAIN, name, "")
        if key not in model.functions:
            function = ir.serde.deserialize_function(parser.parse_function(text))
            model.functions[function.identifier()] = function
        node.metadata_props[OP_METADATA] = op.onnx_name
        node.op_type = name
    return model


def node_dims(node: ir.Node, op: Op) -> dict[str, int | None]:
    """Return the size of every dim of the signature at this node: None where dynamic."""
    dims: dict[str, int | None] = {}
    for tensor, value in zip(op.signature.inputs, node.inputs, strict=True):
        if value is None or value.shape is None:
            raise UnsupportedError("EA0402", f"{op.name}: {tensor.name} has no shape", where=node.name or "")
        for dim, size in zip(tensor.dims, value.shape, strict=True):
            known = size if isinstance(size, int) else None
            dims[dim] = known if dims.get(dim) is None else dims[dim]
    return dims


def node_attributes(node: ir.Node) -> dict[str, Any]:
    """Return the attributes of a node as Python values."""
    return {
        name: list(attribute.value) if attribute.type == ir.AttributeType.INTS else attribute.value
        for name, attribute in node.attributes.items()
    }


def _body_type(node: ir.Node, op: Op) -> str:
    for tensor, value in zip(op.signature.inputs, node.inputs, strict=True):
        if tensor.dtype == "T" and value is not None and value.dtype in _BODY_TYPES:
            return _BODY_TYPES[value.dtype]
    return "float"

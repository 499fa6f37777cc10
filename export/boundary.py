"""What TensorRT's parser can be shown of a graph whose plugins it does not have: all but those nodes."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import common

from edgeattn.export.lower import edge_nodes


def without_plugins(model: ir.Model) -> tuple[ir.Model, dict[str, int]]:
    """Return a copy of `model` without the ops that are always plugins, and how many of each there were.

    What such a node takes becomes an output of the graph, what it gives an input. A graph without one comes back as it
    is.
    """
    removed = Counter(op.onnx_name for _, op in edge_nodes(model) if op.plugin_only)
    if not removed:
        return model, {}
    cut = model.clone()
    for node in [node for node, op in edge_nodes(cut) if op.plugin_only]:
        _cut_out(cut.graph, node)
    ir.passes.Sequential(common.RemoveUnusedFunctionsPass())(cut)  # type: ignore[no-untyped-call]
    return cut, dict(removed)


def _cut_out(graph: ir.Graph, node: ir.Node) -> None:
    for value in node.inputs:
        if value is not None and value.producer() is not None and value not in graph.outputs:
            graph.outputs.append(value)
    for value in node.outputs:
        entry = ir.Value(name=f"{value.name}_plugin", shape=value.shape, type=value.type)
        graph.inputs.append(entry)
        value.replace_all_uses_with(entry, replace_graph_outputs=True)
    graph.remove(node, safe=True)

"""What a model is made of, operator by operator, and whether each target takes it: no bundle, no numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from edgeattn.export import compile_module
from edgeattn.export.check import flat_nodes, target_violations
from edgeattn.export.lower import OP_METADATA
from edgeattn.export.parity import example_tensors
from edgeattn.source import resolve
from edgeattn.target import get_target


def check_operations(
    model: str, *, inputs: Sequence[str] = (), dims: Sequence[str] = (), targets: Sequence[str] = ("portable",)
) -> tuple[str, dict[str, Any]]:
    """Return a table and its document: every operator of `model` with its count, and what each target refuses.

    Raises EA0401 for an operator that has no ONNX form at all, EA0301 when the model cannot be captured.
    """
    source = resolve(model, inputs=inputs, dims=dims)
    shapes = {spec.name: list(spec.dims) for spec in source.inputs}
    graph = compile_module(source.program or source.module, example_tensors(source.inputs), shapes=shapes)
    ours = Counter(node.metadata_props[OP_METADATA] for node in graph.graph if OP_METADATA in node.metadata_props)
    standard = Counter(node.op_type for node, _ in flat_nodes(graph) if node.op_type != "Constant")
    refused = {name: [vars(violation) for violation in target_violations(graph, get_target(name))] for name in targets}
    lines = [f"{count:6} x {name}   (one kernel, or its body)" for name, count in ours.most_common()]
    lines += [f"{count:6} x {name}" for name, count in standard.most_common()]
    for name, violations in refused.items():
        lines.append(f"{name}: {'all supported' if not violations else f'{len(violations)} unsupported'}")
        lines += [f"  {each['op']} x {each['count']} in {each['module']}: {each['reason']}" for each in violations]
    exit_code = 4 if any(refused.values()) else 0
    verdict = "fail" if exit_code else "pass"
    document = {
        "model": model,
        "verdict": verdict,
        "exit_code": exit_code,
        "ops": dict(ours),
        "operators": dict(standard),
    }
    return "\n".join(lines), {**document, "refused": refused}

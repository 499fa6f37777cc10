"""What is inside a bundle or an ONNX file: identity, inputs, versions, sizes, and the nodes of the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeattn.bundle import MANIFEST, Bundle
from edgeattn.errors import UsageError
from edgeattn.packages import require

_SHOWN = ("name", "model", "precision", "inputs", "outputs", "targets", "ops", "tool_versions", "options")
_SCOPES, _OP = "pkg.torch.onnx.name_scopes", "edgeattn.op"
_GRAPH = "model.onnx"


def inspect(path: str | Path, *, modules: bool = False, layers: bool = False) -> dict[str, Any]:
    """Return what is inside the bundle or `.onnx` file at `path`; a bundle's hashes are checked.

    `modules` adds node counts by PyTorch module, `layers` every node. Raises EA0106 for anything else, EA0904 for a
    changed file.
    """
    place = Path(path)
    if place.is_dir() or place.name == MANIFEST:
        return _bundle(Bundle.open(place if place.is_dir() else place.parent), modules, layers)
    if not place.is_file():
        raise UsageError("EA0106", f"{place}: does not exist")
    if place.suffix != ".onnx":
        hint = "edgeattn report show reads reports" if place.suffix == ".json" else "edgeattn export writes a bundle"
        raise UsageError("EA0106", f"{place}: neither a bundle nor an .onnx file", hints=[hint])
    return {"kind": "onnx", "path": str(place), "bytes": place.stat().st_size, "graph": _graph(place, modules, layers)}


def as_text(document: Mapping[str, Any]) -> str:
    """Return the document of `inspect` as lines for people."""
    lines = _identity(document) if document["kind"] == "bundle" else [f"{document['path']}  {_size(document['bytes'])}"]
    graph = document["graph"]
    if graph is None:
        return "\n".join(lines)
    total = (
        f"{graph['nodes']} nodes, {graph['expanded']} with bodies expanded, {_size(graph['weights_bytes'])} of weights"
    )
    lines += [f"graph      opset {graph['opset']}, IR {graph['ir_version']}: {total}"]
    lines += [
        f"custom     {entry['count']} x {name} ({entry['nodes']} nodes in its bodies)"
        for name, entry in graph["custom"].items()
    ]
    lines += ["nodes"] + [f"  {count:>5}  {op}" for op, count in graph["ops"].items()]
    if "modules" in graph:
        lines += ["modules"] + [
            f"  {entry['nodes']:>5}  {name or '(none)'}" for name, entry in graph["modules"].items()
        ]
    if "layers" in graph:
        lines += ["layers"] + [
            f"  {layer['op']:<28} {layer['output']:<40} {layer['module']}" for layer in graph["layers"]
        ]
    return "\n".join(lines)


def _bundle(bundle: Bundle, modules: bool, layers: bool) -> dict[str, Any]:
    bundle.verify()
    sizes = {name: (bundle.path / name).stat().st_size for name in bundle.files if (bundle.path / name).exists()}
    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "bundle_sha256": bundle.sha256,
        "bytes": sum(sizes.values()),
        "files": sizes,
        **{key: bundle.manifest[key] for key in _SHOWN},
        "graph": _graph(bundle.file(_GRAPH), modules, layers) if _GRAPH in sizes else None,
    }


def _identity(document: Mapping[str, Any]) -> list[str]:
    """Return the lines about a bundle as a whole."""
    from edgeattn.tensors import TensorSpec

    model, versions = document["model"], document["tool_versions"]
    weights = model.get("weights_sha256", "")
    weights = weights if weights in ("seeded", "own") else f"sha256 {weights[:12]}"
    targets = [entry["name"] if isinstance(entry, Mapping) else str(entry) for entry in document["targets"]]
    sizes = f"{_size(document['bytes'])}  sha256 {document['bundle_sha256'][:12]}"
    return [
        f"{document['name']}  {document['precision']}  {sizes}",
        f"model      {model.get('variant')} ({model.get('family')}), weights: {weights}",
        f"targets    {', '.join(targets)}",
        *[f"input      {TensorSpec.from_dict(entry)}" for entry in document["inputs"]],
        *[f"output     {TensorSpec.from_dict(entry)}" for entry in document["outputs"]],
        f"made with  {', '.join(f'{name} {version}' for name, version in versions.items() if version)}",
        *[f"file       {_size(size):>10}  {name}" for name, size in document["files"].items()],
    ]


def _graph(path: Path, modules: bool, layers: bool) -> dict[str, Any]:
    """Count the nodes of an ONNX file by operator; nodes of function bodies count once per call."""
    onnx = require("onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        # protobuf and onnx raise unrelated types for a damaged file.
        raise UsageError("EA0106", f"{path}: not a readable ONNX file", why=str(error).split("\n")[0]) from error
    nodes = list(model.graph.node)
    bodies = {(f.domain, f.name): sum(node.op_type != "Constant" for node in f.node) for f in model.functions}
    inner = {id(node): bodies.get((node.domain, node.op_type)) for node in nodes}
    custom: dict[str, dict[str, int]] = {}
    for node in nodes:
        if node.domain not in ("", "ai.onnx"):
            entry = custom.setdefault(_operator(node), {"count": 0, "nodes": 0})
            entry["count"] += 1
            entry["nodes"] += inner[id(node)] or 0
    found: dict[str, Any] = {
        "ir_version": model.ir_version,
        "opset": next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None),
        "nodes": len(nodes),
        "expanded": len(nodes) + sum(count - 1 for count in inner.values() if count is not None),
        "weights_bytes": sum(tensor.ByteSize() for tensor in model.graph.initializer),
        "ops": dict(Counter(_operator(node) for node in nodes).most_common()),
        "custom": custom,
    }
    return found | (_modules(nodes) if modules else {}) | (_layers(model.graph) if layers else {})


def _modules(nodes: list[Any]) -> dict[str, Any]:
    """Group nodes by the PyTorch module they come from, in order of first use."""
    groups: dict[str, Counter[str]] = {}
    for node in nodes:
        groups.setdefault(_module(node), Counter())[_operator(node)] += 1
    return {"modules": {name: {"nodes": counts.total(), "ops": dict(counts)} for name, counts in groups.items()}}


def _layers(graph: Any) -> dict[str, Any]:
    """List every node with its first output."""
    types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
    return {
        "layers": [
            {
                "name": node.name,
                "op": _operator(node),
                "output": _described(node.output[0], types),
                "module": _module(node),
            }
            for node in graph.node
        ]
    }


def _described(name: str, types: Mapping[str, Any]) -> str:
    if name not in types:
        return name
    onnx = require("onnx")
    sizes = [str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?" for dim in types[name].shape.dim]
    return f"{onnx.TensorProto.DataType.Name(types[name].elem_type).lower()}[{' x '.join(sizes)}]"


def _operator(node: Any) -> str:
    """Return the operator of a node; a linked body is called by a name of its own, so its op stands in metadata."""
    return next((entry.value for entry in node.metadata_props if entry.key == _OP), str(node.op_type))


def _module(node: Any) -> str:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    names = [part.strip("' ") for part in scopes.strip("[]").split(",")]
    return names[-2] if len(names) > 1 else ""


def _size(count: int) -> str:
    """Return a number of bytes in the largest unit that keeps it above one."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"

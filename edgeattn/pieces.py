"""A detector's graph cut where its stages end: pieces that ONNX Runtime runs one after the other, each timed."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from edgeattn.export.lower import OP_METADATA
from edgeattn.kernels import voxelize
from edgeattn.op import DOMAIN

Arrays = Mapping[str, NDArray[Any]]
_SCOPES = "pkg.torch.onnx.name_scopes"
# The last piece: what follows the last stage.
REST = "decode"


class Graph:
    """A graph with the PyTorch module that each node comes from."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        graph = self.model.graph
        self.nodes = list(graph.node)
        self.producer = {name: number for number, node in enumerate(self.nodes) for name in node.output}
        self.outputs = [value.name for value in graph.output]
        self.initial = {tensor.name: tensor for tensor in graph.initializer}
        self.infos = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
        self.users: dict[str, list[int]] = {}
        for number, node in enumerate(self.nodes):
            for name in node.input:
                self.users.setdefault(name, []).append(number)
        self._scopes: list[tuple[str, ...]] = []
        for node in self.nodes:
            self._scopes.append(self._scopes_of(node))

    def numbering(self) -> list[str]:
        """Return what numbers the voxels: the voxel of every point, and the coordinates of every voxel."""
        for node in self.nodes:
            if node.domain == DOMAIN and _metadata(node).get(OP_METADATA) == voxelize.op.onnx_name:
                return list(node.output[:2])
        return []

    def results(self, module: str) -> list[str]:
        """Return what a PyTorch module hands on: values made inside it and used outside, or outputs of the graph."""
        found = []
        for number, node in enumerate(self.nodes):
            if module in self._scopes[number]:
                found += [self._before_casts(name) for name in node.output if self._leaves(name, module)]
        return list(dict.fromkeys(found))

    def _leaves(self, name: str, module: str) -> bool:
        return name in self.outputs or any(module not in self._scopes[user] for user in self.users.get(name, ()))

    def _before_casts(self, name: str) -> str:
        """Go back over conversions that no PyTorch module asked for."""
        node = self.nodes[self.producer[name]]
        while node.op_type == "Cast" and _SCOPES not in _metadata(node) and node.input[0] in self.producer:
            name = node.input[0]
            node = self.nodes[self.producer[name]]
        return name

    def _scopes_of(self, node: onnx.NodeProto) -> tuple[str, ...]:
        """Return the modules that were running, outermost first; an inserted node has those of its input."""
        text = _metadata(node).get(_SCOPES)
        if text is not None:
            return tuple(ast.literal_eval(text)[:-1])
        before = next((self.producer[name] for name in node.input if name in self.producer), None)
        return self._scopes[before] if before is not None else ()


@dataclass
class Piece:
    """A part of the graph that runs by itself."""

    name: str
    session: onnxruntime.InferenceSession
    inputs: list[str]
    outputs: list[str]

    def run(self, values: Arrays) -> dict[str, NDArray[Any]]:
        """Run it on what it needs of `values`."""
        found = self.session.run(self.outputs, {name: values[name] for name in self.inputs})
        return dict(zip(self.outputs, found, strict=True))


class Pieces:
    """The whole graph as pieces."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run all pieces and return what they hand on, by the name of the value."""
        values = dict(feeds)
        for piece in self._pieces:
            values.update(piece.run(values))
        return values

    def time(self, feeds: Arrays, pause: float) -> dict[str, float]:
        """Run all pieces with pauses of `pause` seconds between them, and return how many milliseconds each took."""
        values, taken = dict(feeds), {}
        for piece in self._pieces:
            time.sleep(pause)
            began = time.perf_counter()
            found = piece.run(values)
            taken[piece.name] = 1e3 * (time.perf_counter() - began)
            values.update(found)
        return taken


def cut(graph: Graph, stages: Mapping[str, Sequence[str]], threads: int) -> Pieces:
    """Cut `graph` where the values of each stage are there, in order, and load the pieces with `threads` threads.

    A node belongs to the first stage that needs it. The file is left as it is.
    """
    owner: dict[int, int] = {}
    for number, names in enumerate(stages.values()):
        for node in _needed(graph, names, owner):
            owner[node] = number
    parts: list[list[int]] = [[] for _ in range(len(stages) + 1)]
    for node in range(len(graph.nodes)):
        parts[owner.get(node, len(stages))].append(node)
    kept = {name for names in stages.values() for name in names}
    named = zip([*stages, REST], parts, strict=True)
    return Pieces([_load(graph, name, part, kept, threads) for name, part in named if part])


def _needed(graph: Graph, names: Iterable[str], taken: Mapping[int, int]) -> set[int]:
    """Return the nodes that `names` depend on, other than those already taken."""
    found: set[int] = set()
    waiting = list(names)
    while waiting:
        node = graph.producer.get(waiting.pop())
        if node is not None and node not in found and node not in taken:
            found.add(node)
            waiting += graph.nodes[node].input
    return found


def _load(graph: Graph, name: str, part: Sequence[int], kept: set[str], threads: int) -> Piece:
    """Return the nodes `part` as a graph of its own; it hands on what is used outside it, and what is in `kept`."""
    inside = set(part)
    nodes = [graph.nodes[number] for number in part]
    made = [each for node in nodes for each in node.output if each]
    used = dict.fromkeys(each for node in nodes for each in node.input if each)
    inputs = [each for each in used if each not in graph.initial and graph.producer.get(each) not in inside]
    outputs = [each for each in made if each in kept or each in graph.outputs or _used_outside(graph, each, inside)]
    content = helper.make_graph(
        nodes,
        name,
        [graph.infos[each] for each in inputs],
        [graph.infos[each] for each in outputs],
        [graph.initial[each] for each in used if each in graph.initial],
    )
    whole = graph.model
    model = helper.make_model(
        content, functions=whole.functions, opset_imports=whole.opset_import, ir_version=whole.ir_version
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Piece(name, session, inputs, outputs)


def _used_outside(graph: Graph, name: str, inside: set[int]) -> bool:
    return any(user not in inside for user in graph.users.get(name, ()))


def _metadata(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}

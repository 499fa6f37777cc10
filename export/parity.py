"""Running a graph in ONNX Runtime next to the PyTorch original on the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from edgeattn.data import seeded_feeds
from edgeattn.export.lower import link_bodies
from edgeattn.tensors import TensorSpec

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


def example_feeds(specs: Sequence[TensorSpec], seed: int, size: str = "opt") -> dict[str, Array]:
    """Return one seeded input per spec.

    `size` picks the size of dynamic dims: "min", "opt", "max", or "trace" (opt, but never 1: a size of 1 would be baked
    in by the tracer).
    """
    return seeded_feeds(seed, specs, lambda dim: _size(dim, size))


def example_tensors(specs: Sequence[TensorSpec]) -> dict[str, torch.Tensor]:
    """Return example inputs for the tracer."""
    return {name: torch.from_numpy(array) for name, array in example_feeds(specs, 0, "trace").items()}


def run_torch(module: nn.Module, feeds: Feeds) -> list[Array]:
    """Return the outputs of the PyTorch module as arrays."""
    with torch.inference_mode():
        found = module(*(torch.from_numpy(array) for array in feeds.values()))
    return [value.float().numpy() if value.is_floating_point() else value.numpy() for value in flatten(found)]


def run_half(module: nn.Module, feeds: Feeds) -> list[Array] | None:
    """Return the outputs of PyTorch itself in float16, or None where an operator has no float16 form here."""
    half = copy.deepcopy(module).half()
    halves = {name: _half(array) for name, array in feeds.items()}
    try:
        return run_torch(half, halves)
    except (RuntimeError, NotImplementedError):
        return None


def flatten(found: Any) -> list[torch.Tensor]:
    """Return the tensors of a module's result in the exporter's order."""
    if isinstance(found, torch.Tensor):
        return [found]
    values = found.values() if isinstance(found, Mapping) else found
    return [tensor for value in values for tensor in flatten(value)]


def run_graph(model: ir.Model, feeds: Feeds) -> list[Array]:
    """Return the outputs of a graph whose bodies need not be linked yet; `model` is left as it is."""
    linked = link_bodies(model.clone())
    return run_bytes(ir.serde.serialize_model(linked).SerializeToString(), feeds)


def run_bytes(graph: bytes, feeds: Feeds) -> list[Array]:
    """Return the outputs of a serialized graph."""
    return list(session(graph).run(None, dict(feeds)))


def session(graph: bytes | str) -> onnxruntime.InferenceSession:
    """Return an ONNX Runtime session on the CPU that keeps its remarks to itself."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _size(dim: Any, which: str) -> int:
    if which == "trace":
        return min(max(dim.opt, 2), dim.max) if dim.name else int(dim.opt)
    return int(getattr(dim, which))


def _half(array: Array) -> Array:
    return array.astype(np.float16) if array.dtype == np.float32 else array

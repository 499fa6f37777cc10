"""What runs a bundle: ONNX Runtime on the linked graph, or PyTorch on the original, behind one small interface."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from edgeattn.bundle import Bundle
from edgeattn.errors import BuildError, MissingError, UsageError
from edgeattn.packages import require
from edgeattn.registry import near
from edgeattn.tensors import to_numpy, to_torch

GRAPH = "model.onnx"
_PACKAGES = {"ort": "onnxruntime", "torch": "torch"}
_LATER = ("tensorrt", "rtx")
_SEVERITY_ERROR = 3


class Runner(Protocol):
    """A loaded model: takes arrays in the order of the inputs, gives arrays in the order of the outputs."""

    device: str
    provider: str
    version: str

    def adopt(self, name: str, array: Any) -> Any:
        """Return a checked input in the form that `run` takes."""

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """Run the model once and return numpy arrays or torch tensors."""


class OrtRunner:
    """ONNX Runtime on `model.onnx`. `run` may be called from several threads at once."""

    def __init__(self, bundle: Bundle, device: str, threads: int | None) -> None:
        ort = require("onnxruntime")
        bundle.verify(GRAPH)
        self.device = device
        self.version = str(ort.__version__)
        self.provider = _provider(ort, device)
        self._outputs = [spec.name for spec in bundle.outputs]
        self._inputs = [spec.name for spec in bundle.inputs]
        options = ort.SessionOptions()
        options.log_severity_level = _SEVERITY_ERROR
        options.intra_op_num_threads = threads or 0
        number = {"device_id": _number(device)} if device != "cpu" else {}
        try:
            self._session = ort.InferenceSession(bundle.file(GRAPH), options, providers=[(self.provider, number)])
        except Exception as error:
            # ONNX Runtime has no common base class for what a graph it refuses can raise.
            first = str(error).strip().splitlines()[0]
            raise BuildError("EA0601", f"{bundle.path / GRAPH}: ONNX Runtime refuses it", why=first) from error
        chosen = self._session.get_providers()[0]
        if chosen != self.provider:
            raise MissingError("EA0205", f"ONNX Runtime chose {chosen} where {self.provider} was asked for")

    def adopt(self, name: str, array: Any) -> np.ndarray:
        """Return the input as a contiguous numpy array."""
        return to_numpy(name, array)

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the graph once."""
        results: list[np.ndarray] = self._session.run(self._outputs, dict(zip(self._inputs, arrays, strict=True)))
        return results


class TorchRunner:
    """The PyTorch original in float32. The thread count is torch's one number per process, set during each call."""

    def __init__(self, bundle: Bundle, device: str, threads: int | None) -> None:
        torch = require("torch")
        from edgeattn.originals import original

        if device != "cpu" and not torch.cuda.is_available():
            raise MissingError("EA0206", f"{device}: torch finds no CUDA device here")
        self.device = "cpu" if device == "cpu" else f"cuda:{_number(device)}"
        self.version = str(torch.__version__)
        self.provider = "eager"
        self.module = original(bundle).to(self.device)
        self._torch = torch
        self._threads = threads
        self._outputs = bundle.outputs

    def adopt(self, name: str, array: Any) -> Any:
        """Return the input as a tensor on this device; half precision becomes float32, as the original computes."""
        tensor = to_torch(name, array, self.device)
        return tensor.float() if tensor.dtype in (self._torch.float16, self._torch.bfloat16) else tensor

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """Run the module once; outputs have the dtypes of the manifest."""
        with self._torch.inference_mode(), self._own_threads():
            results = self.module(*arrays)
            named = zip(self._outputs, self._flat(results), strict=True)
            return [tensor.to(getattr(self._torch, spec.dtype)) for spec, tensor in named]

    def _flat(self, results: Any) -> list[Any]:
        if isinstance(results, Mapping):
            return [results[spec.name] for spec in self._outputs]
        return list(results) if isinstance(results, (tuple, list)) else [results]

    @contextlib.contextmanager
    def _own_threads(self) -> Iterator[None]:
        before = self._torch.get_num_threads()
        if self._threads in (None, before):
            yield
            return
        self._torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            self._torch.set_num_threads(before)


BACKENDS: dict[str, Callable[[Bundle, str, int | None], Runner]] = {"ort": OrtRunner, "torch": TorchRunner}


def usable() -> list[str]:
    """Return the backends whose package is installed here, best first."""
    return [name for name, package in _PACKAGES.items() if importlib.util.find_spec(package) is not None]


def choose(backend: str | None) -> str:
    """Return `backend` checked, or the best usable one. Raises EA0101 (unknown), EA0204 (not here)."""
    if backend is None:
        found = usable()
        if not found:
            raise MissingError("EA0204", "no backend is usable here", hints=["pip install 'edgeattn[cpu]'"])
        return found[0]
    if backend in _LATER:
        raise MissingError(
            "EA0204",
            f"{backend}: this version of edgeattn runs bundles with {' and '.join(BACKENDS)} only",
            hints=["TensorRT engines come with a later version; nothing falls back silently"],
        )
    if backend not in BACKENDS:
        raise UsageError("EA0101", f"{backend}: no such backend{near(backend, [*BACKENDS, *_LATER])}")
    return backend


def choose_device(device: str | None) -> str:
    """Return "cpu" or "cuda:N". Raises EA0135 for anything else."""
    name = device or "cpu"
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not (number or "0").isdigit()):
        raise UsageError("EA0135", f"{name}: no such device; cpu, cuda or cuda:N")
    return name if kind == "cpu" else f"cuda:{number or 0}"


def _number(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _provider(ort: Any, device: str) -> str:
    name = "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"
    if name not in ort.get_available_providers():
        raise MissingError(
            "EA0206",
            f"{device}: this ONNX Runtime has no {name}",
            hints=["pip install 'edgeattn[gpu]' in its own environment"],
        )
    return name

"""The runtime API: a bundle as a callable, one interface for every backend."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgeattn.backends import BACKENDS, Runner, choose, choose_device
from edgeattn.boxes import Detections
from edgeattn.bundle import Bundle
from edgeattn.clouds import load_cloud
from edgeattn.detection import cloud_input, detect, pack, refuse_losses, seeded_feeds
from edgeattn.errors import UnsupportedError, UsageError
from edgeattn.tensors import Outputs, TensorSpec, check, dtype_of, in_order, kind_of, like, to_numpy


@dataclass(frozen=True)
class SessionInfo:
    """What runs where: backend, its provider and version, device, precision of the graph, threads (None: default)."""

    bundle: str
    bundle_sha256: str
    backend: str
    provider: str
    version: str
    device: str
    precision: str
    threads: int | None


class Session:
    """A loaded bundle: `session(x)` or `session({"image": x})`; numpy, torch or DLPack in, the same kind out.

    Calls may come from several threads at once: they share the weights and nothing else. `bind`, `stream` and `close`
    belong to the thread that owns the session; give every other thread a `clone()`.
    """

    def __init__(self, bundle: Bundle, runner: Runner, info: SessionInfo) -> None:
        self.bundle = bundle
        self.info = info
        self.inputs = bundle.inputs
        self.outputs = bundle.outputs
        self._runner: Runner | None = runner
        self._detector = bundle.detector
        self._bound: dict[str, Any] = {}
        self._queue: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """Run once and return the output, or `Outputs` (a tuple that is also indexed by name) when there are several.

        Inputs are positional or one mapping by name. dtype and shape are checked before any work: EA0130 to EA0134.
        A detector also takes one point cloud and returns `Detections`: see `detect`.
        """
        return self._work(arguments)()

    def detect(self, points: Any, *, strict_capacity: bool = False) -> Detections:
        """Return the boxes in a cloud: an array [n, columns] (numpy, torch, DLPack; any n), or the path of a file.

        What does not fit the capacities of the graph is lost and said in `warnings`; with `strict_capacity` it is an
        error, EA0148. Raises EA0146 and EA0147 for a cloud that is none, EA0143 for a model that takes no clouds.
        """
        detections = self._detect(*self._packed(points))
        if not strict_capacity:
            return detections
        return refuse_losses(detections, str(points) if isinstance(points, (str, Path)) else "the cloud")

    def submit(self, *arguments: Any) -> Future[Any]:
        """Run in the background, one after the other, and return a future.

        Checks happen now; leave the arrays alone until the future is done.
        """
        work = self._work(arguments)
        with self._lock:
            if self._queue is None:
                self._queue = ThreadPoolExecutor(1, thread_name_prefix="edgeattn")
            return self._queue.submit(work)

    def bind(self, outputs: Mapping[str, Any] | None = None) -> None:
        """Write results into these buffers from now on, and return them; None ends it. Raises EA0130, EA0132."""
        specs = {spec.name: spec for spec in self.outputs}
        for name, buffer in (outputs or {}).items():
            if name not in specs:
                raise UsageError("EA0130", f"{name}: no such output; outputs are {', '.join(specs)}")
            if dtype_of(buffer) != specs[name].dtype:
                raise UsageError("EA0132", f"{name}: a buffer of {specs[name].dtype} is needed, got {dtype_of(buffer)}")
        self._bound = dict(outputs or {})

    def warmup(self, count: int = 3) -> None:
        """Run `count` times on noise of the best size."""
        for _ in range(count):
            self(*self._examples())

    def capture_graph(self) -> None:
        """Raise EA0403: CUDA graphs are captured from engines, which this version does not run."""
        raise UnsupportedError(
            "EA0403", f"backend {self.info.backend} on {self.info.device} has no CUDA graphs to capture"
        )

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """Order the calls inside on a torch CUDA stream; None means no stream. Raises EA0403 where there are none."""
        if stream is None:
            yield
            return
        if self.info.backend != "torch" or self.info.device == "cpu":
            where = f"backend {self.info.backend} on {self.info.device}"
            raise UnsupportedError("EA0403", f"{where} has no streams: calls return when the result is there")
        import torch

        with torch.cuda.stream(stream):
            yield

    def clone(self) -> Session:
        """Return a session that shares the weights and has buffers and a queue of its own."""
        return Session(self.bundle, self._alive(), self.info)

    def bench(self, duration: str | float = "3s") -> dict[str, Any]:
        """Measure the latency of calls on noise of the best size: percentiles in milliseconds, scope e2e."""
        from edgeattn.latency import measure, summarise

        arrays, name = self._examples(), self.info.backend
        measured = measure({name: lambda: self(*arrays)}, duration=_seconds(duration))
        return {"backend": name, "scope": "e2e", **summarise(measured.timings[name])}

    def close(self) -> None:
        """Wait for submitted work and let go of the model; clones keep working. Calls raise EA0136 from now on."""
        with self._lock:
            queue, self._queue = self._queue, None
        if queue is not None:
            queue.shutdown()
        self._runner = None
        self._bound = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({self.info.bundle!r}, backend={self.info.backend!r}, device={self.info.device!r})"

    def _alive(self) -> Runner:
        if self._runner is None:
            raise UsageError("EA0136", f"{self.info.bundle}: this session is closed")
        return self._runner

    def _work(self, arguments: tuple[Any, ...]) -> Callable[[], Any]:
        """Return what is left to do once the arguments are checked: one run, or the detection in one cloud."""
        if self._detector is not None and len(arguments) == 1 and not isinstance(arguments[0], Mapping):
            return functools.partial(self._detect, *self._packed(arguments[0]))
        return functools.partial(self._run, self._checked(arguments))

    def _packed(self, points: Any) -> tuple[list[Any], int]:
        """Return the inputs for a cloud, and how many points it has."""
        spec = cloud_input(self.inputs)
        if self._detector is None or spec is None:
            raise UsageError("EA0143", f"{self.info.bundle}: this model takes no point cloud")
        cloud = load_cloud(points, spec.shape()[1]) if isinstance(points, (str, Path)) else points
        array = to_numpy(spec.name, cloud) if kind_of(cloud) in ("torch", "dlpack") else cloud
        feeds, count = pack(array, spec)
        self._alive()
        return [feeds[each.name] for each in self.inputs], count

    def _detect(self, arrays: list[Any], count: int) -> Detections:
        spec = cloud_input(self.inputs)
        assert self._detector is not None
        assert spec is not None
        return detect(dict(self._run(arrays).items()), self._detector, spec, count)

    def _checked(self, arguments: tuple[Any, ...]) -> list[Any]:
        self._alive()
        arrays = in_order(self.inputs, arguments)
        check(self.inputs, arrays)
        return arrays

    def _run(self, arrays: list[Any]) -> Any:
        runner = self._alive()
        adopted = [runner.adopt(spec.name, array) for spec, array in zip(self.inputs, arrays, strict=True)]
        results = runner.run(adopted)
        named = zip(self.outputs, results, strict=True)
        given = [
            self._place(spec, result) if spec.name in self._bound else like(arrays[0], result) for spec, result in named
        ]
        return given[0] if len(given) == 1 else Outputs.of([spec.name for spec in self.outputs], given)

    def _place(self, spec: TensorSpec, result: Any) -> Any:
        """Copy a result into its bound buffer and return the buffer."""
        buffer = self._bound[spec.name]
        if tuple(buffer.shape) != tuple(result.shape):
            raise UsageError(
                "EA0133", f"{spec.name}: the bound buffer is {list(buffer.shape)}, the result {list(result.shape)}"
            )
        if isinstance(buffer, np.ndarray):
            np.copyto(buffer, like(buffer, result))
        else:
            buffer.copy_(like(buffer, result))
        return buffer

    def _examples(self) -> list[np.ndarray]:
        """Return seeded noise of the best size, or a seeded cloud; zeros for integers, which may be indices."""
        points = cloud_input(self.inputs)
        if points is not None:
            feeds = seeded_feeds(0, points)
            return [feeds[spec.name] for spec in self.inputs]
        draw = np.random.default_rng(0).standard_normal
        return [
            (draw(spec.shape()) if "float" in spec.dtype else np.zeros(spec.shape())).astype(spec.dtype)
            for spec in self.inputs
        ]


def load(
    bundle: str | Path | Bundle, backend: str | None = None, device: str | None = None, threads: int | None = None
) -> Session:
    """Load a bundle. `backend` is "ort" (the exported graph) or "torch" (the original); None takes the first usable.

    The choice stands in `session.info`; nothing falls back from what was named. `device` is "cpu" or "cuda:N". Raises
    EA0106 and EA09xx for the bundle, EA02xx for what is missing here, EA0601 for a graph that the backend refuses.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    name, place = choose(backend), choose_device(device)
    if threads is not None and threads < 1:
        raise UsageError("EA0135", f"threads must be 1 or more, got {threads}")
    runner = BACKENDS[name](opened, place, threads)
    info = SessionInfo(
        opened.path.name, opened.sha256, name, runner.provider, runner.version, runner.device, opened.precision, threads
    )
    return Session(opened, runner, info)


def _seconds(duration: str | float) -> float:
    """Read 3, "3s" or "500ms" as seconds. Raises EA0137."""
    if isinstance(duration, (int, float)):
        return float(duration)
    for unit, factor in (("ms", 1e-3), ("s", 1.0), ("", 1.0)):
        number = duration.removesuffix(unit) if unit else duration
        if duration.endswith(unit) and number.replace(".", "", 1).isdigit():
            return float(number) * factor
    raise UsageError("EA0137", f"{duration}: not a duration; write 3s or 500ms")

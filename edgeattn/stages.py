"""The stages of a detector one by one: what PyTorch computes in each beside the deployed graph, and how long it takes.

The graph is cut in memory where the values of a stage are there (`edgeattn.pieces`), and the pieces run in turn. That
the pieces together give what the whole gives is checked on every sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeattn.accuracy import MATCHED, Band
from edgeattn.bundle import Bundle
from edgeattn.contenders import ORIGINAL, Contender
from edgeattn.detection import align, cloud_input
from edgeattn.pieces import REST, Graph, Pieces, cut
from edgeattn.reference import Feeds, Original, Results, Sample
from edgeattn.stage_errors import StageError, comparable, pair, scaled_error

Array = NDArray[Any]
# Where voxels are numbered: a module of every original, and an op in the graph.
VOXELS = "voxels"
# The backend that runs the graph whose pieces are compared.
GRAPH = "ort"
_PARTS = ("points", "index", "coords")
_INDEX, _COORDS = (f"{VOXELS}.{part}" for part in _PARTS[1:])
_FEWEST_RUNS, _MOST_RUNS = 3, 50
# So long do worker threads keep spinning after a run, and slow down whoever runs next (see `latency`).
_PAUSE_S = 0.1


class Watch:
    """Hooks on submodules of an original: what each returned in the last run, and when."""

    def __init__(self, original: Original, names: Sequence[str]) -> None:
        self._modules = {name: part for name in names if (part := _submodule(original.module, name)) is not None}
        self._results: dict[str, Any] = {}
        self._ends: dict[str, float] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the runs inside."""
        handles = [part.register_forward_hook(self._hook(name)) for name, part in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._results.clear()

    def values(self, stage: str) -> dict[str, Array]:
        """Return what a stage returned, by the name of the value: the stage's, with key or place where it has many."""
        found = self._results.get(stage)
        return {} if found is None else {name: _array(value) for name, value in _flat(stage, found)}

    def milliseconds(self, run: Callable[[], object]) -> dict[str, float]:
        """Return how long `run` took from the end of one stage to that of the next; the rest comes last."""
        self._ends.clear()
        began = time.perf_counter()
        run()
        ends = {**self._ends, REST: time.perf_counter()}
        starts = [began, *list(ends.values())[:-1]]
        return {name: 1e3 * (end - start) for (name, end), start in zip(ends.items(), starts, strict=True)}

    def _hook(self, name: str) -> Callable[..., None]:
        def note(module: object, inputs: object, result: object) -> None:
            self._ends[name] = time.perf_counter()
            self._results[name] = result

        return note


class Stages:
    """The stages of a bundle's detector, over a stream of samples: errors per backend, and times."""

    def __init__(self, bundle: Bundle, original: Original, threads: int) -> None:
        assert bundle.detector is not None
        self._bundle, self._threads = bundle, threads
        self._pause = _PAUSE_S if threads > 1 else 0.0
        self._names = (VOXELS, *bundle.detector.stages)
        cloud = cloud_input(bundle.inputs)
        assert cloud is not None
        assert cloud.cloud is not None
        self._capacity = int(cloud.cloud["voxels"][0])
        self._watch = Watch(original, self._names)
        self._half: Watch | None = None
        self._pieces: Pieces | None = None
        self._refused = False
        self._ends: dict[str, list[str]] = {}
        self._pairs: dict[str, dict[str, str]] = {}
        self.errors: dict[str, dict[str, StageError]] = {}
        self._control: dict[str, float] = {}
        self.warnings: list[str] = []
        self._original = original

    @contextmanager
    def hooked(self, half: Original | None) -> Iterator[None]:
        """Watch the original, and `half`, its form at the precision of the bundle, while they run inside."""
        with self._watch.hooked():
            if half is None:
                yield
                return
            self._half = Watch(half, self._names)
            with self._half.hooked():
                yield

    def add(self, contender: Contender, sample: Sample, found: Results) -> None:
        """Compare the last run of a contender with that of the original: its half-precision form, or the graph."""
        if contender.role == "precision":
            self._add_half(contender.name, sample.name)
        elif contender.name == GRAPH:
            self._add_graph(sample, found)

    @property
    def cut_error(self) -> float:
        """Return the largest scaled error of the outputs of the pieces, against those of the whole graph."""
        return max(self._control.values(), default=0.0)

    def check(self, bands: Mapping[str, Band]) -> None:
        """Drop the errors of the pieces where together they differ from the whole by more than an output may."""
        if any(error > bands[name].limit for name, error in self._control.items()):
            self.errors.pop(GRAPH, None)
            self.warnings.append(
                f"ort: the stages are not compared: cutting the graph changes it by {self.cut_error:.1e}"
            )

    def modules(self, name: str) -> list[dict[str, Any]]:
        """Return the errors of the backend `name`, first stage first."""
        return [error.metrics() for error in self.errors.get(name, {}).values()]

    def time(self, feeds: Feeds, names: Sequence[str], duration: float) -> dict[str, list[dict[str, Any]]]:
        """Return the median milliseconds of every stage, for "torch" and "ort" where they are among `names`.

        They take turns, three times at least, then for `duration` seconds or 50 times.
        """
        with self._watch.hooked():
            self._original(feeds)
            runs = self._runners(feeds, names)
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
            began, count = time.perf_counter(), 0
            while count < _FEWEST_RUNS or (time.perf_counter() - began < duration and count < _MOST_RUNS):
                for name, run in runs.items():
                    time.sleep(self._pause)
                    taken[name].append(run())
                count += 1
        return {name: _medians(rows) for name, rows in taken.items()}

    def _runners(self, feeds: Feeds, names: Sequence[str]) -> dict[str, Callable[[], dict[str, float]]]:
        runs: dict[str, Callable[[], dict[str, float]]] = {}
        if ORIGINAL in names:
            runs[ORIGINAL] = lambda: self._watch.milliseconds(lambda: self._original(feeds))
        pieces = self._loaded() if GRAPH in names else None
        if pieces is not None:
            pieces.run(feeds)
            runs[GRAPH] = lambda: pieces.time(feeds, self._pause)
        return runs

    def _loaded(self) -> Pieces | None:
        """Return the pieces, cut on first use; None where the graph cannot be cut, which is said."""
        if self._pieces is None and not self._refused:
            try:
                graph = Graph(self._bundle.file("model.onnx"))
                found = {VOXELS: graph.numbering(), **{stage: graph.results(stage) for stage in self._names[1:]}}
                self._ends = {stage: names for stage, names in found.items() if names}
                lost = [stage for stage in found if stage not in self._ends]
                self.warnings += [f"ort: {stage} is not compared: its values are not in the graph" for stage in lost]
                self._pieces = cut(graph, self._ends, self._threads)
            except Exception as error:
                # A diagnosis of a graph that runs as a whole: what stops it is said, and stops nothing else.
                why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                self.warnings.append(f"ort: the stages are not compared: {why[:200]}")
                self._refused = True
        return self._pieces

    def _add_half(self, name: str, sample: str) -> None:
        assert self._half is not None
        for stage in self._names[1:]:
            self._update(name, sample, stage, comparable(self._watch.values(stage), self._half.values(stage)))

    def _add_graph(self, sample: Sample, whole: Results) -> None:
        pieces = self._loaded()
        if pieces is None:
            return
        values = pieces.run(sample.feeds)
        for name, error in _apart({name: values[name] for name in whole}, whole).items():
            self._control[name] = max(error, self._control.get(name, 0.0))
        for stage, names in self._ends.items():
            expected = self._watch.values(stage)
            if stage not in self._pairs:
                known = dict(zip((_INDEX, _COORDS), names, strict=False)) if stage == VOXELS else None
                self._pairs[stage] = known or pair(expected, {name: values[name] for name in names})
            found = {label: values[name] for label, name in self._pairs[stage].items()}
            if stage == VOXELS:
                expected, found = self._inside(expected), self._inside(found)
            self._update(GRAPH, sample.name, stage, comparable(expected, found))

    def _inside(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Leave out points in no voxel: the graph numbers them by its capacity, the original has none of them."""
        return {**values, _INDEX: values[_INDEX][values[_INDEX] < self._capacity]}

    def _update(self, name: str, sample: str, stage: str, values: Mapping[str, tuple[Array, Array]]) -> None:
        errors = self.errors.setdefault(name, {})
        for label, (expected, found) in values.items():
            integer = expected.dtype.kind in "iub"
            errors.setdefault(label, StageError(stage, label, integer)).update(sample, expected, found)


def _apart(found: Results, expected: Results) -> dict[str, float]:
    """Return the scaled error of every output, candidates in one order; 0 where all are the same to the last bit."""
    if all(np.array_equal(found[name], value, equal_nan=value.dtype.kind == "f") for name, value in expected.items()):
        return dict.fromkeys(expected, 0.0)
    ours, theirs, share = align(found, expected)
    if share < MATCHED:
        return dict.fromkeys(expected, math.inf)
    return {name: scaled_error(theirs[name], ours[name]) for name in expected}


def _medians(rows: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    return [{"name": name, "p50_ms": float(np.median([row[name] for row in rows]))} for name in rows[0]]


def _submodule(module: Any, name: str) -> Any:
    """Return a part of an original, also where that is a rounded copy, which holds it as `module`."""
    parts = dict(module.named_modules())
    return parts.get(name, parts.get(f"module.{name}"))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Name the tensors of a module's result."""
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, (tuple, list)):
        parts = list(zip(_PARTS, value, strict=True) if name == VOXELS else enumerate(value))
    else:
        yield name, value
        return
    for key, part in parts:
        yield from _flat(f"{name}.{key}", part)


def _array(tensor: Any) -> Array:
    value: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return value

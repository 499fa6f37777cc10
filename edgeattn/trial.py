"""One trial: the original and every backend of a bundle on the same inputs, compared as a stream and timed in turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeattn import contenders
from edgeattn.accuracy import EXACT, Band, Comparison, band, least_share
from edgeattn.bundle import Bundle
from edgeattn.contenders import ORIGINAL, Contender
from edgeattn.data import open_data
from edgeattn.detection import cloud_input
from edgeattn.errors import MissingError, UsageError
from edgeattn.gates import SHARES
from edgeattn.latency import Measurement, Timing, measure, stability, summarise
from edgeattn.matching import Matching
from edgeattn.progress import Progress
from edgeattn.reference import Feeds, Original, Results, Sample, golden

if TYPE_CHECKING:
    from edgeattn.stages import Stages

COMPILED = "torch.compile"
_WARMUP_LIMIT = 10.0
_TORCH_HALF = {"fp16": "torch16", "bf16": "torch-bf16"}
# The inputs of the worst sample are kept for the picture in the report, up to this size.
_KEPT_BYTES = 16 << 20
# A detector takes seconds: beside the golden clouds, one more of each density.
_SEEDED_CLOUDS = 3
_WARNED_CLOUDS = 3


@dataclass
class Stream:
    """The samples of a trial: where they come from, how many there are, and a way to go through them again."""

    description: str
    count: int
    samples: Callable[[], Iterator[Sample]]
    lost: Mapping[str, str] = field(default_factory=dict)

    def first(self) -> Sample:
        """Return the first sample. Raises EA0140 when there is none."""
        for sample in self.samples():
            return sample
        raise UsageError("EA0140", f"{self.description}: nothing to compare with")


@dataclass
class Trial:
    """What was loaded and measured so far; `arrays` is what goes into the samples file of the report."""

    bundle: Bundle
    threads: int
    progress: Progress
    original: Original | None = None
    reference_note: str = ""
    contenders: list[Contender] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    measurement: Measurement | None = None
    samples: int = 0
    warnings: list[str] = field(default_factory=list)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    matchings: dict[str, Matching] = field(default_factory=dict)
    stages: Stages | None = None

    @property
    def candidates(self) -> list[Contender]:
        """Return the backends under test."""
        return [contender for contender in self.contenders if contender.role == "candidate"]

    def load(self, names: Sequence[str], feeds: Feeds) -> None:
        """Load the original and the candidates; see `contenders.candidates` for what is skipped and what fails."""
        with self.progress.stage("load", "original and backends") as stage:
            self.original, entry = contenders.original(self.bundle, feeds)
            if self.original is None:
                self.reference_note = f"{entry.skipped}: compared with the outputs recorded at export"
                self.warnings.append(self.reference_note)
            elif ORIGINAL not in names:
                self.contenders.append(entry)
            self.stages = self._open_stages()
            self.contenders += contenders.candidates(self.bundle, names, self.threads, feeds)
            stage.result = ", ".join(item.name for item in self.contenders if item.run is not None)

    def compare(self, stream: Stream) -> None:
        """Run every sample through the original, the original at the bundle's precision, and every candidate."""
        self._add_precision()
        compared = [item for item in self.contenders if item.role != "reference"]
        why, cloud = self.reference_note, cloud_input(self.bundle.inputs)
        for contender in compared:
            dtype = None if contender.role == "candidate" else "float32"
            contender.outputs = [_comparison(spec, dtype, self.bundle.detector is None) for spec in self.bundle.outputs]
            if self.bundle.detector is not None and cloud is not None:
                self.matchings[contender.name] = Matching(self.bundle.detector, cloud)
        with self.progress.stage("accuracy", stream.description) as stage, self._watched():
            for sample in stream.samples():
                expected = self.original(sample.feeds) if self.original else sample.recorded
                if expected is None:
                    raise MissingError("EA0212", f"{sample.name}: no outputs of PyTorch to compare with", why=why)
                for contender in compared:
                    self._add(contender, sample, expected)
                self.samples += 1
                stage.fraction = self.samples / max(1, stream.count)
            stage.result = f"{self.samples} samples"
        self._check_precision()
        self._check_detector(stream)
        for contender in compared:
            for comparison in contender.outputs:
                self.arrays[f"error/{contender.name}/{comparison.name}"] = np.array(comparison.errors)

    def bands(self) -> list[Band]:
        """Return the band of every output; integer outputs must be equal."""
        own = [each.metrics()["scaled_err"] for each in self._own.outputs] if self._own else None
        return [
            self._band(own[index] if own else None, not spec.dtype.startswith("float"))
            for index, spec in enumerate(self.bundle.outputs)
        ]

    def shares(self) -> dict[str, Band]:
        """Return the least shares of boxes that a detector must find, by gate."""
        own = self.matchings[self._own.name].figures() if self._own else {}
        return {gate: least_share(self.bundle.precision, own.get(gate)) for gate in SHARES}

    def modules(self, contender: Contender) -> list[dict[str, Any]]:
        """Return the errors of the stages of a detector; those of a candidate have a band."""
        if self.stages is None:
            return []
        found = self.stages.modules(contender.name)
        if contender.role != "candidate":
            return found
        own = self.stages.modules(self._own.name) if self._own else []
        half = {entry["name"]: entry["scaled_err"] for entry in own}
        return [{**entry, "band": asdict(self._band(half.get(entry["name"]), entry["integer"]))} for entry in found]

    def time(self, feeds: Feeds, names: Sequence[str], *, duration: float, fewest: int, compile: bool) -> None:
        """Measure the original and the candidates called `names`, in alternating rounds, on one input."""
        if compile and self.original is not None:
            self._add_compiled(feeds)
        timed = [item for item in self.contenders if self._is_timed(item, names)]
        runners = {item.name: _bound(item, feeds) for item in sorted(timed, key=lambda item: item.role == "candidate")}
        if not runners:
            return
        warmup = min(_WARMUP_LIMIT, 4 * duration)
        with self.progress.stage("latency", ", ".join(runners)) as stage:

            def tell(text: str) -> None:
                stage.what = text

            self.measurement = measure(runners, duration=duration, warmup=warmup, fewest=fewest, progress=tell)
            stage.what = ", ".join(runners)
            rounds = len(next(iter(self.measurement.timings.values())).rounds)
            stage.result = f"{rounds} alternating rounds"
        parts = self._time_stages(feeds, list(runners), duration)
        for timing in self.measurement.timings.values():
            self._record(timing, feeds, parts.get(timing.name))

    def _band(self, own: float | None, integer: bool) -> Band:
        if integer:
            return EXACT
        return band(self.bundle.precision, own if own is not None and math.isfinite(own) else None)

    @property
    def _own(self) -> Contender | None:
        """Return PyTorch at the precision of the bundle, where it could be measured."""
        return next((item for item in self.contenders if item.role == "precision" and item.failure is None), None)

    def _is_timed(self, contender: Contender, names: Sequence[str]) -> bool:
        if contender.run is None or contender.role == "precision":
            return False
        return contender.role == "reference" or contender.name in names

    def _add_precision(self) -> None:
        if self.original is not None and self.bundle.precision in _TORCH_HALF:
            name = _TORCH_HALF[self.bundle.precision]
            half = self.original.at(self.bundle.precision)
            self.contenders.insert(0, Contender(name, self.bundle.precision, "precision", half))

    def _check_precision(self) -> None:
        """Say so when the band is the bare floor because PyTorch itself could not be measured."""
        own = next((item for item in self.contenders if item.role == "precision"), None)
        if own is not None and own.failure is not None:
            self.contenders.remove(own)
            self.warnings.append(f"{own.failure.message}: the band is the floor of {self.bundle.precision}")
        elif own is None and self.bundle.precision in _TORCH_HALF:
            self.warnings.append(f"without PyTorch the band is the floor of {self.bundle.precision}")

    def _open_stages(self) -> Stages | None:
        """Return the stages of a detector, to be compared with those of the original."""
        if self.original is None or self.bundle.detector is None:
            return None
        try:
            from edgeattn.stages import Stages
        except ModuleNotFoundError as error:
            self.warnings.append(f"the stages are not compared: {error.name} is not installed")
            return None
        return Stages(self.bundle, self.original, self.threads)

    def _watched(self) -> AbstractContextManager[None]:
        """Watch the stages of a detector in PyTorch."""
        half = self._own.run if self._own else None
        assert half is None or isinstance(half, Original)
        return self.stages.hooked(half) if self.stages else nullcontext()

    def _check_detector(self, stream: Stream) -> None:
        """Say which clouds did not fit, and what of the stages could not be compared."""
        points = {name: (text,) for name, text in stream.lost.items()}
        others = {name: texts for each in self.matchings.values() for name, texts in each.losses.items()}
        lost = {name: (*points.get(name, ()), *others.get(name, ())) for name in {**points, **others}}
        told = [f"{name} does not fit: {'; '.join(texts)}" for name, texts in lost.items()]
        more = len(told) - _WARNED_CLOUDS
        self.warnings += [*told[:_WARNED_CLOUDS], *([f"{more} more clouds do not fit"] if more > 0 else [])]
        if self.stages is not None and self.samples:
            self.stages.check({spec.name: limit for spec, limit in zip(self.bundle.outputs, self.bands(), strict=True)})
            self.warnings += self.stages.warnings

    def _add(self, contender: Contender, sample: Sample, expected: Results) -> None:
        found = contender.attempt(sample.feeds, sample.name)
        if found is None:
            return
        if self.stages is not None:
            self.stages.add(contender, sample, found)
        matching = self.matchings.get(contender.name)
        both: tuple[Feeds, Feeds] = expected, found
        if matching is not None:
            both = matching.update(sample.name, sample.feeds, expected, found)
        for comparison in contender.outputs:
            worst = comparison.update(sample.name, *(side[comparison.name] for side in both))
            worst = matching.is_worst if matching else worst
            if worst and comparison is contender.outputs[0]:
                self._keep(contender.name, sample.feeds)

    def _keep(self, name: str, feeds: Feeds) -> None:
        if sum(array.nbytes for array in feeds.values()) <= _KEPT_BYTES:
            self.arrays.update({f"worst/{name}/{key}": array for key, array in feeds.items()})
        if name in self.matchings:
            expected, found = self.matchings[name].boxes
            self.arrays.update({f"boxes/{name}/expected": expected, f"boxes/{name}/found": found})

    def _time_stages(self, feeds: Feeds, names: Sequence[str], duration: float) -> dict[str, list[dict[str, Any]]]:
        if self.stages is None:
            return {}
        with self.progress.stage("latency", "by stage"):
            return self.stages.time(feeds, names, duration)

    def _add_compiled(self, feeds: Feeds) -> None:
        assert self.original is not None
        with self.progress.stage("compile", COMPILED):
            compiled = self.original.compiled(feeds)
        self.contenders.append(Contender(COMPILED, "fp32", "reference", compiled))

    def _record(self, timing: Timing, feeds: Feeds, parts: list[dict[str, Any]] | None) -> None:
        assert self.measurement is not None
        baseline = self.measurement.timings.get(ORIGINAL)
        contender = next(item for item in self.contenders if item.name == timing.name)
        self.results.append(
            {
                "backend": timing.name,
                "precision": contender.precision,
                "scope": "e2e",
                "graph": False,
                "batch": 1 if self.bundle.detector else int(next(iter(feeds.values())).shape[0]),
                **summarise(timing, baseline),
                **stability(timing, self.measurement.before, self.measurement.after),
                "load_s": contender.load_s,
                "memory_mib": contender.memory_mib,
                "energy_mj": None,
                "energy_rail": None,
                **({"stages": parts} if parts else {}),
            }
        )
        self.arrays[f"latency/{timing.name}/ms"] = timing.samples
        self.arrays[f"latency/{timing.name}/start_s"] = timing.times


def open_stream(bundle: Bundle, data: str | Path | None, samples: int | None) -> Stream:
    """Return the samples to validate with: `data`, or the golden inputs of the bundle and seeded ones."""
    if data is not None:
        found = open_data(data, bundle.inputs, samples=samples)
        return Stream(found.description, len(found), lambda: (Sample(name, feeds) for name, feeds in found), found.lost)
    kept = recorded_stream(bundle)
    made = open_data(None, bundle.inputs, samples=_SEEDED_CLOUDS if bundle.detector else None)
    seeded = Stream(made.description, len(made), lambda: (Sample(name, feeds) for name, feeds in made))
    both = Stream(
        f"{kept.description}, {seeded.description}",
        kept.count + seeded.count,
        lambda: itertools.chain(kept.samples(), seeded.samples()),
    )
    return both if samples is None else _capped(both, samples)


def recorded_stream(bundle: Bundle) -> Stream:
    """Return the golden inputs of the bundle: those whose outputs PyTorch left in it at export."""
    kept = list(golden(bundle))
    return Stream(f"{len(kept)} golden inputs", len(kept), lambda: iter(kept))


def _capped(stream: Stream, samples: int) -> Stream:
    if samples < 1:
        raise UsageError("EA0140", f"--samples {samples}: at least 1 is needed")
    if samples >= stream.count:
        return stream
    text = f"the first {samples} of {stream.description}"
    return Stream(text, samples, lambda: itertools.islice(stream.samples(), samples))


def _comparison(spec: Any, dtype: str | None, classify: bool) -> Comparison:
    floating = spec.dtype.startswith("float")
    classify = classify and floating and len(spec.dims) == 2
    return Comparison(spec.name, dtype if dtype and floating else spec.dtype, classify=classify)


def _bound(contender: Contender, feeds: Feeds) -> Callable[[], object]:
    run = contender.run
    assert run is not None
    return lambda: run(feeds)

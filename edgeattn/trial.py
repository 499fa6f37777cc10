"""One trial: the original and every backend of a bundle on the same inputs, compared as a stream and timed in turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeattn import contenders
from edgeattn.accuracy import Band, Comparison, band
from edgeattn.bundle import Bundle
from edgeattn.contenders import ORIGINAL, Contender
from edgeattn.data import open_data
from edgeattn.errors import MissingError, UsageError
from edgeattn.latency import Measurement, Timing, measure, stability, summarise
from edgeattn.progress import Progress
from edgeattn.reference import Feeds, Original, Results, Sample, golden

COMPILED = "torch.compile"
_WARMUP_LIMIT = 10.0
_TORCH_HALF = {"fp16": "torch16", "bf16": "torch-bf16"}
# The inputs of the worst sample are kept for the picture in the report, up to this size.
_KEPT_BYTES = 16 << 20


@dataclass
class Stream:
    """The samples of a trial: where they come from, how many there are, and a way to go through them again."""

    description: str
    count: int
    samples: Callable[[], Iterator[Sample]]

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
            self.contenders += contenders.candidates(self.bundle, names, self.threads, feeds)
            stage.result = ", ".join(item.name for item in self.contenders if item.run is not None)

    def compare(self, stream: Stream) -> None:
        """Run every sample through the original, the original at the bundle's precision, and every candidate."""
        self._add_precision()
        compared = [item for item in self.contenders if item.role != "reference"]
        why = self.reference_note
        for contender in compared:
            dtype = None if contender.role == "candidate" else "float32"
            contender.outputs = [_comparison(spec, dtype) for spec in self.bundle.outputs]
        with self.progress.stage("accuracy", stream.description) as stage:
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
        for contender in compared:
            for comparison in contender.outputs:
                self.arrays[f"error/{contender.name}/{comparison.name}"] = np.array(comparison.errors)

    def bands(self) -> list[Band]:
        """Return the band of every output; integer outputs must be equal."""
        own = next((item for item in self.contenders if item.role == "precision" and item.failure is None), None)
        found = []
        for index, spec in enumerate(self.bundle.outputs):
            if not spec.dtype.startswith("float"):
                found.append(Band(0.0, "integers are exact"))
                continue
            error = own.outputs[index].metrics()["scaled_err"] if own else None
            found.append(band(self.bundle.precision, error if error is not None and math.isfinite(error) else None))
        return found

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
        for timing in self.measurement.timings.values():
            self._record(timing, feeds)

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

    def _add(self, contender: Contender, sample: Sample, expected: Results) -> None:
        found = contender.attempt(sample.feeds, sample.name)
        if found is None:
            return
        for comparison in contender.outputs:
            worst = comparison.update(sample.name, expected[comparison.name], found[comparison.name])
            if worst and comparison is contender.outputs[0]:
                self._keep(contender.name, sample.feeds)

    def _keep(self, name: str, feeds: Feeds) -> None:
        if sum(array.nbytes for array in feeds.values()) <= _KEPT_BYTES:
            self.arrays.update({f"worst/{name}/{key}": array for key, array in feeds.items()})

    def _add_compiled(self, feeds: Feeds) -> None:
        assert self.original is not None
        with self.progress.stage("compile", COMPILED):
            compiled = self.original.compiled(feeds)
        self.contenders.append(Contender(COMPILED, "fp32", "reference", compiled))

    def _record(self, timing: Timing, feeds: Feeds) -> None:
        assert self.measurement is not None
        baseline = self.measurement.timings.get(ORIGINAL)
        contender = next(item for item in self.contenders if item.name == timing.name)
        self.results.append(
            {
                "backend": timing.name,
                "precision": contender.precision,
                "scope": "e2e",
                "graph": False,
                "batch": int(next(iter(feeds.values())).shape[0]),
                **summarise(timing, baseline),
                **stability(timing, self.measurement.before, self.measurement.after),
                "load_s": contender.load_s,
                "memory_mib": contender.memory_mib,
                "energy_mj": None,
                "energy_rail": None,
            }
        )
        self.arrays[f"latency/{timing.name}/ms"] = timing.samples
        self.arrays[f"latency/{timing.name}/start_s"] = timing.times


def open_stream(bundle: Bundle, data: str | Path | None, samples: int | None) -> Stream:
    """Return the samples to validate with: `data`, or the golden inputs of the bundle and eight seeded ones."""
    if data is not None:
        found = open_data(data, bundle.inputs, samples=samples)
        return Stream(found.description, len(found), lambda: (Sample(name, feeds) for name, feeds in found))
    kept, made = recorded_stream(bundle), open_data(None, bundle.inputs)
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


def _comparison(spec: Any, dtype: str | None) -> Comparison:
    floating = spec.dtype.startswith("float")
    return Comparison(spec.name, dtype if dtype and floating else spec.dtype, classify=floating and len(spec.dims) == 2)


def _bound(contender: Contender, feeds: Feeds) -> Callable[[], object]:
    run = contender.run
    assert run is not None
    return lambda: run(feeds)

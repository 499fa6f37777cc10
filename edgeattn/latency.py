"""Latency: callables timed in alternating rounds, so that a disturbance meets all, and how sure that is."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeattn import conditions

ROUNDS = 20
FEWEST_ROUNDS = 5
WINDOW = 50
SETTLED = 0.01
P99_SAMPLES = 1000
LEVEL = 0.95
_RESAMPLES = 2000
_FEWEST_WARMUP = 3
# Worker threads of ONNX Runtime keep spinning for about 60 ms after a call and halve the speed of whoever runs next.
_PAUSE_S = 0.1

# Limits of "stable": seven quiet runs of 3 s on a shared virtual machine stayed under 0.10, 0.22 and 0.02.
DRIFT, SPREAD, OUTLIERS = 0.15, 0.30, 0.05

Runner = Callable[[], object]
Progress = Callable[[str], None]
# Milliseconds per call, and start times in seconds.
Turn = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Warmup:
    """How long a callable ran before it was measured, and whether its times had settled by then."""

    seconds: float
    calls: int
    settled: bool
    typical_s: float


@dataclass(frozen=True)
class Timing:
    """What was measured of one callable: milliseconds per call and start times in seconds, one array per round."""

    name: str
    warmup: Warmup
    rounds: tuple[NDArray[np.float64], ...]
    starts: tuple[NDArray[np.float64], ...]

    @property
    def samples(self) -> NDArray[np.float64]:
        """Return all milliseconds in order."""
        return np.concatenate(self.rounds)

    @property
    def times(self) -> NDArray[np.float64]:
        """Return the start of every sample in seconds since the first round began."""
        return np.concatenate(self.starts)


@dataclass(frozen=True)
class Measurement:
    """Timings by name, and the state of the machine before and after."""

    timings: dict[str, Timing]
    before: dict[str, Any]
    after: dict[str, Any]


def measure(
    runners: Mapping[str, Runner],
    *,
    duration: float = 3.0,
    warmup: float = 10.0,
    fewest: int = FEWEST_ROUNDS,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
) -> Measurement:
    """Time every callable for about `duration` seconds, in rounds that alternate between them.

    Every callable warms up first, until its last 50 times have settled or for `warmup` seconds at most. All then get
    the same number of rounds, and the order turns by one each round. Rounds are added until each callable has `fewest`
    samples, but never beyond ten times `duration` (or five rounds, whichever is more). Between two turns all rest.
    """
    tell = progress or (lambda _: None)
    warm: dict[str, Warmup] = {}
    for name, run in runners.items():
        tell(f"warm-up {name}")
        warm[name] = settle(run, warmup, clock)
    slice_s = max(duration / ROUNDS, *(state.typical_s for state in warm.values()))
    before = conditions.state()
    with _no_collection():
        turns = _alternate(runners, warm, slice_s, _Rounds(duration, slice_s, fewest), clock, pause)
    tell(f"{len(next(iter(turns.values())))} rounds of {slice_s * 1e3:.0f} ms")
    timings = {
        name: Timing(name, warm[name], tuple(ms for ms, _ in taken), tuple(at for _, at in taken))
        for name, taken in turns.items()
    }
    return Measurement(timings, before, conditions.state())


def settle(run: Runner, limit: float, clock: Callable[[], float] = time.perf_counter) -> Warmup:
    """Call `run` until its last 50 times vary by less than 1 %, or for `limit` seconds.

    "Vary" compares the medians of the older and the newer half: it sees caches, clocks and compilers settle, and is not
    fooled by single outliers.
    """
    times: list[float] = []
    start = now = clock()
    settled = False
    while len(times) < _FEWEST_WARMUP or (now - start < limit and not settled):
        began = now
        run()
        now = clock()
        times.append(now - began)
        settled = len(times) >= WINDOW and _moved(times[-WINDOW:]) < SETTLED
    return Warmup(now - start, len(times), settled, float(np.median(times[-WINDOW:])))


def summarise(timing: Timing, baseline: Timing | None = None) -> dict[str, Any]:
    """Return percentiles and spread of a timing in milliseconds, and how much faster it is than `baseline`."""
    samples = timing.samples
    p25, p50, p75, p90, p95, p99 = np.percentile(samples, (25, 50, 75, 90, 95, 99)).tolist()
    mean, deviation = float(samples.mean()), float(samples.std())
    return {
        "n": len(samples),
        "rounds": len(timing.rounds),
        "p50_ms": p50,
        "p90_ms": p90,
        "p95_ms": p95,
        "p99_ms": p99 if len(samples) >= P99_SAMPLES else None,
        "max_ms": float(samples.max()),
        "mean_ms": mean,
        "iqr_ms": p75 - p25,
        "cv": deviation / mean,
        "jitter_ms": float(np.abs(np.diff(samples)).mean()) if len(samples) > 1 else 0.0,
        "warmup_s": timing.warmup.seconds,
        "warmup_n": timing.warmup.calls,
        "warmup_settled": timing.warmup.settled,
        "ratio": None if baseline is None else ratio(baseline, timing),
    }


def ratio(baseline: Timing, timing: Timing, *, seed: int = 0) -> dict[str, Any]:
    """Return how many times faster `timing` is than `baseline`, with a bootstrap interval (95 %).

    The figure is the median over rounds of the ratio of the two medians of that round. Rounds are resampled, not single
    calls: neighbouring calls share their disturbance, so they are not independent.
    """
    logs = np.array(
        [math.log(np.median(a) / np.median(b)) for a, b in zip(baseline.rounds, timing.rounds, strict=True)]
    )
    record = {"to": baseline.name, "value": math.exp(float(np.median(logs))), "low": None, "high": None, "level": LEVEL}
    if len(logs) < FEWEST_ROUNDS:
        return record
    draws = np.random.default_rng(seed).integers(0, len(logs), (_RESAMPLES, len(logs)))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(np.median(logs[draws], axis=1), (tail, 100 - tail))
    return {**record, "low": math.exp(float(low)), "high": math.exp(float(high))}


def stability(timing: Timing, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether a timing can be relied on: {stable, cause, drift, spread, outliers}."""
    samples, third = timing.samples, max(1, len(timing.samples) // 3)
    p25, p50, p75 = np.percentile(samples, (25, 50, 75))
    drift = float(np.median(samples[-third:]) / np.median(samples[:third]) - 1)
    spread = float((p75 - p25) / p50)
    outliers = float((samples > 2 * p50).mean())
    causes = [
        text
        for wrong, text in (
            (conditions.throttled(before, after) is True, "the processor throttled"),
            (conditions.contended(before, after), _company(before, after)),
            (abs(drift) > DRIFT, f"drift of {100 * drift:+.1f} % from the first to the last third"),
            (spread > SPREAD, f"half of the samples spread over {100 * spread:.0f} % of the median"),
            (outliers > OUTLIERS, f"{100 * outliers:.0f} % of the samples take more than twice the median"),
        )
        if wrong
    ]
    return {"stable": not causes, "cause": "; ".join(causes), "drift": drift, "spread": spread, "outliers": outliers}


@dataclass(frozen=True)
class _Rounds:
    """How many rounds there are: those of the duration, and more (up to ten times that) for `fewest` samples each."""

    duration: float
    slice_s: float
    fewest: int

    def needed(self, done: int, samples: int) -> bool:
        """Return whether another round follows after `done` rounds, with `samples` of the rarest callable."""
        wanted = max(FEWEST_ROUNDS, math.ceil(self.duration / self.slice_s - 1e-9))
        most = max(wanted, math.ceil(10 * self.duration / self.slice_s))
        return done < wanted or (samples < self.fewest and done < most)


def _alternate(
    runners: Mapping[str, Runner],
    warm: Mapping[str, Warmup],
    slice_s: float,
    rounds: _Rounds,
    clock: Callable[[], float],
    pause: Callable[[float], None],
) -> dict[str, list[Turn]]:
    """Run the rounds and return the turns of every callable."""
    turns: dict[str, list[Turn]] = {name: [] for name in runners}
    order, start, done = list(runners), clock(), 0
    while rounds.needed(done, min(sum(len(ms) for ms, _ in taken) for taken in turns.values())):
        for name in order:
            if len(order) > 1:
                pause(min(_PAUSE_S, 2 * slice_s))
            calls = max(1, round(slice_s / max(warm[name].typical_s, 1e-9)))
            turns[name].append(_time_turn(runners[name], calls, 3 * slice_s, start, clock))
        order, done = order[1:] + order[:1], done + 1
    return turns


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of the measurement."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _time_turn(run: Runner, calls: int, limit_s: float, start: float, clock: Callable[[], float]) -> Turn:
    """Return milliseconds per call and start times of one turn of `calls` calls.

    The number is fixed: filling a time instead would count fast periods more often than slow ones. Only a turn that
    exceeds `limit_s` ends early. Where it holds several calls, one more goes before them uncounted: it pays for the
    caches that the callable before it used.
    """
    if calls >= _FEWEST_WARMUP:
        run()
    milliseconds: list[float] = []
    starts: list[float] = []
    began = now = clock()
    while len(starts) < calls and (not starts or now - began < limit_s):
        starts.append(now - start)
        run()
        now, then = clock(), now
        milliseconds.append(1e3 * (now - then))
    return np.array(milliseconds), np.array(starts)


def _company(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    busy = conditions.background(before, after) or 0.0
    return f"other processes kept {busy:.1f} of {len(conditions.affinity())} cores busy"


def _moved(times: list[float]) -> float:
    half = len(times) // 2
    older, newer = float(np.median(times[:half])), float(np.median(times[half:]))
    return abs(newer - older) / max(1e-12, older)

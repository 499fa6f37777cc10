"""Timing on a clock of our own: interleaving, warm-up, percentiles, ratios and the verdict on stability."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edgeattn import conditions
from edgeattn.latency import (
    FEWEST_ROUNDS,
    P99_SAMPLES,
    ROUNDS,
    Timing,
    Warmup,
    measure,
    ratio,
    settle,
    stability,
    summarise,
)

QUIET = {"busy_s": 0.0, "own_s": 0.0, "clock_s": 0.0, "throttle_count": 0}
LATER = {"busy_s": 1.0, "own_s": 1.0, "clock_s": 1.0, "throttle_count": 0}


class Bench:
    """A clock that only moves when a callable works, and the order in which they ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def rest(self, seconds: float) -> None:
        self.now += seconds

    def runner(self, name: str, seconds):
        """Return a callable that takes `seconds` (a number, or a function of the number of its calls so far)."""

        def run() -> None:
            count = sum(call == name for call in self.calls) if callable(seconds) else 0
            self.now += seconds(count) if callable(seconds) else seconds
            self.calls.append(name)

        return run


def timing(samples, name: str = "x", rounds: int = 10) -> Timing:
    """Return a timing with the given milliseconds."""
    parts = tuple(np.array_split(np.asarray(samples, float), rounds))
    return Timing(name, Warmup(0.1, 50, True, 1e-3), parts, parts)


def turns(calls: list[str]) -> list[str]:
    """Collapse runs of the same name."""
    return [name for position, name in enumerate(calls) if position == 0 or calls[position - 1] != name]


def test_callables_alternate_in_rounds() -> None:
    bench = Bench()
    runners = {name: bench.runner(name, 1e-3) for name in ("a", "b", "c")}
    result = measure(runners, duration=0.3, warmup=0.01, clock=bench.clock, pause=bench.rest)
    warm = sum(item.warmup.calls for item in result.timings.values())
    measured = turns(bench.calls[warm:])
    assert len(measured) >= 2 * ROUNDS  # neighbouring rounds may share a callable
    for position in range(len(measured) - 4):
        assert set(measured[position : position + 5]) == {"a", "b", "c"}  # nobody waits longer than two rounds
    assert {len(item.rounds) for item in result.timings.values()} == {ROUNDS}


def test_every_callable_gets_about_the_duration() -> None:
    bench = Bench()
    speeds = {"fast": 2e-4, "slow": 9e-3}
    result = measure(
        {n: bench.runner(n, s) for n, s in speeds.items()},
        duration=1.0,
        warmup=0.05,
        clock=bench.clock,
        pause=bench.rest,
    )
    for name, seconds in speeds.items():
        taken = result.timings[name].samples
        assert taken.sum() / 1e3 == pytest.approx(1.0, rel=0.15)
        assert taken == pytest.approx(1e3 * seconds)


def test_a_very_slow_callable_is_bounded() -> None:
    bench = Bench()
    runners = {"slow": bench.runner("slow", 2.0), "fast": bench.runner("fast", 0.01)}
    result = measure(runners, duration=3.0, warmup=1.0, clock=bench.clock, pause=bench.rest)
    assert len(result.timings["slow"].samples) == FEWEST_ROUNDS
    assert Counter(bench.calls)["slow"] <= FEWEST_ROUNDS + 3


def test_more_samples_are_taken_when_asked() -> None:
    bench = Bench()
    result = measure(
        {"a": bench.runner("a", 0.05)}, duration=3.0, warmup=1.0, fewest=200, clock=bench.clock, pause=bench.rest
    )
    assert len(result.timings["a"].samples) >= 200
    bench = Bench()
    bounded = measure(
        {"a": bench.runner("a", 1.0)}, duration=3.0, warmup=1.0, fewest=200, clock=bench.clock, pause=bench.rest
    )
    assert len(bounded.timings["a"].samples) == 30


def test_warmup_ends_when_settled() -> None:
    bench = Bench()
    state = settle(bench.runner("a", lambda count: 1e-3 * (1 + 4 * 0.9**count)), 10.0, bench.clock)
    assert state.settled
    assert 50 < state.calls < 150
    assert state.typical_s == pytest.approx(1e-3, rel=0.05)


def test_warmup_is_bounded_when_it_never_settles() -> None:
    bench = Bench()
    state = settle(bench.runner("a", lambda count: 1e-3 * (1 + count / 50)), 1.0, bench.clock)
    assert not state.settled
    assert state.seconds == pytest.approx(1.0, abs=0.1)


def test_percentiles_against_numpy() -> None:
    samples = np.random.default_rng(0).gamma(4.0, 1.0, P99_SAMPLES)
    record = summarise(timing(samples))
    assert record["n"] == P99_SAMPLES
    for key, percent in (("p50_ms", 50), ("p90_ms", 90), ("p95_ms", 95), ("p99_ms", 99)):
        assert record[key] == pytest.approx(np.quantile(samples, percent / 100))
    assert record["iqr_ms"] == pytest.approx(np.quantile(samples, 0.75) - np.quantile(samples, 0.25))
    assert record["cv"] == pytest.approx(samples.std() / samples.mean())
    assert (record["max_ms"], record["mean_ms"]) == (samples.max(), pytest.approx(samples.mean()))


def test_p99_needs_a_thousand_samples() -> None:
    assert summarise(timing(np.ones(P99_SAMPLES - 1)))["p99_ms"] is None


def test_ratio_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    slow, fast = timing(4 + rng.normal(0, 0.2, 600), "torch", 30), timing(1 + rng.normal(0, 0.05, 600), "ort", 30)
    record = ratio(slow, fast)
    assert record["to"] == "torch"
    assert record["value"] == pytest.approx(4.0, rel=0.02)
    assert record["low"] < record["value"] < record["high"]
    assert record["high"] / record["low"] < 1.1


def test_shared_disturbance_cancels_in_the_ratio() -> None:
    """A machine that is three times slower in half of the rounds must not move the ratio."""
    load = np.repeat(np.where(np.arange(30) % 2, 3.0, 1.0), 20)
    rng = np.random.default_rng(0)
    record = ratio(timing(2 * load * rng.normal(1, 0.01, 600), rounds=30), timing(load, rounds=30))
    assert record["value"] == pytest.approx(2.0, rel=0.01)
    assert record["high"] - record["low"] < 0.05


def test_interval_covers_no_difference_and_finds_a_slowdown() -> None:
    rng = np.random.default_rng(0)
    covered = found = 0
    for seed in range(100):
        drift = np.repeat(rng.lognormal(0, 0.05, 30), 20)  # per round, shared
        a, b = (drift * rng.lognormal(0, 0.05, 600) for _ in range(2))
        same = ratio(timing(a, rounds=30), timing(b, rounds=30), seed=seed)
        slower = ratio(timing(a, rounds=30), timing(1.05 * b, rounds=30), seed=seed)
        covered += same["low"] <= 1.0 <= same["high"]
        found += slower["high"] < 1.0
    assert covered >= 90
    assert found >= 90


def test_few_rounds_give_no_interval() -> None:
    record = ratio(timing(np.ones(4), rounds=4), timing(np.ones(4), rounds=4))
    assert (record["value"], record["low"], record["high"]) == (1.0, None, None)


@pytest.mark.parametrize(
    ("samples", "cause"),
    [
        (np.random.default_rng(0).normal(1, 0.02, 600), ""),
        (np.linspace(1, 1.4, 600), "drift"),
        (np.random.default_rng(0).uniform(1, 3, 600), "spread"),
        (np.where(np.arange(600) % 10 == 0, 5.0, 1.0), "twice the median"),
    ],
    ids=["quiet", "drift", "spread", "outliers"],
)
def test_stability_names_the_cause(samples: np.ndarray, cause: str) -> None:
    verdict = stability(timing(samples), QUIET, LATER)
    assert verdict["stable"] == (not cause)
    assert cause in verdict["cause"]


def test_throttling_and_background_load_are_named(monkeypatch) -> None:
    steady = timing(np.ones(600))
    assert "throttled" in stability(steady, QUIET, {**LATER, "throttle_count": 3})["cause"]
    busy = {**LATER, "busy_s": 2.0}
    monkeypatch.setattr(conditions, "affinity", lambda: [0, 1])
    assert "1.0 of 2 cores" in stability(steady, QUIET, busy)["cause"]  # steady, and steadily too slow
    monkeypatch.setattr(conditions, "affinity", lambda: list(range(16)))
    assert stability(steady, QUIET, busy)["stable"]  # cores enough for both


def test_a_real_measurement_on_this_machine() -> None:
    matrix = np.random.default_rng(0).standard_normal((32, 32))
    runners = {"one": lambda: matrix @ matrix, "twenty": lambda: [matrix @ matrix for _ in range(20)]}
    result = measure(runners, duration=0.1, warmup=0.1)
    record = ratio(result.timings["twenty"], result.timings["one"])
    assert 5 < record["value"] < 60
    assert (np.diff(result.timings["one"].times) > 0).all()
    assert conditions.affinity()


def test_state_of_this_machine() -> None:
    before = conditions.state()
    sum(range(200_000))
    after = conditions.state()
    assert after["clock_s"] > before["clock_s"]
    assert after["own_s"] >= before["own_s"]
    assert conditions.background(before, after) is None  # too short to tell
    assert conditions.host()["packages"]["numpy"] == np.__version__

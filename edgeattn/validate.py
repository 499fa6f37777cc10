"""Validation: a bundle against its PyTorch original, accuracy and latency, promises kept or not, one report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgeattn import __version__, conditions
from edgeattn.bundle import Bundle
from edgeattn.contenders import Contender
from edgeattn.errors import MissingError, UnsupportedError, UsageError
from edgeattn.gates import SHARES, Gate, seconds
from edgeattn.latency import FEWEST_ROUNDS
from edgeattn.progress import Progress
from edgeattn.records import Report, plain
from edgeattn.report import Destination
from edgeattn.trial import COMPILED, Stream, Trial, open_stream, recorded_stream
from edgeattn.verdict import Promises, accuracy_gates, latency_gates, overall, settle, share_gates, stage_gates

_BENCH_SAMPLES = 200
_DURATION = 3.0


def validate(
    bundle: str | Path | Bundle,
    *,
    backends: Sequence[str] = (),
    data: str | Path | None = None,
    samples: int | None = None,
    level: str | None = None,
    gates: Sequence[str] = (),
    latency: bool | None = None,
    maximum: Sequence[str] = (),
    versus: str | Path | None = None,
    regress: str | float | None = None,
    require_stable: bool | None = None,
    compile: bool = False,
    threads: int | None = None,
    duration: str | float = _DURATION,
    html: bool | None = None,
    junit: str | Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compare a bundle with its PyTorch original in float32 and return the report, also written to `reports/`.

    The options are those of `edgeattn validate`. `latency` None measures; `html` None writes the page where its
    packages are installed, True demands it. A run that does not pass still returns: see `verdict`, `exit_code` and
    `raise_for_verdict()`. Raises what makes a run impossible: EA01xx for options and data, EA02xx for missing packages
    or permissions, EA09xx for a damaged bundle.
    """
    if level not in (None, "outputs"):
        raise UnsupportedError("EA0411", f"--level {level}: this version compares outputs only")
    promises = Promises.read(gates, maximum, versus, regress, require_stable)
    if latency is False and (promises.timed or compile):
        raise UsageError("EA0173", "--no-latency: --max, --vs, --require-stable and --compile need latency measured")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    _refuse_shares(promises, opened)
    options = {
        "--backend": backends, "--data": data, "--samples": samples, "--gate": gates, "--max": maximum, "--vs": versus,
        "--regress": regress, "--compile": compile, "--threads": threads, "--no-latency": latency is False,
        **_timing_options(require_stable, duration),
    }  # fmt: skip
    run = _Run("validate", opened, options, Destination(opened.path / "reports", output, html, junit, force))
    stream = open_stream(opened, data, samples)
    trial = Trial(opened, _threads(threads), progress or Progress(enabled=False))
    with _torch_threads(trial.threads):
        trial.load(backends, stream.first().feeds)
        stream = stream if trial.original else _recorded_only(opened, data, trial)
        trial.compare(stream)
        judged = {item.name: _judge(item, trial, promises) for item in trial.candidates}
        if latency is not False:
            # A latency counts only for what computes the right thing.
            passed = [name for name, found in judged.items() if all(gate.passed for gate in found)]
            trial.warnings += [f"{name} is not timed: its accuracy failed" for name in judged if name not in passed]
            trial.time(stream.first().feeds, passed, duration=seconds(duration), fewest=FEWEST_ROUNDS, compile=compile)
    return run.finish(trial, promises, judged, stream)


def bench(
    bundle: str | Path | Bundle,
    *,
    backends: Sequence[str] = (),
    data: str | Path | None = None,
    maximum: Sequence[str] = (),
    versus: str | Path | None = None,
    regress: str | float | None = None,
    require_stable: bool | None = None,
    compile: bool = False,
    threads: int | None = None,
    duration: str | float = _DURATION,
    html: bool | None = None,
    junit: str | Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure the latency of a bundle beside its PyTorch original; options, result and errors as in `validate`.

    Every backend gets at least 200 samples, unless that takes more than ten times `duration`.
    """
    promises = Promises.read((), maximum, versus, regress, require_stable)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    options = {
        "--backend": backends, "--data": data, "--max": maximum, "--vs": versus, "--regress": regress,
        "--compile": compile, "--threads": threads, **_timing_options(require_stable, duration),
    }  # fmt: skip
    run = _Run("bench", opened, options, Destination(opened.path / "reports", output, html, junit, force))
    stream = open_stream(opened, data, 1)
    feeds = stream.first().feeds
    trial = Trial(opened, _threads(threads), progress or Progress(enabled=False))
    with _torch_threads(trial.threads):
        trial.load(backends, feeds)
        names = [item.name for item in trial.candidates]
        trial.time(feeds, names, duration=seconds(duration), fewest=_BENCH_SAMPLES, compile=compile)
    return run.finish(trial, promises, {}, stream)


class _Run:
    """The frame of a run: which command on which bundle, where the report goes, when and on what machine it began."""

    def __init__(self, verb: str, bundle: Bundle, options: Mapping[str, Any], destination: Destination) -> None:
        destination.check()
        self.verb, self.bundle, self.destination = verb, bundle, destination
        self.command = ["edgeattn", verb, str(bundle.path), *_flags(options)]
        self.started, self.clock = datetime.now(timezone.utc), time.perf_counter()
        self.before = conditions.state()

    def finish(self, trial: Trial, promises: Promises, judged: dict[str, list[Gate]], stream: Stream) -> Report:
        """Judge what was measured, write the report and return it."""
        body = _body(trial, promises, judged, stream)
        head = {
            "schema": f"edgeattn.{self.verb}/1",
            "verdict": body.pop("verdict"),
            "exit_code": body.pop("exit_code"),
            "bundle": self.bundle.path.name,
            "bundle_sha256": self.bundle.sha256,
            "edgeattn": __version__,
            "command": self.command,
            "started": self.started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "duration_s": time.perf_counter() - self.clock,
            "host": conditions.host(),
            "state": self._state(trial),
        }
        return self.destination.write(Report(plain({**head, **body})), trial.arrays)

    def _state(self, trial: Trial) -> dict[str, Any]:
        measured = trial.measurement
        before = measured.before if measured else self.before
        after = measured.after if measured else conditions.state()
        return {
            "before": before,
            "after": after,
            "background_cores": conditions.background(before, after),
            "threads": trial.threads,
            "affinity": conditions.affinity(),
        }


def _body(trial: Trial, promises: Promises, judged: dict[str, list[Gate]], stream: Stream) -> dict[str, Any]:
    """Return the part of the report that the trial decides."""
    results = {result["backend"]: result for result in trial.results}
    settled: dict[str, dict[str, Any]] = {}
    for item in trial.contenders:
        found = judged.setdefault(item.name, [])
        if item.role == "candidate" and item.run is not None and all(gate.passed for gate in found):
            found += latency_gates(item.name, results.get(item.name), promises)
        settled[item.name] = settle(item, found, results.get(item.name), promises)
    verdict, code = overall(list(settled.values()))
    backends = [_backend(item, trial, settled[item.name]) for item in trial.contenders if item.name != COMPILED]
    return {
        "verdict": verdict,
        "exit_code": code,
        "model": trial.bundle.manifest["model"],
        "precision": trial.bundle.precision,
        "export_options": trial.bundle.manifest["options"],
        "inputs": [spec.as_dict() for spec in trial.bundle.inputs],
        "reference": {"source": "torch fp32" if trial.original else "recorded", "note": trial.reference_note},
        "data": {"source": stream.description, "samples": trial.samples},
        "warnings": [*_seeded(trial.bundle), *trial.warnings, *_unstable(trial, settled)],
        "skipped": [{"backend": item.name, "reason": item.skipped} for item in trial.contenders if item.skipped],
        "gates": [gate.as_dict() for found in judged.values() for gate in found],
        "backends": backends,
        "results": trial.results,
        "blame": _blame(backends),
    }


def _backend(item: Contender, trial: Trial, settled: Mapping[str, Any]) -> dict[str, Any]:
    metrics = [comparison.metrics() for comparison in item.outputs] if item.failure is None else []
    if item.role == "candidate" and metrics:
        metrics = [{**output, "band": asdict(limit)} for output, limit in zip(metrics, trial.bands(), strict=True)]
    modules = trial.modules(item) if item.failure is None else []
    entry = {
        "name": item.name,
        "precision": item.precision,
        "role": item.role,
        **settled,
        "outputs": metrics,
        "modules": modules,
    }
    matching = trial.matchings.get(item.name)
    if matching and matching.samples and item.failure is None:
        entry["detections"] = matching.figures()
    if trial.stages and modules and item.role == "candidate":
        entry["cut_err"] = trial.stages.cut_error
    return entry


def _blame(backends: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the first stage of a failed candidate whose error is beyond its band."""
    for backend in backends:
        for module in backend["modules"] if backend["verdict"] == "fail" else ():
            if not module["scaled_err"] <= module["band"]["limit"]:
                return {"backend": backend["name"], "module": module["stage"], "value": module["name"]}
    return None


def _judge(item: Contender, trial: Trial, promises: Promises) -> list[Gate]:
    if item.failure is not None or item.skipped:
        return []
    judged = stage_gates(item.name, trial.modules(item), promises)
    judged += accuracy_gates(item.name, [output.metrics() for output in item.outputs], trial.bands(), promises)
    matching = trial.matchings.get(item.name)
    return judged + (share_gates(item.name, matching.figures(), trial.shares(), promises) if matching else [])


def _refuse_shares(promises: Promises, bundle: Bundle) -> None:
    given = [name for name in SHARES if name in promises.accuracy]
    if given and bundle.detector is None:
        raise UsageError("EA0170", f"--gate {given[0]}: {bundle.name} finds no boxes")


def _seeded(bundle: Bundle) -> list[str]:
    if bundle.manifest["model"].get("weights_sha256") != "seeded":
        return []
    what = "boxes" if bundle.detector else "classes"
    return [f"seeded weights, NOT trained ones: numbers can be checked, {what} mean nothing"]


def _unstable(trial: Trial, settled: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say which latencies are unstable where nobody required them to be stable."""
    return [
        f"latency of {result['backend']} is unstable: {result['cause']}"
        for result in trial.results
        if not result["stable"] and settled[result["backend"]]["verdict"] != "unstable"
    ]


def _recorded_only(bundle: Bundle, data: str | Path | None, trial: Trial) -> Stream:
    """Return what can be compared without PyTorch. Raises EA0212 when that is nothing."""
    stream = recorded_stream(bundle)
    if data is not None or not stream.count:
        what = f"--data {data}" if data is not None else "a bundle without golden outputs"
        raise MissingError("EA0212", f"{what}: needs the PyTorch original", why=trial.reference_note)
    return stream


def _threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise UsageError("EA0135", f"threads must be 1 or more, got {threads}")
    return threads or len(conditions.affinity())


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Give PyTorch, where it is installed, as many threads as the backends it is compared with."""
    try:
        import torch
    except ModuleNotFoundError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timing_options(require_stable: bool | None, duration: str | float) -> dict[str, Any]:
    return {
        "--require-stable": require_stable is True,
        "--no-require-stable": require_stable is False,
        "--duration": None if seconds(duration) == _DURATION else f"{seconds(duration):g}s",
    }


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Return options as a command line: what was not given is left out."""
    flags: list[str] = []
    for name, value in options.items():
        if value is True:
            flags.append(name)
        elif isinstance(value, (list, tuple)):
            flags += [part for item in value for part in (name, str(item))]
        elif value is not None and value is not False:
            flags += [name, str(value)]
    return flags

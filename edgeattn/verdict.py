"""Promises against measurements: every gate of a run, the verdict of each backend, and the exit code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeattn import gates, records
from edgeattn.accuracy import Band
from edgeattn.contenders import Contender
from edgeattn.errors import UsageError
from edgeattn.gates import Gate

LATENCY_EXIT, ACCURACY_EXIT, MISSING_EXIT = 7, 6, 3
# Rounding alone moves the error of a float32 graph by this much between two builds of the same runtime.
_ROUNDING = 2.0**-23
_EXPLICIT = "given with --gate"


@dataclass(frozen=True)
class Promises:
    """What this run must keep: `accuracy` limits replace the derived bands, `latency` is in ms and MiB."""

    accuracy: Mapping[str, float] = field(default_factory=dict)
    latency: Mapping[str, float] = field(default_factory=dict)
    versus: Mapping[str, Any] | None = None
    versus_name: str = ""
    regress: float = 0.03
    stable: bool = False

    @classmethod
    def read(
        cls,
        accuracy: Iterable[str] = (),
        latency: Iterable[str] = (),
        versus: str | Path | None = None,
        regress: str | float | None = None,
        stable: bool | None = None,
    ) -> Promises:
        """Read the options of `validate` and `bench`. Raises EA0170, EA0171 or EA0172."""
        if regress is not None and versus is None:
            raise UsageError("EA0171", "--regress: compares with a stored report; add --vs REPORT")
        maxima = gates.latency_limits(latency)
        old = records.read(versus)[0] if versus is not None else None
        if old is not None and old.verb not in ("validate", "bench"):
            raise UsageError("EA0172", f"{versus}: a report of {old.verb}; --vs takes one of validate or bench")
        required = bool(maxima) or versus is not None
        return cls(
            gates.accuracy_limits(accuracy),
            maxima,
            old,
            Path(versus).name if versus is not None else "",
            gates.share(regress) if regress is not None else 0.03,
            required if stable is None else stable,
        )

    @property
    def timed(self) -> bool:
        """Return whether a promise can only be judged with latency measured."""
        return bool(self.latency) or self.stable or bool(self.versus and self.versus.get("results"))


def accuracy_gates(
    name: str, metrics: Sequence[Mapping[str, Any]], bands: Sequence[Band], promises: Promises
) -> list[Gate]:
    """Judge every output of the backend `name`: form and finiteness always, then the band or what the user gave."""
    judged: list[Gate] = []
    explicit = promises.accuracy
    classified = any(output["top1"] is not None for output in metrics)
    for output, limit in zip(metrics, bands, strict=True):
        judged.append(_form(name, output))
        judged.append(
            gates.judge("nan", output, explicit.get("nan", 0.0), _source("nan", explicit, "none allowed"), name)
        )
        rel = explicit.get("rel", limit.limit)
        judged.append(gates.judge("rel", output, rel, _source("rel", explicit, limit.source), name))
        if output["reference_nonfinite"]:
            count, source = output["reference_nonfinite"], "the reference must be finite"
            judged.append(gates.at_most("reference nan", count, 0, source, name, output=output["name"]))
        for gate in [name for name in explicit if name not in ("rel", "nan", *gates.SHARES)]:
            if gate != "top1" or output["top1"] is not None or not classified:
                judged.append(gates.judge(gate, output, explicit[gate], _EXPLICIT, name))
    return judged + _less_accurate(name, metrics, promises)


def share_gates(name: str, figures: Mapping[str, Any], limits: Mapping[str, Band], promises: Promises) -> list[Gate]:
    """Judge how many boxes of PyTorch a detector finds: by `limits`, or by what the user gave."""
    judged = []
    for gate, limit in limits.items():
        least = promises.accuracy.get(gate, limit.limit)
        source = _source(gate, promises.accuracy, limit.source)
        judged.append(gates.at_least(gate, figures[gate], least, source, name, output="boxes"))
    return judged


def stage_gates(name: str, modules: Sequence[Mapping[str, Any]], promises: Promises) -> list[Gate]:
    """Judge what the stages of a detector give, first to last: indices are exact, whatever the user gave."""
    judged = []
    for entry in modules:
        limit, source = entry["band"]["limit"], entry["band"]["source"]
        if limit > 0:
            limit, source = promises.accuracy.get("rel", limit), _source("rel", promises.accuracy, source)
        source = entry["problems"][0] if entry["problems"] else source
        judged.append(gates.at_most("rel", entry["scaled_err"], limit, source, name, output=entry["name"]))
    return judged


def latency_gates(name: str, result: Mapping[str, Any] | None, promises: Promises) -> list[Gate]:
    """Judge the latency and memory of the backend `name`; nothing measured fails every promise."""
    judged = []
    for metric, limit in promises.latency.items():
        unit = gates.MAXIMA[metric]
        key = "memory_mib" if unit == "MiB" else f"{metric}_ms"
        value = None if result is None else result[key]
        judged.append(gates.at_most(metric, value, limit, _why_unmeasured(metric, value), name, unit=unit))
    before = _entry((promises.versus or {}).get("results", ()), "backend", name)
    if before is not None:
        limit = records.number(before["p50_ms"]) * (1 + promises.regress)
        value = None if result is None else result["p50_ms"]
        judged.append(gates.at_most("p50", value, limit, _versus(promises), name, unit="ms"))
    return judged


def settle(
    contender: Contender, judged: Sequence[Gate], result: Mapping[str, Any] | None, promises: Promises
) -> dict[str, Any]:
    """Return the verdict of one backend: {verdict, reason, exit_code}."""
    if contender.role != "candidate":
        return {"verdict": "reference", "reason": "", "exit_code": 0}
    if contender.skipped:
        return {"verdict": "skipped", "reason": contender.skipped, "exit_code": 0}
    if contender.failure is not None:
        return {"verdict": "fail", "reason": contender.failure.message, "exit_code": contender.failure.exit_code}
    failed = [gate for gate in judged if not gate.passed]
    if failed:
        codes = [LATENCY_EXIT if gate.unit in ("ms", "MiB") else ACCURACY_EXIT for gate in failed]
        reason = f"{len(failed)} of {len(judged)} gates failed"
        return {"verdict": "fail", "reason": reason, "exit_code": records.worst_exit(codes)}
    if promises.stable and result is not None and not result["stable"]:
        return {"verdict": "unstable", "reason": f"latency is unstable: {result['cause']}", "exit_code": LATENCY_EXIT}
    return {"verdict": "pass", "reason": "", "exit_code": 0}


def overall(settled: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """Return verdict and exit code of the run; one in which nothing could be tested has not passed."""
    tested = [verdict for verdict in settled if verdict["verdict"] != "reference"]
    code = records.worst_exit([verdict["exit_code"] for verdict in tested])
    if code:
        return ("fail" if any(verdict["verdict"] == "fail" for verdict in tested) else "unstable"), code
    if not any(verdict["verdict"] == "pass" for verdict in tested):
        return "skipped", MISSING_EXIT
    return "pass", 0


def _form(name: str, output: Mapping[str, Any]) -> Gate:
    problems = output["problems"]
    source = problems[0] if problems else "shape and dtype as promised"
    if not output["samples"]:
        return gates.at_most("shape", None, 0, "nothing was compared", name, output=output["name"])
    return gates.at_most("shape", len(problems), 0, source, name, output=output["name"])


def _less_accurate(name: str, metrics: Sequence[Mapping[str, Any]], promises: Promises) -> list[Gate]:
    before = _entry((promises.versus or {}).get("backends", ()), "name", name) or {}
    judged = []
    for output in metrics:
        old = _entry(before.get("outputs", ()), "name", output["name"])
        if old is not None:
            limit = records.number(old["scaled_err"]) * (1 + promises.regress) + _ROUNDING
            judged.append(gates.judge("rel", output, limit, _versus(promises), name))
    return judged


def _entry(entries: Iterable[Mapping[str, Any]], key: str, name: str) -> Mapping[str, Any] | None:
    return next((entry for entry in entries if entry[key] == name), None)


def _source(gate: str, explicit: Mapping[str, float], otherwise: str) -> str:
    return _EXPLICIT if gate in explicit else otherwise


def _versus(promises: Promises) -> str:
    return f"{100 * promises.regress:g} % over {promises.versus_name}"


def _why_unmeasured(metric: str, value: float | None) -> str:
    if value is not None:
        return "given with --max"
    return "given with --max; needs 1000 samples: raise --duration" if metric == "p99" else "given with --max"

"""Gates: what a user promises on the command line (`rel=1e-3`, `p50=4ms`, `3%`), read with units and judged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeattn.errors import UsageError
from edgeattn.registry import near

# Which side of the limit passes: errors and counts stay below, agreement stays above.
AT_MOST = ("rel", "abs", "nan")
AT_LEAST = ("cosine", "snr", "top1")
# Shares of a detector's boxes: candidates that both have, and detections that match.
SHARES = ("candidates", "matched")
MAXIMA = {"p50": "ms", "p90": "ms", "p95": "ms", "p99": "ms", "max": "ms", "mean": "ms", "memory": "MiB"}

_NUMBER = re.compile(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z%]*)\s*")
_TIME = {"us": 1e-3, "ms": 1.0, "s": 1e3, "min": 6e4}
_SIZE = {"KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0, "KB": 1e3 / 2**20, "MB": 1e6 / 2**20, "GB": 1e9 / 2**20}


@dataclass(frozen=True)
class Gate:
    """One promise and what was measured; `value` None means that it could not be measured, which fails."""

    name: str
    value: float | None
    limit: float
    limit_source: str
    passed: bool
    backend: str
    output: str = ""
    unit: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of a report's `gates` list."""
        record = asdict(self)
        passed = record.pop("passed")
        return {**record, "pass": passed}


def at_most(name: str, value: float | None, limit: float, source: str, backend: str, **place: str) -> Gate:
    """Judge `value <= limit`; an unmeasured or non-finite value fails."""
    passed = value is not None and math.isfinite(value) and value <= limit
    return Gate(name, value, limit, source, passed, backend, **place)


def at_least(name: str, value: float | None, limit: float, source: str, backend: str, **place: str) -> Gate:
    """Judge `value >= limit`; an unmeasured value or NaN fails, an infinite SNR passes."""
    passed = value is not None and value >= limit
    return Gate(name, value, limit, source, passed, backend, **place)


def accuracy_limits(texts: Iterable[str]) -> dict[str, float]:
    """Read `--gate NAME=VALUE` options; a percentage is a share. Raises EA0170."""
    return {
        name: _scaled(value, {"": 1.0, "%": 0.01}, f"--gate {name}", "EA0170")
        for name, value in _pairs(texts, (*AT_MOST, *AT_LEAST, *SHARES), "gate", "EA0170")
    }


def latency_limits(texts: Iterable[str]) -> dict[str, float]:
    """Read `--max METRIC=VALUE` options into milliseconds and MiB; the unit is required. Raises EA0171."""
    return {
        name: _scaled(value, _TIME if MAXIMA[name] == "ms" else _SIZE, f"--max {name}", "EA0171")
        for name, value in _pairs(texts, tuple(MAXIMA), "metric", "EA0171")
    }


def share(text: str | float) -> float:
    """Read `3%` (or a plain share, 0.03) as 0.03. Raises EA0171."""
    return _scaled(str(text), {"": 1.0, "%": 0.01}, "--regress", "EA0171")


def seconds(text: str | float) -> float:
    """Read `3s`, `500ms` or a plain number of seconds. Raises EA0171."""
    value = _scaled(str(text), {**_TIME, "": 1e3}, "--duration", "EA0171") / 1e3
    if value <= 0:
        raise UsageError("EA0171", f"--duration {text}: must be positive")
    return value


def judge(name: str, metrics: Mapping[str, Any], limit: float, source: str, backend: str) -> Gate:
    """Judge one accuracy gate on the metrics of one output."""
    keys = {"rel": "scaled_err", "abs": "abs_max", "cosine": "cosine", "snr": "snr_db", "top1": "top1"}
    value = metrics["nan"] + metrics["inf"] if name == "nan" else metrics[keys[name]]
    test = at_most if name in AT_MOST else at_least
    return test(name, value, limit, source, backend, output=metrics["name"], unit="dB" if name == "snr" else "")


def _pairs(texts: Iterable[str], known: tuple[str, ...], kind: str, code: str) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(code, f"{text}: not a {kind}; write NAME=VALUE", hints=[f"known: {', '.join(known)}"])
        if name.strip() not in known:
            hint = near(name, list(known)) or f"; known: {', '.join(known)}"
            raise UsageError(code, f"{name}: no such {kind}{hint}")
        pairs.append((name.strip(), value))
    return pairs


def _scaled(text: str, units: Mapping[str, float], option: str, code: str) -> float:
    match = _NUMBER.fullmatch(text)
    if not match or match[2] not in units:
        wanted = ", ".join(unit for unit in units if unit)
        raise UsageError(code, f"{option}: {text!r} is not a number with a unit of {wanted}")
    try:
        return float(match[1]) * units[match[2]]
    except ValueError:
        raise UsageError(code, f"{option}: {text!r} is not a number") from None

"""The report page: one HTML file with everything in it, filled from a report and its samples."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from edgeattn import charts
from edgeattn.records import Arrays, number, reasons
from edgeattn.report import blame_line, milliseconds, ratio, stage_rows

_WEIGHTS = {"seeded": "seeded, not trained", "own": "those that the module came with"}
_TEMPLATE = Path(__file__).with_name("report.html")


def render(report: Mapping[str, Any], arrays: Arrays) -> str:
    """Return the page of a report; charts whose samples are missing are left out and said to be."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "ms": milliseconds, "error": _error, "share": _share, "decimal": _decimal, "ratio": ratio, "mib": _mib,
        "gate": _gate,
    }  # fmt: skip
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        verb=str(report["schema"]).removeprefix("edgeattn.").partition("/")[0],
        headline=headline(report),
        reasons=reasons(report),
        rows=_rows(report),
        charts=_charts(report, arrays),
        detections=_detections(report),
        stages=stage_rows(report),
        blame=blame_line(report) if report["blame"] else "",
        worst=_worst(report, arrays),
        environment=_environment(report),
        commands=_commands(report),
        weights=_WEIGHTS.get(report["model"]["weights_sha256"], f"sha256 {report['model']['weights_sha256']}"),
    )


def headline(report: Mapping[str, Any]) -> list[str]:
    """Return what was measured, in one sentence per tested backend."""
    results = {result["backend"]: result for result in report["results"]}
    sentences = []
    for backend in report["backends"]:
        if backend["verdict"] == "reference":
            continue
        parts = [_accuracy_clause(backend, report["data"]["samples"]), _boxes_clause(backend.get("detections"))]
        parts.append(_latency_clause(results.get(backend["name"])))
        clauses = "; ".join(part for part in parts if part)
        sentences += [f"{backend['name']}: {clauses}."] if clauses else []
    return sentences


def _accuracy_clause(backend: Mapping[str, Any], samples: int) -> str:
    outputs = [output for output in backend["outputs"] if "band" in output]
    if not outputs:
        return ""
    worst = max(outputs, key=lambda output: number(output["scaled_err"]) / (number(output["band"]["limit"]) or 1e-30))
    error, limit = number(worst["scaled_err"]), number(worst["band"]["limit"])
    where = f" at {worst['name']}" if len(outputs) > 1 else ""
    return f"scaled error {_error(error)}{where}, limit {_error(limit)}, over {samples} samples"


def _boxes_clause(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    boxes = found["boxes"]
    return f"{boxes['matched']} of {max(boxes['expected'], boxes['found'])} boxes match"


def _latency_clause(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    text = f"median {milliseconds(result['p50_ms'])} per call"
    return f"{text}, {ratio(result, interval=True)} the speed of {result['ratio']['to']}" if result["ratio"] else text


def _rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per backend and output for the accuracy table."""
    return [
        {**output, "backend": backend["name"], "verdict": backend["verdict"]}
        for backend in report["backends"]
        for output in backend["outputs"]
    ]


def _charts(report: Mapping[str, Any], arrays: Arrays) -> dict[str, str | None]:
    first = [backend for backend in report["backends"] if backend["outputs"]]
    errors, limits, histograms = {}, {}, {}
    for backend in first:
        output = max(backend["outputs"], key=lambda entry: number(entry["scaled_err"]))
        histograms[backend["name"]] = output["histogram"]
        key = f"error/{backend['name']}/{output['name']}"
        if key in arrays:
            errors[backend["name"]] = arrays[key]
        if "band" in output:
            limits[backend["name"]] = number(output["band"]["limit"])
    times, starts = _latencies(report, arrays)
    return {
        "errors": charts.sample_errors(errors, limits) if errors else None,
        "histogram": charts.error_histogram(histograms) if histograms else None,
        "distribution": charts.distribution(times) if times else None,
        "timeline": charts.timeline(times, starts) if times else None,
    }


def _latencies(report: Mapping[str, Any], arrays: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [result["backend"] for result in report["results"] if f"latency/{result['backend']}/ms" in arrays]
    times = {name: np.asarray(arrays[f"latency/{name}/ms"]) for name in names}
    return times, {name: np.asarray(arrays[f"latency/{name}/start_s"]) for name in names}


def _detections(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per backend for the table of a detector's boxes, with the limit of its gate."""
    limits = {gate["backend"]: gate for gate in report["gates"] if gate["name"] == "matched"}
    return [
        {**backend["detections"], "backend": backend["name"], "gate": limits.get(backend["name"])}
        for backend in report["backends"]
        if "detections" in backend
    ]


def _worst(report: Mapping[str, Any], arrays: Arrays) -> list[dict[str, Any]]:
    """Return the worst sample of every tested backend: its picture, and both top-5 lists where there are classes."""
    found = []
    for backend in report["backends"]:
        if backend["verdict"] == "reference" or not backend["outputs"]:
            continue
        output, image = backend["outputs"][0], None
        above = _from_above(report, arrays, backend["name"]) if "detections" in backend else None
        for spec in report["inputs"]:
            values = arrays.get(f"worst/{backend['name']}/{spec['name']}")
            image = image or (None if values is None else charts.picture(values, spec.get("preprocess")))
        detections = backend.get("detections")
        found.append(
            {"backend": backend["name"], "output": output, "detections": detections, "image": image, "above": above}
        )
    return found


def _from_above(report: Mapping[str, Any], arrays: Arrays, name: str) -> str | None:
    """Return the picture of the worst cloud with the boxes of PyTorch and of the backend `name`."""
    spec = next(spec for spec in report["inputs"] if "cloud" in spec)
    keys = [f"worst/{name}/{spec['name']}", f"worst/{name}/{spec['cloud']['count']}"]
    keys += [f"boxes/{name}/expected", f"boxes/{name}/found"]
    if any(key not in arrays for key in keys):
        return None
    points, count, expected, found = (np.asarray(arrays[key]) for key in keys)
    space = spec["cloud"]["space"]
    low, size, grid = (np.array(space[key][:2], float) for key in ("low", "size", "grid"))
    return charts.birds_eye(points[: int(count[0])], expected, found, name, low, low + size * grid)


def _environment(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    host, state = report["host"], report["state"]
    before, after = state["before"], state["after"]
    rows = [
        ("device", host["device"]),
        ("system", host["os"]),
        (
            "threads",
            f"{state['threads']} per backend; this process may use cores {state['affinity']} of {host['cores']}",
        ),
        ("clock", _change(before["cpu_mhz"], after["cpu_mhz"], "MHz")),
        ("governor", before["governor"]),
        ("temperature", _change(before["temp_c"], after["temp_c"], "C")),
        ("load", _change(before["load"], after["load"], "")),
        (
            "busy elsewhere",
            None if state["background_cores"] is None else f"{state['background_cores']:.2f} cores on average",
        ),
        ("python", host["python"]),
        ("packages", ", ".join(f"{name} {version}" for name, version in host["packages"].items())),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _commands(report: Mapping[str, Any]) -> list[str]:
    """Return how to make the bundle and this report again; what only the user knows stands in capitals."""
    model, options = report["model"], report["export_options"]
    name = "MODULE:FACTORY" if model["family"] == "user" else model["variant"]
    export = ["edgeattn", "export", name, "--precision", report["precision"]]
    for key, flag in (("targets", "--target"), ("inputs", "--input"), ("dims", "--dim"), ("keep_fp32", "--keep-fp32")):
        export += [part for value in options.get(key, ()) for part in (flag, str(value))]
    export += [] if model["weights_sha256"] in _WEIGHTS else ["--weights", "FILE"]
    return [shlex.join([*export, "-o", report["command"][2]]), shlex.join(report["command"])]


def _change(before: Any, after: Any, unit: str) -> str | None:
    if before is None:
        return None
    text = f"{before:g}" if before == after else f"{before:g} before, {after:g} after"
    return f"{text} {unit}".rstrip()


def _error(value: Any) -> str:
    found = number(value)
    return f"{found:.1e}" if found and math.isfinite(found) else f"{found:g}"


def _share(value: Any) -> str:
    return "-" if value is None else f"{100 * number(value):.1f} %"


def _decimal(value: Any, digits: int = 1, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{number(value):.{digits}f}{' ' + unit if unit else ''}"


def _gate(value: Any, unit: str) -> str:
    return f"{number(value):.4g} {unit}".rstrip()


def _mib(value: Any) -> str:
    return "-" if value is None else f"{number(value):.0f} MiB"
